"""Single weights."""

import dataclasses
import math
from collections.abc import Mapping
from typing import ClassVar

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from blocksparse_jax.counts import Units, weight_counts
from blocksparse_jax.layout_nodes import Layout
from blocksparse_jax.patterns._base import Pattern, Shape


@dataclasses.dataclass(frozen=True)
class Unstructured(Pattern):
    """Every weight lives or dies by itself: see `unstructured`."""

    noun: ClassVar[str] = "single weights"
    any_rank: ClassVar[bool] = True

    def _units(self, shape: Shape, label: str) -> Units:
        """One row of single weights."""
        return Units(rows=1, sets=math.prod(shape), weights=1)

    def _sets(self, scores: Float[Array, "..."], layout: Layout) -> Float[Array, "1 n"]:
        """The weights in C order."""
        return scores.reshape(1, -1)

    def _mask(self, kept: Bool[Array, "1 n"], shape: Shape) -> Bool[Array, "..."]:
        """The kept weights in the kernel's shape."""
        return kept.reshape(shape)

    def counts(self, shapes: Mapping[str, Shape], densities: Mapping[str, float]) -> dict[str, int]:
        """`round(density * size)` weights of each kernel, at least 1."""
        return weight_counts(densities, shapes)

    def moves(
        self, fraction: Float[Array, ""], active: Int[Array, "rows 1"]
    ) -> Int[Array, "rows 1"]:
        """The floor, as RigL's authors have it."""
        return jnp.floor(fraction * active.astype(fraction.dtype)).astype(jnp.int32)


def unstructured() -> Unstructured:
    """The pattern of single weights.

    Returns:
      A pattern for leaves of any rank, without a layout: it runs masked-dense.

    Example:
      >>> from blocksparse_jax import masks_from_scores
      >>> scores = {"conv": jnp.arange(64.0).reshape(1, 1, 8, 8)}
      >>> int(masks_from_scores(scores, 0.75, pattern=unstructured())["conv"].sum())
      16

    Reference: Han et al., "Learning both weights and connections", NeurIPS 2015.
    """
    return Unstructured()
