"""Kernel slices: the kh x kw weights of one (filter, input channel)."""

import dataclasses
from collections.abc import Callable
from typing import ClassVar, Literal

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from blocksparse_jax import _checks
from blocksparse_jax.counts import Units
from blocksparse_jax.layout_nodes import Layout
from blocksparse_jax.patterns._base import Pattern, Shape

Reduce = Literal["sum", "mean", "max"]
REDUCTIONS: dict[Reduce, Callable[..., Array]] = {
    "sum": jnp.sum,
    "mean": jnp.mean,
    "max": jnp.max,
}


@dataclasses.dataclass(frozen=True)
class Kernel(Pattern):
    """Whole kernel slices: see `kernel`."""

    noun: ClassVar[str] = "kernel slices"
    reduce: Reduce = "sum"

    def _units(self, shape: Shape, label: str) -> Units:
        """One row of kernel slices."""
        kh, kw, cin, cout = _checks.kernel_shape(label, shape)
        return Units(rows=1, sets=cin * cout, weights=kh * kw)

    def _sets(self, scores: Float[Array, "kh kw cin cout"], layout: Layout) -> Float[Array, "1 n"]:
        """One score for each (channel, filter)."""
        return REDUCTIONS[self.reduce](scores, axis=(0, 1)).reshape(1, -1)

    def comparable(self, sets: Float[Array, "1 n"], unit: Units) -> Float[Array, "1 n"]:
        """The mean or the maximum compares as it is."""
        return super().comparable(sets, unit) if self.reduce == "sum" else sets

    def _mask(self, kept: Bool[Array, "1 n"], shape: Shape) -> Bool[Array, "kh kw cin cout"]:
        """All taps of the kept slices."""
        return jnp.broadcast_to(kept.reshape(shape[2:]), shape)


def kernel(reduce: Reduce = "sum") -> Kernel:
    """The pattern of whole kernel slices, Campfire's CK.

    Args:
      reduce: how a slice's score follows from those of its weights: "sum", "mean" or "max"
        (Campfire).

    Returns:
      A pattern for conv kernels and dense kernels (of which a slice is one weight), without a
      layout: it runs masked-dense.

    Raises:
      ValueError: an unknown reduction.

    Example:
      >>> from blocksparse_jax import masks_from_scores
      >>> scores = {"conv": jnp.arange(64.0).reshape(1, 1, 8, 8)}
      >>> int(masks_from_scores(scores, 0.75, pattern=kernel())["conv"].sum())
      16

    Reference: Gamboa et al., "Campfire", 2020 (CK pruning); Mao et al., "Exploring the granularity
    of sparsity", 2017.
    """
    return Kernel(_checks.choice("reduce", reduce, REDUCTIONS))
