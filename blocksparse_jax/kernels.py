"""Kernels in leaves of any rank: dense kernels are those of 1x1 convolutions, stacks hold several.

| leaf | holds |
|---|---|
| `[kh, kw, cin, cout]` | a conv kernel |
| `[cin, cout]` | the kernel of a dense layer, which is a 1x1 convolution of its rows |
| `[layers, kh, kw, cin, cout]`, or more axes in front | stacked conv kernels, each by itself |

Three axes are no kernel of these: `[k, cin, cout]` of a 1-D convolution, `[layers, cin, cout]` of
stacked dense layers and `[features, heads, size]` of attention look alike.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax

Shape = tuple[int, ...]


class Kernels(NamedTuple):
    """The kernels in a leaf.

    Attributes:
      stack: the leading axes, which count kernels; () where there is one.
      shape: of one kernel, as it lies in the leaf.

    Example:
      >>> Kernels((12,), (3, 3, 64, 64)).count, Kernels((), (64, 32)).conv_shape
      (12, (1, 1, 64, 32))
    """

    stack: Shape
    shape: Shape

    @property
    def count(self) -> int:  # type: ignore[override]  # tuple.count
        """How many there are."""
        return math.prod(self.stack)

    @property
    def conv_shape(self) -> Any:
        """The shape of one as a conv kernel, `(kh, kw, cin, cout)`."""
        return (1, 1, *self.shape) if len(self.shape) == 2 else self.shape

    def each(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function of one kernel, its arguments and results with the leading axes `stack`."""
        for _ in self.stack:
            function = jax.vmap(function)
        return function

    def as_conv(self, leaf: jax.Array) -> jax.Array:
        """The leaf as conv kernels `[*stack, kh, kw, cin, cout]`."""
        return leaf.reshape(*self.stack, *self.conv_shape)


def kernels(label: str, shape: Sequence[int], *, any_rank: bool = False) -> Kernels:
    """The kernels in a leaf of that shape.

    Args:
      label: names the leaf in errors.
      shape: of the leaf.
      any_rank: takes other leaves of fewer than four axes too, as one kernel.

    Returns:
      The leading axes and the shape of one kernel.

    Raises:
      ValueError: the leaf holds no kernels, or an axis is empty.

    Example:
      >>> kernels("params['conv']", (12, 3, 3, 64, 64)).stack
      (12,)
    """
    shape = tuple(int(size) for size in shape)
    if 0 in shape or (len(shape) < 2 and not any_rank):
        raise ValueError(
            f"{label}: expected a conv kernel (kh, kw, cin, cout), a dense kernel (cin, cout) or "
            f"stacked conv kernels, with positive sizes, got {shape}"
        )
    if len(shape) == 3 and not any_rank:
        raise ValueError(
            f"{label}: expected a conv kernel [kh, kw, cin, cout], a dense kernel [cin, cout] or "
            f"stacked conv kernels [layers, kh, kw, cin, cout], got shape {shape}; three axes may "
            "be a 1-D convolution, stacked dense layers or attention, so leave the leaf out with "
            "`where`, or take patterns.unstructured()"
        )
    return Kernels(shape[:-4], shape[-4:])
