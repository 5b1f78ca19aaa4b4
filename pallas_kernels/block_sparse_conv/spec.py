"""What a block-sparse convolution is (`ConvSpec`) and what runs it (`Implementation`)."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax

Pair = tuple[int, int]
Shape = tuple[int, int, int, int]

PASSES = ("forward", "input_gradient", "weight_gradient")
"""The three passes of a convolution: the fields of an `Implementation` that run them."""
NORM_PASSES = ("forward_with_sums", "norm_input_gradient")
"""The passes between batch norms, fields of an `Implementation` that has them."""
NO_PADDING = ((0, 0), (0, 0))


@dataclasses.dataclass(frozen=True)
class ConvSpec:
    """The static sizes of one block-sparse convolution; hashable, the key of every choice.

    Attributes:
      cin: input channels.
      height, width: input size in pixels.
      batch: images; a symbolic dimension in `jax.export` of a symbolic batch.
      kernel: `(kh, kw)`.
      cout: output channels, `groups * group_size`.
      groups, kept, kept_taps, group_size: the shape of the packed values.
      strides: step in pixels `(y, x)`.
      padding: zeros around the image in pixels `((top, bottom), (left, right))`.
      dilation: distance between taps in pixels `(y, x)`.
      dtype: name of the activations' dtype.
      channel_block: channels come in aligned runs of this many.
      precision: as in `jax.lax.dot_general`.
      gradients: whether the gradients follow in the same program (the passes then share gathered
        rows).
      relu: whether the forward pass ends in `max(y, 0)`; between batch norms, whether the norm of
        the input does.

    Example:
      >>> spec = ConvSpec(cin=8, height=5, width=5, batch=2, kernel=(3, 3), cout=8, groups=2,
      ...                 kept=4, kept_taps=3, group_size=4)
      >>> spec.out_height, spec.density
      (3, 0.16666666666666666)
    """

    cin: int
    height: int
    width: int
    batch: int
    kernel: Pair
    cout: int
    groups: int
    kept: int
    kept_taps: int
    group_size: int
    strides: Pair = (1, 1)
    padding: tuple[Pair, Pair] = NO_PADDING
    dilation: Pair = (1, 1)
    dtype: str = "float32"
    channel_block: int = 1
    precision: Any = None
    gradients: bool = False
    relu: bool = False

    @property
    def has_known_batch(self) -> bool:
        """Whether the number of images is a number, and not a symbolic dimension."""
        return isinstance(self.batch, int)

    @property
    def reach(self) -> Pair:
        """Offset of the last tap, `(kernel - 1) * dilation`, in pixels."""
        return (self.kernel[0] - 1) * self.dilation[0], (self.kernel[1] - 1) * self.dilation[1]

    @property
    def out_height(self) -> int:
        """Height of the output in pixels (below 1: the kernel does not fit)."""
        return (self.height + sum(self.padding[0]) - self.reach[0] - 1) // self.strides[0] + 1

    @property
    def out_width(self) -> int:
        """Width of the output in pixels (below 1: the kernel does not fit)."""
        return (self.width + sum(self.padding[1]) - self.reach[1] - 1) // self.strides[1] + 1

    @property
    def in_size(self) -> Pair:
        """Height and width of the input in pixels."""
        return self.height, self.width

    @property
    def out_size(self) -> Pair:
        """Height and width of the output in pixels."""
        return self.out_height, self.out_width

    @property
    def in_shape(self) -> Shape:
        """Shape of the input `(cin, h, w, n)`."""
        return self.cin, self.height, self.width, self.batch

    @property
    def out_shape(self) -> Shape:
        """Shape of the output `(cout, ho, wo, n)`."""
        return self.cout, self.out_height, self.out_width, self.batch

    @property
    def kernel_shape(self) -> Shape:
        """Shape of the dense conv kernel `(kh, kw, cin, cout)`."""
        return *self.kernel, self.cin, self.cout

    @property
    def packed_shape(self) -> Shape:
        """Shape of the packed values `(groups, kept, kept_taps, group_size)`."""
        return self.groups, self.kept, self.kept_taps, self.group_size

    @property
    def density(self) -> float:
        """Fraction of the conv kernel's weights that are kept."""
        return math.prod(self.packed_shape) / math.prod(self.kernel_shape)

    def pointwise(self) -> "ConvSpec | None":
        """The same 1x1 convolution on just the pixels that it reads: without strides and padding.

        Returns:
          Its static sizes; None for larger kernels, and where all pixels are read already.

        Example:
          >>> spec = ConvSpec(cin=8, height=5, width=5, batch=3, kernel=(1, 1), cout=8, groups=2,
          ...                 kept=4, kept_taps=1, group_size=4, strides=(2, 2))
          >>> spec.pointwise().in_shape
          (8, 3, 3, 3)
        """
        if self.kernel != (1, 1):
            return None
        plain = dataclasses.replace(
            self,
            height=self.out_height,
            width=self.out_width,
            strides=(1, 1),
            padding=NO_PADDING,
        )
        return plain if plain != self else None


Pass = Callable[..., jax.Array]
NormPass = Callable[..., tuple[jax.Array, ...]]


@dataclasses.dataclass(frozen=True)
class Implementation:
    """One way to run the convolution: three passes, each doing only the kept work.

    Attributes:
      name: what the caller writes.
      supports: `spec -> None`, or the reason why it cannot run that spec on this machine.
      forward: `(spec, x, values, filters, channels, taps) -> y`; where `fused`, it takes `scale`,
        `bias` and `residual` after them.
      input_gradient: `(spec, dy, values, filters, channels, taps) -> dx`.
      weight_gradient: `(spec, x, dy, filters, channels, taps) -> dvalues`, float32.
      fused: whether `forward` takes `scale`, `bias` (float32 `[cout]`) and `residual` (as y), each
        of which may be None, and honours `spec.relu`: `y = relu(scale * conv + bias + residual)` in
        one pass over memory. Where it is False, XLA's operations follow the forward pass.
      plans: the passes that take `plan=`, a `Plan` that fits the spec, from callers that have one.
      forward_with_sums: `(spec, x, values, filters, channels, taps) -> (y, sums)`, float32 sums
        `[2, cout]` of y and of its squares over each channel. Where it and the next are None, the
        passes between batch norms are made of the others and XLA's operations.
      norm_input_gradient: `(spec, dy, values, filters, channels, taps, z, scale, shift, joined,
        more) -> (dz, sums, g)` where `x = relu(scale * z + shift + shortcut)` is the convolution's
        input: as `batch_norm.masked_gradient` of `input_gradient(...) + more`. `more` may be None;
        so may `joined`, the stored x, where no shortcut was added, and then there is no g.
      normalises: whether it is faster in a convolution to normalise x while it is loaded than to
        store the normalised x: `forward_with_sums` and `weight_gradient` then take a raw x, and
        float32 `scale` and `shift` `[cin]` after their operands, and read `scale * x + shift`, with
        a ReLU where `spec.relu`. None: they take no norm.
    """

    name: str
    supports: Callable[[ConvSpec], str | None]
    forward: Pass
    input_gradient: Pass
    weight_gradient: Pass
    fused: bool = False
    plans: tuple[str, ...] = ()
    forward_with_sums: NormPass | None = None
    norm_input_gradient: NormPass | None = None
    normalises: Callable[[ConvSpec], bool] | None = None

    @property
    def fuses_norms(self) -> bool:
        """Whether it has the passes between batch norms."""
        return self.forward_with_sums is not None and self.norm_input_gradient is not None

    def run(
        self, pass_name: str, spec: ConvSpec, *operands: jax.Array | None, plan: Any = None
    ) -> Any:
        """Runs a pass, with the plan where it reads one.

        Args:
          pass_name: one of `PASSES` or `NORM_PASSES`.
          spec: the static sizes.
          *operands: of the pass.
          plan: the lists of the layout, or None.

        Returns:
          The pass's result, or results.

        Example:
          >>> passes = dict.fromkeys(PASSES, lambda spec, *operands, **options: len(options))
          >>> reader = Implementation("a", lambda spec: None, plans=("forward",), **passes)
          >>> [reader.run(name, None, plan="lists") for name in PASSES]
          [1, 0, 0]
        """
        options = {"plan": plan} if plan is not None and pass_name in self.plans else {}
        return getattr(self, pass_name)(spec, *operands, **options)
