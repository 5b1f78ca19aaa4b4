"""Windows: every kernel slice keeps the same number of its weights."""

import dataclasses
from typing import ClassVar

from jaxtyping import Array, Bool, Float

from blocksparse_jax import _checks
from blocksparse_jax.counts import Units
from blocksparse_jax.layout_nodes import Layout
from blocksparse_jax.patterns._base import Pattern, Shape


@dataclasses.dataclass(frozen=True)
class Window(Pattern):
    """A fixed number of weights in every kernel slice: see `window`."""

    noun: ClassVar[str] = "windows"

    def _units(self, shape: Shape, label: str) -> Units:
        """A row for each (channel, filter), of its taps."""
        kh, kw, cin, cout = _checks.kernel_shape(label, shape)
        return Units(rows=cin * cout, sets=kh * kw, weights=1)

    def _sets(
        self, scores: Float[Array, "kh kw cin cout"], layout: Layout
    ) -> Float[Array, "rows taps"]:
        """The weights, slice by slice."""
        return scores.reshape(-1, scores.shape[2] * scores.shape[3]).T

    def _mask(self, kept: Bool[Array, "rows taps"], shape: Shape) -> Bool[Array, "kh kw cin cout"]:
        """The kept weights in the kernel's shape."""
        return kept.T.reshape(shape)


def window() -> Window:
    """The pattern of windows: every kernel slice keeps the same number of its weights.

    A slice of a 3x3 kernel keeps 1 to 9 weights, so densities come in ninths; a 1x1 kernel has one
    weight in a slice and stays dense.

    Returns:
      A pattern for conv kernels `[kh, kw, cin, cout]`, without a layout: it runs masked-dense.

    Example:
      >>> import jax.numpy as jnp
      >>> from blocksparse_jax import masks_from_scores
      >>> scores = {"conv": jnp.arange(576.0).reshape(3, 3, 8, 8)}
      >>> masks = masks_from_scores(scores, 2 / 3, pattern=window())
      >>> sorted(set(masks["conv"].sum((0, 1)).ravel().tolist()))
      [3]

    Reference: Gamboa et al., "Campfire", 2020 (window pruning).
    """
    return Window()
