"""The implementation "triton": NVIDIA GPUs from Ampere on, any channel list, through jax-triton."""

import dataclasses
import functools
import math
from typing import Any

import jax

from pallas_kernels import batch_norm
from pallas_kernels.batch_norm import Affine, NormSpec
from pallas_kernels.block_sparse_conv import tuned_tables
from pallas_kernels.block_sparse_conv.epilogue import Epilogue
from pallas_kernels.block_sparse_conv.index import Index
from pallas_kernels.block_sparse_conv.plan import Plan, why_no_plan
from pallas_kernels.block_sparse_conv.spec import NORM_PASSES, PASSES, ConvSpec, Implementation
from pallas_kernels.block_sparse_conv.triton import calls
from pallas_kernels.block_sparse_conv.triton.fitting import Tile
from pallas_kernels.block_sparse_conv.triton.input_gradient import (
    input_gradient,
    norm_input_gradient,
)
from pallas_kernels.block_sparse_conv.triton.normal_form import fit, normal, restore
from pallas_kernels.block_sparse_conv.triton.stationary import tile_with_norm
from pallas_kernels.block_sparse_conv.triton.tiles import choose_tile
from pallas_kernels.sequential import one_at_a_time

OLDEST_CAPABILITY = 80
"""Ampere's compute capability, times ten."""
DTYPES = ("float32", "bfloat16", "float16")


@functools.cache
def unavailable() -> str | None:
    """Why the Triton kernels cannot run here.

    Returns:
      None where they can, else the reason.
    """
    device = jax.devices()[0]
    if device.platform != "gpu" or not hasattr(device, "compute_capability"):
        return f"runs on NVIDIA GPUs, and JAX's default device here is {device.platform!r}"
    if calls.capability() < OLDEST_CAPABILITY:
        return (
            f"takes a GPU of compute capability 8.0 (Ampere) or newer, and this one "
            f"({device.device_kind}) has {device.compute_capability}"
        )
    try:
        import jax_triton  # noqa: F401
        import triton  # noqa: F401
    except (ImportError, AttributeError) as error:  # AttributeError: made for another jax
        return f"jax-triton does not import ({error}); pip install 'blocksparse-jax[gpu]'"
    return None


def limits(spec: ConvSpec) -> str | None:
    """Why the kernels cannot run a convolution on any GPU.

    Args:
      spec: the static sizes.

    Returns:
      None where they can, else the reason.

    Example:
      >>> spec = ConvSpec(cin=8, height=50, width=50, batch=2, kernel=(17, 1), cout=8, groups=2,
      ...                 kept=4, kept_taps=3, group_size=4)
      >>> limits(spec)
      "takes kernels up to 16 pixels on a side, got (17, 1); use 'xla'"
    """
    if not spec.has_known_batch:
        return f"its tiles depend on the number of images, got batch={spec.batch}; use 'xla'"
    if reason := why_no_plan(spec.kernel_shape):
        return f"{reason}; use 'xla'"
    if spec.dtype not in DTYPES:
        return (
            f"computes in float32, bfloat16 and float16, not in {spec.dtype}; cast x, or use 'xla'"
        )
    largest = max(*spec.padding[0], *spec.padding[1], *spec.reach) + max(spec.in_size)
    if largest**2 * (spec.batch + 8) >= 1 << 31:
        return (
            f"counts the values of one channel in 31 bits: too large an image "
            f"({spec.in_shape[1:]} with its padding); use 'xla'"
        )
    return None


def _supports(spec: ConvSpec) -> str | None:
    return unavailable() or limits(spec)


def _forward(
    spec: ConvSpec,
    x: jax.Array,
    values: jax.Array,
    filters: jax.Array,
    channels: jax.Array,
    taps: jax.Array,
    scale: jax.Array | None = None,
    bias: jax.Array | None = None,
    residual: jax.Array | None = None,
    plan: Plan | None = None,
    tile: Tile | None = None,
) -> jax.Array:
    def forward(
        x: jax.Array, values: jax.Array, index: Index, epilogue: Epilogue, plan: Plan | None
    ) -> jax.Array:
        y: jax.Array = _product(spec, x, values, index, epilogue, plan, tile)
        return y

    index, epilogue = Index(filters, channels, taps), Epilogue(scale, bias, residual)
    return one_at_a_time(forward, (x, values, index, epilogue, plan))


def _forward_with_sums(
    spec: ConvSpec,
    x: jax.Array,
    values: jax.Array,
    filters: jax.Array,
    channels: jax.Array,
    taps: jax.Array,
    scale: jax.Array | None = None,
    shift: jax.Array | None = None,
    plan: Plan | None = None,
    tile: Tile | None = None,
) -> tuple[jax.Array, jax.Array]:
    def forward(
        x: jax.Array, values: jax.Array, index: Index, norm: Affine | None, plan: Plan | None
    ) -> tuple[jax.Array, jax.Array]:
        if norm is not None and math.prod(normal(spec).in_shape) != x.size:
            # Images that fill up a row would not be zero after the norm, and count in the sums.
            x, norm = batch_norm.apply(NormSpec(spec.relu), norm, x, None), None
        raw = dataclasses.replace(spec, relu=spec.relu and norm is not None)
        y, sums = _product(raw, x, values, index, Epilogue(), plan, tile, True, norm)
        return y, sums

    index, norm = Index(filters, channels, taps), _norm(scale, shift)
    return one_at_a_time(forward, (x, values, index, norm, plan))


def _norm(scale: jax.Array | None, shift: jax.Array | None) -> Affine | None:
    """What normalises the input while it is gathered."""
    return None if scale is None or shift is None else Affine(scale, shift)


def _product(
    spec: ConvSpec,
    x: jax.Array,
    values: jax.Array,
    index: Index,
    epilogue: Epilogue,
    plan: Plan | None,
    tile: Tile | None,
    with_sums: bool = False,
    norm: Affine | None = None,
) -> Any:
    """The forward pass with its epilogue, and the sums of its result where they are wanted."""
    plain = normal(spec)
    plan = plan or calls.plan_of(plain, index)
    depth, members = spec.kept * spec.kept_taps, spec.group_size
    if epilogue.residual is not None:
        epilogue = epilogue._replace(residual=fit(epilogue.residual, plain.out_shape))
    tile = tile or choose_tile(spec, "forward", calls.capability())
    if norm is not None:
        tile = tile_with_norm(tile)
    x = fit(x, plain.in_shape)
    ends: dict[str, Any] = {"relu": spec.relu, "with_sums": with_sums, "norm": norm}
    if tile.walkers:
        results = calls.stationary_product(plain, tile, x, values, plan, epilogue=epilogue, **ends)
    else:
        strides = (depth * members, members, 1)
        lists = calls.Lists(plan.forward, plan.rows, values, strides, depth, members)
        results = calls.gather_product(
            plain, tile, x, lists, backward=False, dtype=x.dtype, epilogue=epilogue, **ends
        )
    if not with_sums:
        return restore(results, spec.out_shape)
    y, sums = results
    return restore(y, spec.out_shape), sums


def _input_gradient(
    spec: ConvSpec,
    dy: jax.Array,
    values: jax.Array,
    filters: jax.Array,
    channels: jax.Array,
    taps: jax.Array,
    plan: Plan | None = None,
    tile: Tile | None = None,
    method: str = "",
) -> jax.Array:
    def backward(dy: jax.Array, values: jax.Array, index: Index, plan: Plan | None) -> jax.Array:
        return input_gradient(spec, dy, values, index, plan, tile=tile, method=method)

    return one_at_a_time(backward, (dy, values, Index(filters, channels, taps), plan))


def _norm_input_gradient(
    spec: ConvSpec,
    dy: jax.Array,
    values: jax.Array,
    filters: jax.Array,
    channels: jax.Array,
    taps: jax.Array,
    z: jax.Array,
    scale: jax.Array,
    shift: jax.Array,
    joined: jax.Array | None = None,
    more: jax.Array | None = None,
    plan: Plan | None = None,
    tile: Tile | None = None,
) -> tuple[jax.Array, ...]:
    def backward(
        dy: jax.Array,
        values: jax.Array,
        index: Index,
        norm: calls.ThroughNorm,
        plan: Plan | None,
    ) -> tuple[jax.Array, ...]:
        return norm_input_gradient(spec, dy, values, index, norm, plan, tile)

    index, norm = Index(filters, channels, taps), calls.ThroughNorm(z, scale, shift, joined, more)
    return one_at_a_time(backward, (dy, values, index, norm, plan))


def _weight_gradient(
    spec: ConvSpec,
    x: jax.Array,
    dy: jax.Array,
    filters: jax.Array,
    channels: jax.Array,
    taps: jax.Array,
    scale: jax.Array | None = None,
    shift: jax.Array | None = None,
    plan: Plan | None = None,
    tile: Tile | None = None,
) -> jax.Array:
    plain = normal(spec)
    chosen = tile or choose_tile(spec, "weight_gradient", calls.capability())

    def backward(
        x: jax.Array, dy: jax.Array, index: Index, norm: Affine | None, plan: Plan | None
    ) -> jax.Array:
        plan = plan or calls.plan_of(plain, index)
        x, dy = fit(x, plain.in_shape), fit(dy, plain.out_shape)
        relu = spec.relu and norm is not None
        return calls.weight_gradient(plain, chosen, x, dy, plan, norm, relu).sum(0)

    norm = _norm(scale, shift)
    return one_at_a_time(backward, (x, dy, Index(filters, channels, taps), norm, plan))


IMPLEMENTATION = Implementation(
    "triton",
    _supports,
    _forward,
    _input_gradient,
    _weight_gradient,
    fused=True,
    plans=(*PASSES, *NORM_PASSES),
    forward_with_sums=_forward_with_sums,
    norm_input_gradient=_norm_input_gradient,
    normalises=tuned_tables.prologue_pays,
)
