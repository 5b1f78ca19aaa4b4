"""Sizes of the Mosaic GPU kernels: geometry, and tiles: what can be chosen, and what is where
nothing was tuned.
"""

import dataclasses
import functools
import json
import math

import jax

from pallas_kernels.block_sparse_conv.devices import table, this_gpu
from pallas_kernels.block_sparse_conv.spec import ConvSpec

PASSES = ("forward", "input_gradient", "weight_gradient")
SHARED_MEMORY = 232_448 - 2_048
"""Bytes of shared memory that one block may use on compute capability 9.0, less room for the barriers and alignment."""
MULTIPROCESSORS = 132
"""Of an H100 SXM and an H200."""
CHUNK = 64
"""Images in one 128-byte swizzled row of 16-bit values: the batch is padded to a multiple of this."""


@dataclasses.dataclass(frozen=True)
class Tile:
    """The work of one thread block.

    Attributes:
      rows: rows of the product, 64 or 128: filters (forward, weight gradient) or input channels
        (input gradient), padded with zeros.
      columns: columns of the product: output values (pixels times images), or gathered rows (weight
        gradient).
      images: images that one copy brings; `columns // images` pixels make a tile (weight gradient:
        the images of one step).
      depth: how much of the contracted axis one pipeline stage holds.
      stages: pipeline stages in shared memory.
      consumers: warpgroups that multiply, each a share of the columns; one more only copies.
      splits: shares of the pixels that are summed separately (weight gradient).
    """

    rows: int
    columns: int
    images: int
    depth: int = 64
    stages: int = 4
    consumers: int = 2
    splits: int = 1


@dataclasses.dataclass(frozen=True)
class Rows:
    """Where the rows of a product come from and go to.

    An output pixel q of a phase reads the source at `q * step + offset` and is written at `q *
    spread + phase`.

    Attributes:
      run: source rows in one entry of a list.
      source: height and width of the source in pixels.
      output: height and width of the output in pixels.
      step: `(y, x)`, the stride of a forward pass.
      spread: `(y, x)`, the stride of the forward pass whose gradient this is; there is one phase
        for each of its residues.
      images: images.
    """

    run: int
    source: tuple[int, int]
    output: tuple[int, int]
    step: tuple[int, int]
    spread: tuple[int, int]
    images: int

    @property
    def phases(self) -> int:
        """How many residues of the output pixels there are."""
        return math.prod(self.spread)

    @property
    def phase_size(self) -> tuple[int, int]:
        """Height and width of a phase in pixels (the last ones may lie outside the output)."""
        return -(-self.output[0] // self.spread[0]), -(-self.output[1] // self.spread[1])

    @property
    def beyond(self) -> int:
        """The first column after the end of the source."""
        return math.prod(self.source) * self.images


def entry(run: jax.Array, offset_y: jax.Array, offset_x: jax.Array) -> jax.Array:
    """Packs the entry of a list: number of the run (16 bits), offsets in pixels (8 bits each,
    signed).

    Args:
      run: number of the run of rows.
      offset_y, offset_x: from the output pixel (times the step) to what is read.

    Returns:
      int32, of the arguments' common shape.

    Example:
      >>> [hex(entry(5, y, 1)) for y in (-1, 2)]
      ['0x17f0005', '0x1820005']
    """
    return run | (offset_y + 128) << 16 | offset_x << 24


@dataclasses.dataclass(frozen=True)
class Pixels:
    """How a pass sees the activations: a 1x1 convolution over whole images has one pixel and many
    images.

    Attributes:
      source: height and width in pixels of what is read: x, or dy in the input gradient.
      output: height and width of what is written (weight gradient: as forward).
      images: images, padded to a multiple of `CHUNK`.
    """

    source: tuple[int, int]
    output: tuple[int, int]
    images: int


def pixels(spec: ConvSpec, pass_name: str) -> Pixels:
    """The sizes that the kernels of a pass see.

    Args:
      spec: the static sizes.
      pass_name: one of `PASSES`.

    Returns:
      The sizes, images padded.

    Example:
      >>> spec = ConvSpec(cin=8, height=5, width=5, batch=2, kernel=(1, 1), cout=8, groups=1, kept=8, kept_taps=1, group_size=8)
      >>> pixels(spec, "forward")
      Pixels(source=(1, 1), output=(1, 1), images=64)
    """
    inner, outer = spec.in_shape, spec.out_shape
    if spec.kernel == (1, 1) and spec.strides == (1, 1) and spec.padding == ((0, 0), (0, 0)):
        inner = outer = (1, 1, 1, math.prod(spec.in_shape[1:]))
    source, output = (outer, inner) if pass_name == "input_gradient" else (inner, outer)
    return Pixels(source[1:3], output[1:3], -(-inner[3] // CHUNK) * CHUNK)


def shared_memory(tile: Tile, pass_name: str, itemsize: int = 2) -> int:
    """Bytes of shared memory of a tile: the pipeline stages and the staged result.

    Args:
      tile: the tile.
      pass_name: one of `PASSES`.
      itemsize: bytes of an activation.

    Returns:
      The bytes, barriers left out.

    Example:
      >>> shared_memory(Tile(64, 256, 256), "input_gradient")
      196608
    """
    pad = tile.columns // 64 * 8 if pass_name == "forward" else 0
    staged = 0 if pass_name == "weight_gradient" else tile.rows * (tile.columns + pad)
    return itemsize * (tile.stages * tile.depth * (tile.rows + tile.columns) + staged)


def _stages(tile: Tile, pass_name: str) -> Tile:
    """The tile with as many stages as fit, at most 6."""
    fitting = [
        s
        for s in range(2, 7)
        if shared_memory(dataclasses.replace(tile, stages=s), pass_name) <= SHARED_MEMORY
    ]
    return dataclasses.replace(tile, stages=max(fitting))


def _splits(blocks: int, steps: int) -> int:
    """Shares of the pixels that fill the multiprocessors in few whole waves and leave each at least
    8 steps.
    """
    most = max(1, min(steps // 8, 4 * MULTIPROCESSORS // blocks))

    def idle(splits: int) -> float:
        waves = -(-blocks * splits // MULTIPROCESSORS)
        return waves * MULTIPROCESSORS / (blocks * splits) + 0.02 * waves

    return min(range(1, most + 1), key=idle)


def candidate_tiles(spec: ConvSpec, pass_name: str) -> list[Tile]:
    """The tiles worth timing for a pass of a convolution, the default among them.

    Args:
      spec: the static sizes.
      pass_name: one of `PASSES`.

    Returns:
      The tiles; all fit in shared memory and registers.

    Example:
      >>> spec = ConvSpec(cin=64, height=8, width=8, batch=128, kernel=(3, 3), cout=64, groups=2, kept=16, kept_taps=3, group_size=32)
      >>> [(tile.rows, tile.columns, tile.images) for tile in candidate_tiles(spec, "forward")]
      [(64, 64, 64), (64, 128, 128), (64, 256, 128)]
    """
    seen = pixels(spec, pass_name)
    images = [size for size in (64, 128, 256) if seen.images % size == 0]
    if pass_name == "weight_gradient":
        return _weight_gradient_tiles(spec, seen)
    rows = [128 if spec.group_size > 64 else 64]
    if pass_name == "input_gradient":
        rows = [64, 128] if spec.cin > 64 else [64]
    tiles = []
    for height in rows:
        for columns in (64, 128, 256):
            width = max(size for size in images if size <= columns)
            plain = Tile(height, columns, width, consumers=min(2, columns // 64))
            depths = (
                (64, 128)
                if (height, columns) == (64, 128) and pass_name == "input_gradient"
                else (64,)
            )
            tiles += [
                _stages(dataclasses.replace(plain, depth=depth), pass_name) for depth in depths
            ]
    return tiles


def _weight_gradient_tiles(spec: ConvSpec, seen: Pixels) -> list[Tile]:
    rows = 128 if spec.group_size > 64 else 64
    gathered = spec.kept * spec.kept_taps
    tiles = []
    for columns in (64, 128, 256):
        if columns > 64 and columns >= 2 * gathered:
            break
        for images in (64, 128):
            if seen.images % images:
                continue
            blocks, steps = (
                spec.groups * -(-gathered // columns),
                math.prod(seen.output) * seen.images // images,
            )
            tile = Tile(
                rows,
                columns,
                images,
                depth=images,
                consumers=min(2, columns // 64),
                splits=_splits(blocks, steps),
            )
            tiles.append(_stages(tile, "weight_gradient"))
    return tiles


@functools.cache
def _tuned(gpu: str | None) -> dict[str, Tile]:
    """The tiles that were tuned on a GPU, by `key`; none without a table."""
    path = table("mosaic_gpu", gpu)
    return (
        {name: Tile(**fields) for name, fields in json.loads(path.read_text())["entries"].items()}
        if path.is_file()
        else {}
    )


def key(spec: ConvSpec, pass_name: str) -> str:
    """What the tuned table calls a pass of a convolution.

    Args:
      spec: the static sizes.
      pass_name: one of `PASSES`.

    Returns:
      One line; equal for convolutions with the same kernels.

    Example:
      >>> spec = ConvSpec(cin=8, height=5, width=5, batch=2, kernel=(3, 3), cout=8, groups=2, kept=4, kept_taps=3, group_size=4)
      >>> key(spec, "forward")
      'forward 8x5x5x2 3x3/1x1/1x1 0x0x0x0 2x4x3x4 block 1'
    """
    kernel = "/".join(map(_by, (spec.kernel, spec.strides, spec.dilation)))
    padding = _by((*spec.padding[0], *spec.padding[1]))
    return f"{pass_name} {_by(spec.in_shape)} {kernel} {padding} {_by(spec.packed_shape)} block {spec.channel_block}"


def _by(sizes: tuple[int, ...]) -> str:
    return "x".join(map(str, sizes))


def choose_tile(spec: ConvSpec, pass_name: str) -> Tile:
    """The tile of a pass: the tuned one where the table has the shape, else by rule.

    The rule: the gathered rows are read again for every block of output rows, and the weights for
    every tile of columns, so large tiles read least; but every multiprocessor should have two tiles
    or more.

    Args:
      spec: the static sizes.
      pass_name: one of `PASSES`.

    Returns:
      The tile.

    Example:
      >>> spec = ConvSpec(cin=64, height=8, width=8, batch=128, kernel=(3, 3), cout=64, groups=2, kept=16, kept_taps=3, group_size=32)
      >>> choose_tile(spec, "forward").columns
      64
    """
    if tile := _tuned(this_gpu()).get(key(spec, pass_name)):
        return tile
    candidates = candidate_tiles(spec, pass_name)
    if pass_name == "weight_gradient":
        fewest = min(-(-spec.kept * spec.kept_taps // tile.columns) for tile in candidates)
        wide = [
            tile for tile in candidates if -(-spec.kept * spec.kept_taps // tile.columns) == fewest
        ]
        least = min(tile.columns for tile in wide)
        return max(
            (tile for tile in wide if tile.columns == least),
            key=lambda tile: tile.depth * (tile.stages >= 3),
        )
    seen = pixels(spec, pass_name)
    values = math.prod(seen.output) * seen.images

    def filled(tile: Tile) -> bool:
        blocks = spec.groups if pass_name == "forward" else -(-spec.cin // tile.rows)
        return blocks * values >= 2 * MULTIPROCESSORS * tile.columns

    order = sorted(candidates, key=lambda tile: (tile.rows * tile.columns, tile.rows, -tile.depth))
    return next((tile for tile in reversed(order) if filled(tile)), order[0])
