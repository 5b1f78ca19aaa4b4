"""Tiles of the Triton kernels: what a tuner may time, what runs where nothing was timed, and the
way of the input gradient by cost.
"""

import dataclasses
import functools
import itertools
import json
import math

import jax

from pallas_kernels.block_sparse_conv.devices import table, this_gpu
from pallas_kernels.block_sparse_conv.spec import ConvSpec
from pallas_kernels.block_sparse_conv.triton.limits import Tile, fits, itemsize, smaller, wide

PASSES = ("forward", "input_gradient", "weight_gradient")
METHODS = ("transposed", "scatter", "dense")  # of the input gradient
PROGRAMS = 132  # at once on an H200, one on each multiprocessor
PARTIALS = 16 << 20  # bytes of partial weight gradients: few enough to stay in the L2 cache
# Estimates until a GPU has measured them: FLOP/s, and bytes/s of memory, of rows gathered from L2,
# of float32 sums into memory.
RATES = {
    "half": 790e12,
    "tf32": 395e12,
    "ieee": 50e12,
    "memory": 4.3e12,
    "gather": 5.5e12,
    "add": 1.4e12,
}
REACHED = {"transposed": 0.6, "scatter": 0.6, "dense": 0.75}  # of those limits
TF32 = (
    "default",
    "fastest",
    "bfloat16",
    "high",
    "tensorfloat32",
    "bfloat16_3x",
    "tf32",
    "tf32_tf32_f32",
)


@dataclasses.dataclass(frozen=True)
class Product:
    """The matrix products of a pass: for each group (as a table: on average) `members x depth`
    times `depth x positions`.
    """

    groups: int
    members: int
    depth: int
    positions: int


def arithmetic(spec: ConvSpec) -> str:
    """How a spec multiplies: "half" (bfloat16, float16), "ieee" (true float32) or "tf32", which
    only the precision can allow.

    Args:
      spec: the static sizes; a precision of None means `jax_default_matmul_precision`, and if that
        is None too, true float32.

    Returns:
      The name.

    Example:
      >>> spec = ConvSpec(cin=8, height=5, width=5, batch=2, kernel=(3, 3), cout=8, groups=2, kept=4, kept_taps=3, group_size=4)
      >>> arithmetic(spec), arithmetic(dataclasses.replace(spec, precision="high"))
      ('ieee', 'tf32')
    """
    if spec.dtype in ("bfloat16", "float16"):
        return "half"
    precision = (
        jax.config.jax_default_matmul_precision if spec.precision is None else spec.precision
    )
    pair = precision if isinstance(precision, tuple) else (precision,)
    return "tf32" if all(str(getattr(p, "name", p)).lower() in TF32 for p in pair) else "ieee"


def normal(spec: ConvSpec) -> ConvSpec:
    """The convolution that the kernels run: 1x1 without a step or padding as one long image row,
    rows a multiple of 16 bytes.

    Args:
      spec: the static sizes.

    Returns:
      The same convolution on reshaped and padded activations; its precision is the name of the
      arithmetic.

    Example:
      >>> spec = ConvSpec(cin=8, height=5, width=5, batch=3, kernel=(1, 1), cout=8, groups=2, kept=4, kept_taps=1, group_size=4)
      >>> normal(spec).in_shape
      (8, 1, 1, 76)
    """
    height, width, batch = spec.in_shape[1:]
    if (spec.kernel, spec.strides, spec.padding) == ((1, 1), (1, 1), ((0, 0), (0, 0))):
        height, width, batch = 1, 1, height * width * batch
    vector = 16 // itemsize(spec)
    return dataclasses.replace(
        spec,
        height=height,
        width=width,
        batch=-(-batch // vector) * vector,
        precision=arithmetic(spec),
        relu=False,
        gradients=False,
    )


def pointwise(spec: ConvSpec) -> ConvSpec | None:
    """The same 1x1 convolution of just the pixels that it reads.

    Args:
      spec: the static sizes.

    Returns:
      Its static sizes; None where it is no 1x1 convolution or reads all pixels.

    Example:
      >>> spec = ConvSpec(cin=8, height=5, width=5, batch=3, kernel=(1, 1), cout=8, groups=2, kept=4, kept_taps=1, group_size=4,
      ...                 strides=(2, 2))
      >>> pointwise(spec).in_shape
      (8, 3, 3, 3)
    """
    plain = dataclasses.replace(
        spec, height=spec.out_height, width=spec.out_width, strides=(1, 1), padding=((0, 0), (0, 0))
    )
    return plain if spec.kernel == (1, 1) and plain != spec else None


def _served(spec: ConvSpec, pass_name: str) -> ConvSpec:
    """What a pass computes: the input gradient of a 1x1 convolution leaves out the pixels that
    nobody reads.
    """
    return pointwise(spec) or spec if pass_name == "input_gradient" else spec


def product(spec: ConvSpec, pass_name: str, method: str = "") -> Product:
    """The products of a pass.

    Args:
      spec: a normal spec.
      pass_name: one of `PASSES`.
      method: of the input gradient.

    Returns:
      Their sizes.
    """
    if pass_name != "input_gradient":
        return Product(
            spec.groups, spec.group_size, spec.kept * spec.kept_taps, math.prod(spec.out_shape[1:])
        )
    each, positions = spec.kept_taps * spec.group_size, math.prod(spec.in_shape[1:])
    if method == "scatter":
        return Product(spec.groups, spec.kept, each, positions)
    blocks = spec.cin // spec.channel_block
    return Product(
        blocks, spec.channel_block, max(1, spec.groups * spec.kept * each // spec.cin), positions
    )


def _power(size: int, low: int, high: int) -> int:
    """The power of two that holds a size, within bounds."""
    return min(high, max(low, 1 << (size - 1).bit_length()))


def _rows(members: int, arithmetic: str) -> int:
    """The tile of the rows with the least padding; half as wide costs the gathered rows once more.

    tf32 stays below the 64 of wgmma, which takes float32 only transposed: its rows would be copied
    4 bytes at a time.
    """
    high = {"half": 128, "ieee": 64, "tf32": 32}[arithmetic]
    return min(
        (r for r in (16, 32, 64, 128) if r <= high), key=lambda r: -(-members // r) * (r + 32)
    )


def _splits(tile: Tile, p: Product) -> int:
    """Shares of the positions: two programs for each multiprocessor, at least four steps each, the
    partial sums in the L2 cache.
    """
    programs = p.groups * -(-p.members // tile.rows) * -(-p.depth // tile.depth)
    steps = -(-p.positions // tile.positions)
    most = min(steps // 4, PARTIALS // (4 * p.groups * p.members * p.depth))
    return max(1, min(-(-2 * PROGRAMS // programs), most))


def candidate_tiles(spec: ConvSpec, pass_name: str, capability: int = 90) -> list[Tile]:
    """The tiles that a tuner times for a pass; the input gradient's of every method that serves the
    spec.

    Args:
      spec: the static sizes.
      pass_name: one of `PASSES`.
      capability: of the GPU, times ten.

    Returns:
      Tiles that fit in shared memory and registers.

    Example:
      >>> spec = ConvSpec(cin=64, height=8, width=8, batch=128, kernel=(3, 3), cout=64, groups=1, kept=19, kept_taps=3,
      ...                 group_size=64, dtype="bfloat16")
      >>> Tile(64, 128, 64) in candidate_tiles(spec, "forward")
      True
    """
    plain, found = normal(_served(spec, pass_name)), []
    for method in methods(spec) if pass_name == "input_gradient" else ("",):
        if method == "dense":
            found.append(Tile(0, 0, 0, method=method))
            continue
        base = _heuristic(plain, pass_name, method, capability)
        if pass_name == "weight_gradient":
            steps, depths = (
                (32, 64, 128) if wide(plain, capability) else (32, 64),
                (64,) if plain.precision == "ieee" else (64, 128),
            )
            shapes = [
                (base.rows, positions, depth, False) for positions in steps for depth in depths
            ]
        else:
            shapes = [
                (base.rows, positions, depth, base.positions_first)
                for positions in (64, 128, 256)
                for depth in (32, 64)
            ]
        for rows, positions, depth, first in shapes:
            if plain.precision != "half":
                depth, positions = (
                    (depth, positions // 2)
                    if pass_name == "weight_gradient"
                    else (depth // 2, positions)
                )
            eight = rows * (depth if pass_name == "weight_gradient" else positions) > (
                4096 if plain.precision == "half" else 8192
            )
            for warps, stages in itertools.product(
                (4, 8) if eight else (4,), (3, 4) if capability >= 90 else (2, 3)
            ):
                tile = Tile(rows, positions, depth, warps, stages, first, method=method)
                if pass_name == "weight_gradient":
                    tile = dataclasses.replace(
                        tile, splits=_splits(tile, product(plain, pass_name))
                    )
                if fits(tile, pass_name, plain, capability):
                    found.append(tile)
    return found


def choose_tile(spec: ConvSpec, pass_name: str, capability: int = 90, method: str = "") -> Tile:
    """The tile of a pass: as tuned on this GPU, else by a rule.

    Args:
      spec: the static sizes.
      pass_name: one of `PASSES`.
      capability: of the GPU, times ten.
      method: of the input gradient; "": the tuned one, else the cheapest by estimate.

    Returns:
      The tile.

    Example:
      >>> spec = ConvSpec(cin=64, height=8, width=8, batch=256, kernel=(3, 3), cout=64, groups=2, kept=19, kept_taps=3,
      ...                 group_size=32, dtype="bfloat16")
      >>> choose_tile(spec, "forward")
      Tile(rows=32, positions=128, depth=64, warps=4, stages=2, positions_first=True, splits=1, method='')
    """
    spec = _served(spec, pass_name)
    plain = normal(spec)
    best = _tuned(this_gpu()).get(key(spec, pass_name))
    if best and method in ("", best.method):
        return best
    if pass_name == "input_gradient" and not method:
        method = min(methods(spec), key=functools.partial(cost, spec))
    return (
        Tile(0, 0, 0, method=method)
        if method == "dense"
        else _heuristic(plain, pass_name, method, capability)
    )


def _heuristic(spec: ConvSpec, pass_name: str, method: str, capability: int) -> Tile:
    """The rule: enough programs, little padding, two programs' loads in a multiprocessor's shared
    memory.
    """
    p, half = product(spec, pass_name, method), spec.precision == "half"
    rows = _rows(p.members, spec.precision)
    if pass_name == "weight_gradient":
        tile = Tile(rows, 64 if half else 32, _power(p.depth, 64, 128 if half else 64))
    else:
        depth = 64 if half else 32
        if -(-p.depth // depth) * depth > 1.1 * -(-p.depth // (depth // 2)) * (depth // 2):
            depth //= 2
        positions = 128
        while (
            positions > 64
            and p.groups * -(-p.members // rows) * -(-p.positions // positions) < PROGRAMS
        ):
            positions //= 2
        steps = -(-p.depth // depth)
        tile = Tile(rows, positions, depth, stages=min(4, max(2, steps)), method=method)
        tile = dataclasses.replace(tile, positions_first=rows < 64 and wide(spec, capability))
    if tile.rows == 128:
        tile = dataclasses.replace(tile, warps=8)
    while not fits(tile, pass_name, spec, capability):
        tile = smaller(tile, pass_name, spec, capability)
    return (
        dataclasses.replace(tile, splits=_splits(tile, p))
        if pass_name == "weight_gradient"
        else tile
    )


def methods(spec: ConvSpec) -> tuple[str, ...]:
    """The ways of the input gradient that serve a spec: the transposed table takes runs of
    channels, at least half a tile of 16.

    Args:
      spec: the static sizes.

    Returns:
      Of `METHODS`.
    """
    return METHODS if spec.channel_block >= 8 else METHODS[1:]


def cost(spec: ConvSpec, method: str) -> float:
    """An estimate of the input gradient's time in seconds, from `RATES`: none of them is measured
    yet.

    Args:
      spec: the static sizes.
      method: one of `METHODS`.

    Returns:
      Seconds.

    Example:
      >>> spec = ConvSpec(cin=64, height=8, width=8, batch=128, kernel=(3, 3), cout=64, groups=2, kept=64, kept_taps=9,
      ...                 group_size=32, dtype="bfloat16")
      >>> cost(spec, "dense") < cost(spec, "scatter")
      True
    """
    spec = normal(spec)
    size, flops = itemsize(spec), RATES[spec.precision]
    memory = size * (math.prod(spec.in_shape) + math.prod(spec.out_shape)) / RATES["memory"]
    if method == "dense":
        work = 2 * math.prod(spec.kernel) * spec.cin * math.prod(spec.out_shape)
        return (
            max(work / flops, memory) / REACHED[method] + 2 * memory
        )  # cuDNN's layout: both activations are transposed
    p = product(spec, "input_gradient", method)
    rows = _rows(p.members, spec.precision)
    tiles = p.groups * -(-p.members // rows)
    gather = size * tiles * p.depth * p.positions / RATES["gather"]
    work = 2 * tiles * rows * p.depth * p.positions / flops
    time = max(work, gather, memory) / REACHED[method]
    if method == "scatter":  # the sums, the zeros under them, and the cast of the result
        time += (
            4 * p.groups * p.members * p.positions / RATES["add"]
            + 8 * math.prod(spec.in_shape) / RATES["memory"]
        )
    return time


def key(spec: ConvSpec, pass_name: str) -> str:
    """What a tuned tile is found by.

    Args:
      spec: the static sizes.
      pass_name: one of `PASSES`.

    Returns:
      The pass, the sizes, the dtype and the arithmetic.
    """
    spec = _served(spec, pass_name)
    geometry = (
        *spec.in_shape,
        *spec.kernel,
        spec.cout,
        *spec.strides,
        *spec.dilation,
        *spec.padding[0],
        *spec.padding[1],
    )
    numbers = (
        "x".join(map(str, sizes)) for sizes in (geometry, spec.packed_shape, (spec.channel_block,))
    )
    return " ".join((pass_name, *numbers, spec.dtype, arithmetic(spec)))


@functools.cache
def _tuned(gpu: str | None) -> dict[str, Tile]:
    """The tiles that were tuned on a GPU, by `key`; none without a table."""
    path = table("triton", gpu)
    return (
        {name: Tile(**fields) for name, fields in json.loads(path.read_text())["tiles"].items()}
        if path.is_file()
        else {}
    )
