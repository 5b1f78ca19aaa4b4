"""The three passes on a Hopper GPU, in Pallas on Mosaic GPU, for channels that come in aligned runs
of 8.

XLA prepares small operands in the same program: lists of what to read (from the index arrays, whose
contents are dynamic) and the weights in the order of the lists. What it costs in passes over
activations:

- forward: none. The rows of y are written where `filters` says, with scale, bias, residual and ReLU
  applied. Padding costs nothing.
- both gradients: one gather brings the rows of dy into the order of the groups (XLA does it once
  for both gradients, and in one kernel with what computes dy, where that is elementwise).
- a batch that is no multiple of 64 is padded to one, and the result cut (1x1 convolutions over
  whole images: only pixels times images).

The input gradient is the forward kernel with the roles changed: a block of output rows is 64 or 128
neighbouring input channels, and its list names the (group, tap) pairs that reach one of them. A
group reaches a block of channels or does not, so `groups * kept_taps` bounds the list statically
for any contents, with no waste in the time: the kernel walks over the pairs that are there. Weights
of channels that the group does not keep are zeros. With strides there is one list for each residue
of the input pixel, of the taps that reach it.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.block_sparse_conv.mosaic_gpu.tiles import (
    Pixels,
    Rows,
    Tile,
    choose_tile,
    entry,
    pixels,
)
from pallas_kernels.block_sparse_conv.spec import ConvSpec, Implementation

DTYPES = ("bfloat16", "float16")
LARGEST_GROUP = 128
LARGEST_OFFSET = 127
MOST_RUNS = 1 << 16


@functools.cache
def unavailable() -> str | None:
    """Why the kernels cannot run here: None where they can.

    Returns:
      None, or the reason.
    """
    if jax.default_backend() != "gpu":
        return f"runs on NVIDIA Hopper GPUs, and JAX's default device here is {jax.default_backend()!r}"
    capability = str(getattr(jax.devices()[0], "compute_capability", "unknown"))
    if capability != "9.0":
        return f"its matrix instruction (wgmma) is that of compute capability 9.0 (Hopper) alone, and this GPU has {capability}"
    try:
        from jax.experimental.pallas import mosaic_gpu  # noqa: F401
    except ImportError as error:
        return f"this JAX has no Pallas on Mosaic GPU ({error})"
    return None


def limits(spec: ConvSpec) -> str | None:
    """Why the kernels cannot serve a convolution on any machine: None where they can.

    Args:
      spec: the static sizes.

    Returns:
      None, or the reason.

    Example:
      >>> spec = ConvSpec(cin=8, height=5, width=5, batch=2, kernel=(3, 3), cout=8, groups=2, kept=4, kept_taps=3, group_size=4)
      >>> limits(spec)[:46]
      'computes in bfloat16 and float16, not in float'
    """
    if spec.dtype not in DTYPES:
        return (
            f"computes in {' and '.join(DTYPES)}, not in {spec.dtype}: wgmma takes 32-bit operands "
            f"only with the contracted axis "
            "innermost, and gathered rows have pixels innermost; cast x, or use 'xla'"
        )
    if spec.channel_block % 8 or spec.cin % 8:
        return f"reads channels in aligned runs of 8: channel_block={spec.channel_block} and cin={spec.cin} must be multiples of 8"
    if spec.group_size > LARGEST_GROUP:
        return f"a thread block has at most {LARGEST_GROUP} filters, group_size={spec.group_size}"
    reach = max(max(low, span + high) for span, (low, high) in zip(spec.reach, spec.padding))
    if reach > LARGEST_OFFSET:
        return f"taps lie at most {LARGEST_OFFSET} pixels away: kernel={spec.kernel}, dilation={spec.dilation}, padding={spec.padding}"
    if max(spec.cin, spec.groups * _round_up(spec.group_size, 8)) // 8 >= MOST_RUNS:
        return f"at most {8 * MOST_RUNS - 8} channels: cin={spec.cin}, cout={spec.cout}"
    seen, rows = pixels(spec, "forward"), spec.groups * _round_up(spec.group_size, 8)
    if (
        seen.images * max(spec.cin * math.prod(seen.source), rows * math.prod(seen.output))
        >= 1 << 31
    ):
        return f"counts the values of an array in 31 bits: too many in x {spec.in_shape} or y {spec.out_shape}; use 'xla'"
    return None


def _kernels() -> Any:
    """The kernels, imported when first used: the library must import where JAX has no Mosaic GPU."""
    from pallas_kernels.block_sparse_conv.mosaic_gpu import kernels as mosaic_gpu_kernels

    return mosaic_gpu_kernels


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


def _pad(a: jax.Array, *sizes: int, value: Any = 0) -> jax.Array:
    """Appends `value` up to the sizes."""
    if a.shape == sizes:
        return a
    return jnp.pad(
        a,
        [(0, size - own) for own, size in zip(a.shape, sizes, strict=True)],
        constant_values=value,
    )


def _matrix(activations: jax.Array, images: int, size: tuple[int, int]) -> jax.Array:
    """`[channels, pixels * images]` with padded images."""
    folded = activations.reshape(activations.shape[0], *size, -1)
    return _pad(folded, *folded.shape[:3], images).reshape(activations.shape[0], -1)


def _activations(matrix: jax.Array, size: tuple[int, int], shape: tuple[int, ...]) -> jax.Array:
    """The inverse of `_matrix`."""
    images = math.prod(shape) // (shape[0] * math.prod(size))
    return matrix.reshape(matrix.shape[0], *size, -1)[..., :images].reshape(shape)


def _offsets(spec: ConvSpec, taps: jax.Array) -> list[jax.Array]:
    """From an output pixel (times the stride) to what a tap reads, in pixels: `[y, x]`."""
    places = taps // spec.kernel[1], taps % spec.kernel[1]
    return [
        place * step - low for place, step, (low, _) in zip(places, spec.dilation, spec.padding)
    ]


def _forward_lists(
    spec: ConvSpec, run: int, columns: int, channels: jax.Array, taps: jax.Array
) -> jax.Array:
    """Entries `[groups, n]` of each group, taps before channels, filled up to a multiple of
    `columns` rows with runs past the end.
    """
    y, x = _offsets(spec, taps)
    words = entry(channels[:, None, ::run] // run, y[..., None], x[..., None]).reshape(
        spec.groups, -1
    )
    return _pad(
        words,
        spec.groups,
        _round_up(spec.kept * spec.kept_taps, columns) // run,
        value=-(-spec.cin // run),
    )


def _rows(
    spec: ConvSpec, seen: Pixels, run: int, step: tuple[int, int], spread: tuple[int, int]
) -> Rows:
    return Rows(run, seen.source, seen.output, step, spread, seen.images)


def _run_length(aligned: int, tile: Tile) -> int:
    """Rows in one copy: all that are aligned, but 8 where several pixels share a tile."""
    return math.gcd(aligned, tile.depth) if tile.columns == tile.images else 8


def _forward(
    interpret,
    tile,
    spec: ConvSpec,
    x,
    values,
    filters,
    channels,
    taps,
    scale=None,
    bias=None,
    residual=None,
):
    tile, seen = tile or choose_tile(spec, "forward"), pixels(spec, "forward")
    run = _run_length(spec.channel_block, tile)
    lists = _forward_lists(spec, run, tile.depth, channels, taps)
    depth = lists.shape[1] * run
    weights = values.transpose(0, 3, 2, 1).reshape(spec.groups, spec.group_size, -1)
    y = _kernels().gather_product(
        _rows(spec, seen, run, spec.strides, (1, 1)),
        tile,
        jnp.full((spec.groups,), depth // tile.depth, jnp.int32),
        lists,
        _pad(weights, spec.groups, tile.rows, depth),
        _matrix(x, seen.images, seen.source),
        filters,
        spec.cout,
        scale=None if scale is None else _pad(scale[filters], spec.groups, tile.rows),
        bias=None if bias is None else _pad(bias[filters], spec.groups, tile.rows),
        residual=None if residual is None else _matrix(residual, seen.images, seen.output),
        relu=spec.relu,
        interpret=interpret,
    )
    return _activations(y, seen.output, spec.out_shape)


def _grouped(spec: ConvSpec, dy: jax.Array, filters: jax.Array) -> jax.Array:
    """The rows of dy in the order of the groups; each group filled up to a multiple of 8 with
    zeros.
    """
    group = _round_up(spec.group_size, 8)
    if group == spec.group_size:
        return dy.at[filters.reshape(-1)].get(mode="promise_in_bounds", unique_indices=True)
    index = _pad(filters, spec.groups, group, value=spec.cout)
    return dy.at[index.reshape(-1)].get(mode="fill", fill_value=0)


def _gradient_lists(
    spec: ConvSpec, tile: Tile, run: int, values, channels, taps
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Stages, entries and weights of each (residue, block of input channels): the (group, tap)
    pairs that reach it come first.
    """
    group, blocks, pairs = (
        _round_up(spec.group_size, 8),
        -(-spec.cin // tile.rows),
        spec.groups * spec.kept_taps,
    )
    g = jnp.arange(spec.groups)[:, None]
    at = (
        jnp.full((spec.groups, blocks * tile.rows), -1, jnp.int32)
        .at[g, channels]
        .set(jnp.arange(spec.kept, dtype=jnp.int32))
    )
    at = at.reshape(spec.groups, blocks, tile.rows)  # where a group keeps a channel
    reached = jnp.any(at >= 0, axis=2)
    residues = [
        jnp.arange(stride)[:, None, None] - offset
        for stride, offset in zip(spec.strides, _offsets(spec, taps))
    ]
    fits = [residue % stride == 0 for residue, stride in zip(residues, spec.strides)]
    y, x = (
        jnp.where(fit, residue // stride, 0)
        for residue, fit, stride in zip(residues, fits, spec.strides)
    )
    meets = (
        fits[0][:, None, None] & fits[1][None, :, None] & reached.T[None, None, :, :, None]
    )  # [y, x, block, group, tap]
    meets = meets.reshape(-1, pairs)
    order = jnp.argsort(~meets, axis=1, stable=True)
    counts = -(-meets.sum(1) * group // tile.depth)

    runs = (jnp.arange(spec.groups) * (group // run))[:, None, None] + jnp.arange(group // run)
    words = entry(runs[None, None], y[:, None, ..., None], x[None, :, ..., None])
    words = jnp.broadcast_to(
        words, (*spec.strides, spec.groups, spec.kept_taps, group // run)
    ).reshape(-1, pairs, group // run)
    words = jnp.repeat(words, blocks, axis=0)
    listed = jnp.take_along_axis(meets, order, 1)[..., None]
    words = jnp.where(
        listed, jnp.take_along_axis(words, order[..., None], 1), spec.groups * group // run
    ).reshape(len(order), -1)
    length = _round_up(pairs * group, tile.depth)
    words = _pad(words, len(words), length // run, value=spec.groups * group // run)

    own, tap = order // spec.kept_taps, order % spec.kept_taps
    which = at.swapaxes(0, 1)[jnp.arange(len(order))[:, None] % blocks, own]  # [list, pair, row]
    picked = values[
        own[:, None], jnp.maximum(which, 0).swapaxes(1, 2), tap[:, None]
    ]  # [list, row, pair, filter]
    weights = jnp.where((listed & (which >= 0)).swapaxes(1, 2)[..., None], picked, 0)
    weights = _pad(weights, *weights.shape[:3], group).reshape(len(order), tile.rows, -1)
    return (
        counts.astype(jnp.int32),
        words.astype(jnp.int32),
        _pad(weights, len(order), tile.rows, length),
    )


def _input_gradient(interpret, tile, spec: ConvSpec, dy, values, filters, channels, taps):
    tile, seen = tile or choose_tile(spec, "input_gradient"), pixels(spec, "input_gradient")
    run = _run_length(_round_up(spec.group_size, 8), tile)
    counts, lists, weights = _gradient_lists(spec, tile, run, values, channels, taps)
    dx = _kernels().gather_product(
        _rows(spec, seen, run, (1, 1), spec.strides),
        tile,
        counts,
        lists,
        weights,
        _matrix(_grouped(spec, dy, filters), seen.images, seen.source),
        None,
        spec.cin,
        interpret=interpret,
    )
    return _activations(dx, seen.output, spec.in_shape)


def _weight_gradient(interpret, tile, spec: ConvSpec, x, dy, filters, channels, taps):
    tile, seen = tile or choose_tile(spec, "weight_gradient"), pixels(spec, "weight_gradient")
    run = math.gcd(spec.channel_block, 64)
    parts = _kernels().gather_outer(
        _rows(spec, seen, run, spec.strides, (1, 1)),
        tile,
        _forward_lists(spec, run, tile.columns, channels, taps),
        _matrix(x, seen.images, seen.source),
        _matrix(_grouped(spec, dy, filters), seen.images, seen.output),
        _round_up(spec.group_size, 8),
        interpret=interpret,
    )
    total = parts[:, :, : spec.group_size, : spec.kept_taps * spec.kept].sum(0)
    return total.reshape(spec.groups, spec.group_size, spec.kept_taps, spec.kept).transpose(
        0, 3, 2, 1
    )


def _batched(
    run: Callable, interpret: Any, tile: Tile | None, spec: ConvSpec, *operands: jax.Array | None
) -> jax.Array:
    """A pass; under vmap the examples run one after another."""
    absent = [a is None for a in operands]

    @jax.custom_batching.sequential_vmap
    def whole(*given: jax.Array) -> jax.Array:
        left = iter(given)
        return run(interpret, tile, spec, *(None if gone else next(left) for gone in absent))

    given = [a for a in operands if a is not None]
    result = whole(*given)
    axes = (
        frozenset().union(*(jax.typeof(a).manual_axis_type.varying for a in given))
        - jax.typeof(result).manual_axis_type.varying
    )
    return jax.lax.pcast(result, tuple(axes), to="varying") if axes else result  # inside shard_map


def implementation(interpret: Any = None, tiles: dict[str, Tile] | None = None) -> Implementation:
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

    def supports(spec: ConvSpec) -> str | None:
        return (unavailable() if interpret is None else None) or limits(spec)

    runs = {
        "forward": _forward,
        "input_gradient": _input_gradient,
        "weight_gradient": _weight_gradient,
    }
    passes = {
        name: functools.partial(_batched, run, interpret, (tiles or {}).get(name))
        for name, run in runs.items()
    }
    return Implementation("mosaic_gpu", supports, **passes, fused=True)


IMPLEMENTATION = implementation()
