"""Constant fan-in: as many single weights in every filter."""

import dataclasses
import math
from typing import ClassVar

from jaxtyping import Array, Bool, Float

from blocksparse_jax.counts import Units
from blocksparse_jax.layout_nodes import Layout
from blocksparse_jax.patterns._base import Pattern, Shape


@dataclasses.dataclass(frozen=True)
class FanIn(Pattern):
    """As many weights in every filter: see `fan_in`."""

    noun: ClassVar[str] = "weights of a filter"
    any_rank: ClassVar[bool] = True

    def _units(self, shape: Shape, label: str) -> Units:
        """A row for each filter, of its weights."""
        return Units(rows=shape[-1], sets=math.prod(shape[:-1]), weights=1)

    def _sets(self, scores: Float[Array, "..."], layout: Layout) -> Float[Array, "filters n"]:
        """The weights of each filter in C order."""
        return scores.reshape(-1, scores.shape[-1]).T

    def _mask(self, kept: Bool[Array, "filters n"], shape: Shape) -> Bool[Array, "..."]:
        """The kept weights in the kernel's shape."""
        return kept.T.reshape(shape)


def fan_in() -> FanIn:
    """The pattern of constant fan-in: every filter keeps as many weights, wherever they lie.

    Returns:
      A pattern for leaves of any rank whose last axis counts filters (output neurons), without a
      layout: it runs masked-dense.

    Example:
      >>> import jax.numpy as jnp
      >>> from blocksparse_jax import masks_from_scores
      >>> scores = {"conv": jnp.arange(64.0).reshape(1, 1, 8, 8)}
      >>> masks_from_scores(scores, 0.75, pattern=fan_in())["conv"].sum((0, 1, 2)).tolist()
      [2, 2, 2, 2, 2, 2, 2, 2]

    Reference: Lasby et al., "Dynamic sparse training with structured sparsity", ICLR 2024.
    """
    return FanIn()
