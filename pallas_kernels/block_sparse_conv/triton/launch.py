"""The Triton implementation for NVIDIA GPUs from Ampere on: any channel list, all three passes,
through jax-triton.
"""

import dataclasses
import functools
import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.block_sparse_conv import reference as dense
from pallas_kernels.block_sparse_conv.spec import ConvSpec, Implementation
from pallas_kernels.block_sparse_conv.triton import kernels as triton_kernels
from pallas_kernels.block_sparse_conv.triton.limits import Tile
from pallas_kernels.block_sparse_conv.triton.tiles import choose_tile, methods, normal, pointwise

OLDEST = 80  # compute capability of Ampere, times ten
HOPPER = 90  # what is compiled for where there is no GPU


@dataclasses.dataclass(frozen=True)
class Launch:
    """One kernel call: everything but the operands, all of it static.

    Attributes:
      kernel: name in `triton_kernels`.
      programs: how many.
      constants: the kernel's compile-time arguments.
      tile: warps and stages.
      out: shape and dtype of the result.
      zeroed: whether the result starts as zeros.
    """

    kernel: str
    programs: int
    constants: tuple[tuple[str, Any], ...]
    tile: Tile
    out: jax.ShapeDtypeStruct
    zeroed: bool = False


@functools.cache
def unavailable() -> str | None:
    """Why the Triton kernels cannot run here: None where they can.

    Returns:
      None, or the reason.
    """
    device = jax.devices()[0]
    if device.platform != "gpu" or not hasattr(device, "compute_capability"):
        return f"runs on NVIDIA GPUs, and JAX's default device here is {device.platform!r}"
    if _capability() < OLDEST:
        return f"takes a GPU of compute capability 8.0 (Ampere) or newer, and this one ({device.device_kind}) has {device.compute_capability}"
    try:
        import jax_triton
        import triton  # noqa: F401
    except (ImportError, AttributeError) as error:  # AttributeError: made for another jax
        return f"jax-triton does not import ({error}); pip install 'blocksparse-jax[gpu]'"
    if "out_shape" not in inspect.signature(jax_triton.triton_call).parameters:
        return f"jax-triton {jax_triton.__version__} calls kernels in another way; pip install jax-triton==0.3.1"
    return None


def _capability() -> int:
    """The GPU's compute capability times ten; without a GPU, Hopper's, to compile for."""
    version = str(getattr(jax.devices()[0], "compute_capability", HOPPER / 10))
    return int(version.replace(".", "")) if version.replace(".", "").isdigit() else 0


def _supports(spec: ConvSpec) -> str | None:
    if reason := unavailable():
        return reason
    return _unfit(spec)


def _unfit(spec: ConvSpec) -> str | None:
    """Why the kernels cannot run a spec on any GPU."""
    if max(spec.kernel) > triton_kernels.MAX_KERNEL:
        return f"takes kernels up to {triton_kernels.MAX_KERNEL} pixels on a side, got {spec.kernel}; use 'xla'"
    if max(spec.cin, spec.cout) > triton_kernels.MAX_CHANNELS:
        return f"takes up to {triton_kernels.MAX_CHANNELS} channels, got {max(spec.cin, spec.cout)}; use 'xla'"
    if spec.dtype not in ("float32", "bfloat16", "float16"):
        return (
            f"computes in float32, bfloat16 and float16, not in {spec.dtype}; cast x, or use 'xla'"
        )
    largest = max(sum(spec.padding, ()) + spec.reach) + max(spec.in_shape[1:3])
    if largest**2 * (spec.batch + 8) >= 1 << 31:
        return f"counts the values of one channel in 31 bits: too large an image ({spec.in_shape[1:]} with its padding); use 'xla'"
    return None


def _run(launch: Launch, *operands: jax.Array) -> jax.Array:
    """Calls a kernel; tests put the interpreter, or a recorder, in its place."""
    import jax_triton

    return jax_triton.triton_call(
        *operands,
        kernel=getattr(triton_kernels, launch.kernel),
        out_shape=launch.out,
        grid=launch.programs,
        name=launch.kernel,
        num_warps=launch.tile.warps,
        num_stages=launch.tile.stages,
        compute_capability=_capability(),
        zeroed_outputs=(0,) if launch.zeroed else (),
        **dict(launch.constants),
    )


def _pass(body: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """A pass `(spec, *operands, **private)` that also runs under vmap and inside shard_map; an
    operand may be None.
    """

    @functools.wraps(body)
    def run(spec: ConvSpec, *operands: jax.Array | None, **private: Any) -> jax.Array:
        given = [a for a in operands if a is not None]

        @jax.custom_batching.sequential_vmap
        def call(*arrays: jax.Array) -> jax.Array:
            left = iter(arrays)
            out = body(spec, *(None if a is None else next(left) for a in operands), **private)
            axes = frozenset().union(*(jax.typeof(a).manual_axis_type.varying for a in arrays))
            missing = tuple(axes - jax.typeof(out).manual_axis_type.varying)
            return lax.pcast(out, missing, to="varying") if missing else out

        return call(*given)

    return run


def _fit(activations: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Activations in a shape of the normal convolution: perhaps one long row of images, padded to a
    multiple of 16 bytes.
    """
    if activations.shape[1:3] != shape[1:3]:
        activations = activations.reshape(shape[0], 1, 1, -1)
    wide = shape[3] - activations.shape[3]
    return jnp.pad(activations, ((0, 0), (0, 0), (0, 0), (0, wide))) if wide else activations


def _restore(activations: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """The inverse of `_fit`."""
    images = shape[3] if activations.shape[1:3] == shape[1:3] else shape[1] * shape[2] * shape[3]
    return activations[..., :images].reshape(shape)


def _up(size: int, step: int) -> int:
    return -(-size // step) * step


def _pad_last(array: jax.Array, size: int, fill: int) -> jax.Array:
    wide = size - array.shape[-1]
    return (
        jnp.pad(array, [(0, 0)] * (array.ndim - 1) + [(0, wide)], constant_values=fill)
        if wide
        else array
    )


def _entries(
    spec: ConvSpec, channels: jax.Array, taps: jax.Array, taps_first: bool, depth: int
) -> jax.Array:
    """The kernels' lists `[groups, depth]` of the rows (channel, tap), padded by -1."""
    bits = triton_kernels.TAP_BITS
    channels, taps = channels << 2 * bits, taps // spec.kernel[1] << bits | taps % spec.kernel[1]
    rows = (
        channels[:, None, :] | taps[:, :, None]
        if taps_first
        else channels[:, :, None] | taps[:, None, :]
    )
    return _pad_last(rows.reshape(rows.shape[0], -1), depth, -1)


def _constants(spec: ConvSpec, backward: bool) -> dict[str, Any]:
    """The compile-time arguments that say how positions lie; backward: from dy to dx."""
    source, out = (spec.out_shape, spec.in_shape) if backward else (spec.in_shape, spec.out_shape)
    low = tuple(pad for pad, _ in spec.padding)
    if backward:
        first, last = (
            tuple(f(*a) for a in zip(low, spec.reach, out[1:3]))
            for f in (lambda p, r, n: p - r, lambda p, r, n: n - 1 + p)
        )
    else:
        first = tuple(-p for p in low)
        last = tuple(
            (n - 1) * s + r - p for n, s, r, p in zip(out[1:3], spec.strides, spec.reach, low)
        )
    return {
        "size": source[1:],
        "out_size": out[1:],
        "strides": spec.strides,
        "padding": low,
        "dilation": spec.dilation,
        "border": min(first) < 0 or any(end >= size for end, size in zip(last, source[1:3])),
        "wide": max(
            spec.cin * spec.height * spec.width, spec.cout * spec.out_height * spec.out_width
        )
        * spec.batch
        >= 1 << 31,
        "precision": "tf32" if spec.precision == "tf32" else "ieee",
    }


def _product(
    spec: ConvSpec,
    tile: Tile,
    backward: bool,
    dtype: Any,
    source: jax.Array,
    entries: jax.Array,
    weights: jax.Array,
    rows: jax.Array,
    *,
    depth: int,
    members: int,
    weight_strides: tuple[int, int, int],
    bounds: jax.Array | None = None,
    scale: jax.Array | None = None,
    bias: jax.Array | None = None,
    residual: jax.Array | None = None,
    relu: bool = False,
    scatter: bool = False,
) -> jax.Array:
    """Runs `gather_product` over all groups."""
    groups = rows.shape[0]
    tiles = -(-members // tile.rows)
    shape = spec.in_shape if backward else spec.out_shape
    positions = shape[1] * shape[2] * shape[3]
    rows = _pad_last(rows, tiles * tile.rows, -1)
    constants = _constants(spec, backward) | {
        "groups": groups,
        "depth": depth,
        "depth_padded": _up(depth, tile.depth),
        "members": members,
        "weight_strides": weight_strides,
        "backward": backward,
        "ragged": depth % tile.depth != 0,
        "table": bounds is not None,
        "scatter": scatter,
        "with_scale": scale is not None,
        "with_bias": bias is not None,
        "with_residual": residual is not None,
        "relu": relu,
        "block_rows": tile.rows,
        "block_positions": tile.positions,
        "block_depth": tile.depth,
        "positions_first": tile.positions_first,
    }
    out = jax.ShapeDtypeStruct(shape, dtype)
    launch = Launch(
        "gather_product",
        groups * tiles * -(-positions // tile.positions),
        tuple(constants.items()),
        tile,
        out,
        scatter,
    )
    unused = rows
    operands = (source, entries, weights, bounds, rows, scale, bias, residual)
    return _run(launch, *(unused if a is None else a for a in operands))


@_pass
def _forward(
    spec: ConvSpec,
    x,
    values,
    filters,
    channels,
    taps,
    scale=None,
    bias=None,
    residual=None,
    tile: Tile | None = None,
):
    plain, tile = normal(spec), tile or choose_tile(spec, "forward", _capability())
    depth, members = spec.kept * spec.kept_taps, spec.group_size
    entries = _entries(plain, channels, taps, False, _up(depth, tile.depth))
    residual = None if residual is None else _fit(residual, plain.out_shape)
    y = _product(
        plain,
        tile,
        False,
        x.dtype,
        _fit(x, plain.in_shape),
        entries,
        values,
        filters,
        depth=depth,
        members=members,
        weight_strides=(depth * members, members, 1),
        scale=scale,
        bias=bias,
        residual=residual,
        relu=spec.relu,
    )
    return _restore(y, spec.out_shape)


def _spread(spec: ConvSpec, pixels: jax.Array) -> jax.Array:
    """Puts what reaches the read pixels in an image of zeros."""
    edges = [
        (-low, size + low - (out - 1) * stride - 1, stride - 1)
        for (low, _), size, out, stride in zip(
            spec.padding, spec.in_shape[1:3], spec.out_shape[1:3], spec.strides
        )
    ]
    return lax.pad(pixels, jnp.zeros((), pixels.dtype), ((0, 0, 0), *edges, (0, 0, 0)))


@_pass
def _input_gradient(
    spec: ConvSpec, dy, values, filters, channels, taps, tile: Tile | None = None, method: str = ""
):
    if pixels := pointwise(spec):
        return _spread(
            spec,
            _input_gradient(pixels, dy, values, filters, channels, taps, tile=tile, method=method),
        )
    tile = tile or choose_tile(spec, "input_gradient", _capability(), method)
    plain = normal(spec)
    if tile.method not in methods(spec):
        raise ValueError(
            f"method: expected one of {', '.join(methods(spec))} for "
            f"channel_block={spec.channel_block}, got {tile.method!r}"
        )
    if tile.method == "dense":
        exact = dataclasses.replace(
            spec, precision=lax.Precision.HIGHEST if plain.precision == "ieee" else spec.precision
        )
        return dense.IMPLEMENTATION.input_gradient(exact, dy, values, filters, channels, taps)
    dy = _fit(dy, plain.out_shape)
    run = _transposed if tile.method == "transposed" else _scatter
    return _restore(run(plain, tile, dy, values, filters, channels, taps), spec.in_shape)


def _scatter(spec: ConvSpec, tile: Tile, dy, values, filters, channels, taps):
    """Each group contracts its filters and taps, and adds its share of the kept channels to float32
    sums.
    """
    depth = spec.kept_taps * spec.group_size
    entries = _entries(spec, filters, taps, True, _up(depth, tile.depth))
    dx = _product(
        spec,
        tile,
        True,
        jnp.float32,
        dy,
        entries,
        values,
        channels,
        depth=depth,
        members=spec.kept,
        weight_strides=(spec.kept * depth, 1, depth),
        scatter=True,
    )
    return dx.astype(dy.dtype)


def _transposed(spec: ConvSpec, tile: Tile, dy, values, filters, channels, taps):
    """Each run of channels contracts the filters and taps of all groups that keep it, listed in a
    table: no sums in memory.
    """
    run, depth = spec.channel_block, spec.kept_taps * spec.group_size
    each, blocks, keeps = (
        _up(depth, tile.depth),
        spec.cin // spec.channel_block,
        spec.kept // spec.channel_block,
    )
    kept = channels[:, ::run].reshape(-1) // run
    order = jnp.argsort(kept)
    bounds = (
        jnp.searchsorted(kept[order], jnp.arange(blocks + 1), method="compare_all").astype(
            jnp.int32
        )
        * each
    )
    entries = _entries(spec, filters, taps, True, each)[order // keeps].reshape(-1)
    entries = _pad_last(entries, entries.size + tile.depth, -1)  # read one step ahead
    weights = (
        values.reshape(spec.groups, keeps, run, depth).swapaxes(2, 3).reshape(-1, depth, run)[order]
    )
    weights = jnp.pad(weights, ((0, 0), (0, each - depth), (0, 0)))
    rows = jnp.arange(spec.cin, dtype=jnp.int32).reshape(blocks, run)
    return _product(
        spec,
        tile,
        True,
        dy.dtype,
        dy,
        entries,
        weights,
        rows,
        depth=depth,
        members=run,
        weight_strides=(0, run, 1),
        bounds=bounds,
    )


@_pass
def _weight_gradient(spec: ConvSpec, x, dy, filters, channels, taps, tile: Tile | None = None):
    plain, tile = normal(spec), tile or choose_tile(spec, "weight_gradient", _capability())
    depth, members = spec.kept * spec.kept_taps, spec.group_size
    deep, tiles = _up(depth, tile.depth), -(-members // tile.rows)
    constants = _constants(plain, False) | {
        "groups": spec.groups,
        "depth": depth,
        "depth_padded": deep,
        "members": members,
        "splits": tile.splits,
        "ragged": depth % tile.depth != 0,
        "block_rows": tile.rows,
        "block_depth": tile.depth,
        "block_positions": tile.positions,
    }
    out = jax.ShapeDtypeStruct((tile.splits, *spec.packed_shape), jnp.float32)
    programs = spec.groups * tiles * (deep // tile.depth) * tile.splits
    launch = Launch("weight_gradient", programs, tuple(constants.items()), tile, out)
    rows = _pad_last(filters, tiles * tile.rows, -1)
    entries = _entries(plain, channels, taps, False, deep)
    partial = _run(launch, _fit(x, plain.in_shape), entries, rows, _fit(dy, plain.out_shape))
    return partial.sum(0)


IMPLEMENTATION = Implementation(
    "triton", _supports, _forward, _input_gradient, _weight_gradient, fused=True
)
