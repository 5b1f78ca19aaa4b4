"""Which pixels and rows the Mosaic GPU kernels read and write."""

import dataclasses
import math

import jax

from pallas_kernels.block_sparse_conv.spec import NO_PADDING, ConvSpec, Pair
from pallas_kernels.padding import round_up

CHUNK = 64
"""Images in one 128-byte swizzled row of 16-bit values: the batch is padded to a multiple of it."""


@dataclasses.dataclass(frozen=True)
class Gather:
    """Where the rows of a product come from, and where its results go.

    There is one *phase* for each residue of the output pixels modulo `write_stride`. The pixel q of
    a phase reads the source at `q * read_stride + offset`, and is written at `q * write_stride +
    phase`.

    Attributes:
      run: source rows in one entry of a list.
      source: height and width of the source in pixels.
      output: height and width of the output in pixels.
      read_stride: `(y, x)`, the strides of a forward pass; (1, 1) in an input gradient.
      write_stride: `(y, x)`, the strides of the forward pass whose input gradient this is; else
        (1, 1).
      images: images, a multiple of `CHUNK`.
    """

    run: int
    source: Pair
    output: Pair
    read_stride: Pair
    write_stride: Pair
    images: int

    @property
    def phases(self) -> int:
        """How many phases there are."""
        return math.prod(self.write_stride)

    @property
    def phase_size(self) -> Pair:
        """Height and width of a phase in pixels (the last ones may lie outside the output)."""
        return (
            -(-self.output[0] // self.write_stride[0]),
            -(-self.output[1] // self.write_stride[1]),
        )

    @property
    def beyond(self) -> int:
        """The first column after the end of the source."""
        return math.prod(self.source) * self.images


def entry(run: jax.Array, offset_y: jax.Array, offset_x: jax.Array) -> jax.Array:
    """Packs the entry of a list.

    It holds the number of the run in 16 bits and the offsets in 8 bits each, signed.

    Args:
      run: number of the run of rows.
      offset_y, offset_x: from the output pixel (times the read stride) to the pixel that is read.

    Returns:
      int32, of the arguments' common shape.

    Example:
      >>> [hex(entry(5, y, 1)) for y in (-1, 2)]
      ['0x17f0005', '0x1820005']
    """
    return run | (offset_y + 128) << 16 | offset_x << 24


@dataclasses.dataclass(frozen=True)
class Pixels:
    """The sizes of a pass's activations.

    A 1x1 convolution over whole images has one pixel and many images.

    Attributes:
      source: height and width in pixels of what is read: x, or dy in the input gradient.
      output: height and width of what is written (weight gradient: as forward).
      images: images, padded to a multiple of `CHUNK`.
    """

    source: Pair
    output: Pair
    images: int


def pixels(spec: ConvSpec, pass_name: str) -> Pixels:
    """The sizes that the kernels of a pass work on.

    Args:
      spec: the static sizes.
      pass_name: one of `PASSES`.

    Returns:
      The sizes, images padded.

    Example:
      >>> spec = ConvSpec(cin=8, height=5, width=5, batch=2, kernel=(1, 1), cout=8, groups=1,
      ...                 kept=8, kept_taps=1, group_size=8)
      >>> pixels(spec, "forward")
      Pixels(source=(1, 1), output=(1, 1), images=64)
    """
    in_size, out_size, images = spec.in_size, spec.out_size, spec.batch
    if (spec.kernel, spec.strides, spec.padding) == ((1, 1), (1, 1), NO_PADDING):
        images *= math.prod(in_size)
        in_size = out_size = (1, 1)
    images = round_up(images, CHUNK)
    if pass_name == "input_gradient":
        return Pixels(out_size, in_size, images)
    return Pixels(in_size, out_size, images)
