"""Vectors: the kw weights in one row of a kernel slice."""

import dataclasses
from typing import ClassVar

from jaxtyping import Array, Bool, Float

from blocksparse_jax import _checks
from blocksparse_jax.counts import Units
from blocksparse_jax.layout_nodes import Layout
from blocksparse_jax.patterns._base import Pattern, Shape


@dataclasses.dataclass(frozen=True)
class Vector(Pattern):
    """Rows of kernel slices: see `vector`."""

    noun: ClassVar[str] = "vectors"

    def _units(self, shape: Shape, label: str) -> Units:
        """One row of vectors."""
        kh, kw, cin, cout = _checks.kernel_shape(label, shape)
        return Units(rows=1, sets=kh * cin * cout, weights=kw)

    def _sets(self, scores: Float[Array, "kh kw cin cout"], layout: Layout) -> Float[Array, "1 n"]:
        """One score for each (row, channel, filter)."""
        return scores.sum(1).reshape(1, -1)

    def _mask(self, kept: Bool[Array, "1 n"], shape: Shape) -> Bool[Array, "kh kw cin cout"]:
        """All weights of the kept vectors."""
        kh, kw, cin, cout = shape
        return kept.reshape(kh, 1, cin, cout).repeat(kw, 1)


def vector() -> Vector:
    """The pattern of vectors: the `kw` weights in one row of a kernel slice.

    Returns:
      A pattern for conv kernels and dense kernels (of which a vector is one weight), without a
      layout: it runs masked-dense.

    Example:
      >>> import jax.numpy as jnp
      >>> from blocksparse_jax import masks_from_scores
      >>> scores = {"conv": jnp.arange(9.0 * 64).reshape(3, 3, 8, 8)}
      >>> mask = masks_from_scores(scores, 2 / 3, pattern=vector())["conv"]
      >>> mask.any(1).sum() * 3 == mask.sum() == 192
      Array(True, dtype=bool)

    Reference: Mao et al., "Exploring the granularity of sparsity", 2017 (vector level); rows, not
    columns, are our choice.
    """
    return Vector()
