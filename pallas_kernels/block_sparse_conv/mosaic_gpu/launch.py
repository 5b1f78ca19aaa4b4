"""The implementation "mosaic_gpu": Pallas on Mosaic GPU, for Hopper.

It takes channels in aligned runs of 8. XLA prepares small operands in the same program: lists of
what to read (`lists.py`) and the weights in the order of the lists. In passes over activations that
costs:

- forward: none. The rows of y are written where `filters` says, with scale, bias, residual and ReLU
  applied. Padding costs nothing.
- both gradients: one gather brings the rows of dy into the order of the groups (XLA does it once
  for both gradients, and in one kernel with what computes dy, where that is elementwise).
- a batch that is no multiple of 64 is padded to one, and the result cut (1x1 convolutions over
  whole images: only pixels times images).
"""

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.block_sparse_conv.arithmetic import HALF_DTYPES
from pallas_kernels.block_sparse_conv.mosaic_gpu.geometry import Gather, Pixels, pixels
from pallas_kernels.block_sparse_conv.mosaic_gpu.lists import (
    forward_lists,
    gradient_lists,
    run_length,
)
from pallas_kernels.block_sparse_conv.mosaic_gpu.tiles import Tile, choose_tile
from pallas_kernels.block_sparse_conv.spec import ConvSpec, Implementation, Pair
from pallas_kernels.padding import pad_to, round_up
from pallas_kernels.sequential import one_at_a_time

LARGEST_GROUP = 128
LARGEST_OFFSET = 127
MOST_RUNS = 1 << 16


@functools.cache
def unavailable() -> str | None:
    """Why the kernels cannot run here.

    Returns:
      None where they can, else the reason.
    """
    backend = jax.default_backend()
    if backend != "gpu":
        return f"runs on NVIDIA Hopper GPUs, and JAX's default device here is {backend!r}"
    capability = str(getattr(jax.devices()[0], "compute_capability", "unknown"))
    if capability != "9.0":
        return (
            f"its matrix instruction (wgmma) is that of compute capability 9.0 (Hopper) alone, and "
            f"this GPU has {capability}"
        )
    try:
        from jax.experimental.pallas import mosaic_gpu  # noqa: F401
    except ImportError as error:
        return f"this JAX has no Pallas on Mosaic GPU ({error})"
    return None


def limits(spec: ConvSpec) -> str | None:
    """Why the kernels cannot run a convolution on any machine.

    Args:
      spec: the static sizes.

    Returns:
      None where they can, else the reason.

    Example:
      >>> spec = ConvSpec(cin=8, height=5, width=5, batch=2, kernel=(3, 3), cout=8, groups=2,
      ...                 kept=4, kept_taps=3, group_size=4)
      >>> limits(spec)[:46]
      'computes in bfloat16 and float16, not in float'
    """
    if not spec.has_known_batch:
        return f"its tiles depend on the number of images, got batch={spec.batch}; use 'xla'"
    if spec.dtype not in HALF_DTYPES:
        return (
            f"computes in {' and '.join(HALF_DTYPES)}, not in {spec.dtype}: wgmma takes 32-bit "
            f"operands only with the contracted axis innermost, and gathered rows have pixels "
            f"innermost; cast x, or use 'xla'"
        )
    if spec.channel_block % 8 or spec.cin % 8:
        return (
            f"reads channels in aligned runs of 8: channel_block={spec.channel_block} and "
            f"cin={spec.cin} must be multiples of 8"
        )
    if spec.group_size > LARGEST_GROUP:
        return f"a thread block has at most {LARGEST_GROUP} filters, group_size={spec.group_size}"
    offsets = [
        max(low, reach + high) for reach, (low, high) in zip(spec.reach, spec.padding, strict=True)
    ]
    if max(offsets) > LARGEST_OFFSET:
        return (
            f"taps lie at most {LARGEST_OFFSET} pixels away: kernel={spec.kernel}, "
            f"dilation={spec.dilation}, padding={spec.padding}"
        )
    grouped_rows = spec.groups * round_up(spec.group_size, 8)
    if max(spec.cin, grouped_rows) // 8 >= MOST_RUNS:
        return f"at most {8 * MOST_RUNS - 8} channels: cin={spec.cin}, cout={spec.cout}"
    sizes = pixels(spec, "forward")
    x_values = spec.cin * math.prod(sizes.source) * sizes.images
    y_values = grouped_rows * math.prod(sizes.output) * sizes.images
    if max(x_values, y_values) >= 1 << 31:
        return (
            f"counts the values of an array in 31 bits: too many in x {spec.in_shape} or y "
            f"{spec.out_shape}; use 'xla'"
        )
    return None


def _kernels() -> Any:
    """The kernels, imported at first use: this module must import where JAX has no Mosaic GPU."""
    from pallas_kernels.block_sparse_conv.mosaic_gpu import kernels

    return kernels


def _matrix(activations: jax.Array, images: int, size: Pair) -> jax.Array:
    """`[channels, pixels * images]` with padded images."""
    folded = activations.reshape(activations.shape[0], *size, -1)
    return pad_to(folded, (*folded.shape[:3], images)).reshape(activations.shape[0], -1)


def _activations(matrix: jax.Array, size: Pair, shape: tuple[int, ...]) -> jax.Array:
    """The inverse of `_matrix`."""
    images = math.prod(shape) // (shape[0] * math.prod(size))
    return matrix.reshape(matrix.shape[0], *size, -1)[..., :images].reshape(shape)


def _grouped(spec: ConvSpec, dy: jax.Array, filters: jax.Array) -> jax.Array:
    """The rows of dy in the order of the groups, zeros filling each up to a multiple of 8."""
    group_rows = round_up(spec.group_size, 8)
    if group_rows == spec.group_size:
        return dy.at[filters.reshape(-1)].get(mode="promise_in_bounds", unique_indices=True)
    index = pad_to(filters, (spec.groups, group_rows), spec.cout)
    return dy.at[index.reshape(-1)].get(mode="fill", fill_value=0)


def _forward_gather(spec: ConvSpec, sizes: Pixels, run: int) -> Gather:
    return Gather(run, sizes.source, sizes.output, spec.strides, (1, 1), sizes.images)


def _forward(
    interpret: Any,
    tile: Tile | None,
    spec: ConvSpec,
    x: jax.Array,
    values: jax.Array,
    filters: jax.Array,
    channels: jax.Array,
    taps: jax.Array,
    scale: jax.Array | None = None,
    bias: jax.Array | None = None,
    residual: jax.Array | None = None,
) -> jax.Array:
    tile = tile or choose_tile(spec, "forward")
    sizes = pixels(spec, "forward")
    run = run_length(spec.channel_block, tile)
    lists = forward_lists(spec, run, tile.depth, channels, taps)
    depth = lists.shape[1] * run
    weights = values.transpose(0, 3, 2, 1).reshape(spec.groups, spec.group_size, -1)

    def per_block(vector: jax.Array) -> jax.Array:
        return pad_to(vector[filters], (spec.groups, tile.rows))

    y = _kernels().gather_product(
        _forward_gather(spec, sizes, run),
        tile,
        jnp.full((spec.groups,), depth // tile.depth, jnp.int32),
        lists,
        pad_to(weights, (spec.groups, tile.rows, depth)),
        _matrix(x, sizes.images, sizes.source),
        filters,
        spec.cout,
        scale=None if scale is None else per_block(scale),
        bias=None if bias is None else per_block(bias),
        residual=None if residual is None else _matrix(residual, sizes.images, sizes.output),
        relu=spec.relu,
        interpret=interpret,
    )
    return _activations(y, sizes.output, spec.out_shape)


def _input_gradient(
    interpret: Any,
    tile: Tile | None,
    spec: ConvSpec,
    dy: jax.Array,
    values: jax.Array,
    filters: jax.Array,
    channels: jax.Array,
    taps: jax.Array,
) -> jax.Array:
    tile = tile or choose_tile(spec, "input_gradient")
    sizes = pixels(spec, "input_gradient")
    run = run_length(round_up(spec.group_size, 8), tile)
    lists = gradient_lists(spec, tile, run, values, channels, taps)
    dx = _kernels().gather_product(
        Gather(run, sizes.source, sizes.output, (1, 1), spec.strides, sizes.images),
        tile,
        lists.stages,
        lists.entries,
        lists.weights,
        _matrix(_grouped(spec, dy, filters), sizes.images, sizes.source),
        None,
        spec.cin,
        interpret=interpret,
    )
    return _activations(dx, sizes.output, spec.in_shape)


def _weight_gradient(
    interpret: Any,
    tile: Tile | None,
    spec: ConvSpec,
    x: jax.Array,
    dy: jax.Array,
    filters: jax.Array,
    channels: jax.Array,
    taps: jax.Array,
) -> jax.Array:
    tile = tile or choose_tile(spec, "weight_gradient")
    sizes = pixels(spec, "weight_gradient")
    run = math.gcd(spec.channel_block, 64)
    partial_sums = _kernels().gather_outer(
        _forward_gather(spec, sizes, run),
        tile,
        forward_lists(spec, run, tile.columns, channels, taps),
        _matrix(x, sizes.images, sizes.source),
        _matrix(_grouped(spec, dy, filters), sizes.images, sizes.output),
        round_up(spec.group_size, 8),
        interpret=interpret,
    )
    total = partial_sums[:, :, : spec.group_size, : spec.kept_taps * spec.kept].sum(0)
    total = total.reshape(spec.groups, spec.group_size, spec.kept_taps, spec.kept)
    return total.transpose(0, 3, 2, 1)


def implementation(
    interpret: Any = None, tiles: Mapping[str, Tile] | None = None
) -> Implementation:
    """The record of this implementation.

    Args:
      interpret: None: for a GPU; or the parameters of Pallas' interpreter, for any machine.
      tiles: a tile for some passes, by name; the others choose.

    Returns:
      The record.

    Example:
      >>> implementation().name
      'mosaic_gpu'
    """
    fixed_tiles = tiles or {}

    def supports(spec: ConvSpec) -> str | None:
        reason = unavailable() if interpret is None else None
        return reason or limits(spec)

    def one_pass(name: str, run: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
        def batched(spec: ConvSpec, *operands: jax.Array | None) -> jax.Array:
            one_example = functools.partial(run, interpret, fixed_tiles.get(name), spec)
            return one_at_a_time(one_example, operands)

        return batched

    return Implementation(
        "mosaic_gpu",
        supports,
        forward=one_pass("forward", _forward),
        input_gradient=one_pass("input_gradient", _input_gradient),
        weight_gradient=one_pass("weight_gradient", _weight_gradient),
        fused=True,
    )


IMPLEMENTATION = implementation()
