"""The frame of every pattern: sets of weights that are kept or pruned together."""

import abc
import dataclasses
import itertools
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from blocksparse_jax import _checks
from blocksparse_jax.counts import Units, set_counts
from blocksparse_jax.layout import BlockLayout, Dense, Layout, ShrinkingLayout
from blocksparse_jax.selection import highest_in_rows, ranks

Shape = tuple[int, ...]


class Kept(NamedTuple):
    """What is kept of one leaf.

    Attributes:
      mask: bool, of the leaf's shape.
      layout: its block layout, or `Dense()` where the pattern has none.
    """

    mask: Array
    layout: Layout


@dataclasses.dataclass(frozen=True)
class Pattern(abc.ABC):
    """Which sets of weights live and die together, and how survivors become masks and layouts.

    A pattern sees the scores of a kernel as an array `[rows, sets]`: the score of each set of
    weights. Every row keeps the same number of sets, those of the highest scores; equal scores go
    to the lower index. All shapes are static, so everything here runs inside jit.

    Attributes:
      noun: what the sets are called in reports.
      has_layout: whether its masks fit a `BlockLayout`, so that the block-sparse convolution runs
        them.
      density: the density that the pattern itself fixes; None where a sparsity sets it.
    """

    noun: ClassVar[str]
    has_layout: ClassVar[bool] = False

    @property
    def density(self) -> float | None:
        """The density that the pattern itself fixes, or None."""
        return None

    @abc.abstractmethod
    def units(self, shape: Shape, label: str = "scores") -> Units:
        """How the pattern divides a kernel; ValueError, naming `label`, where it cannot."""

    @abc.abstractmethod
    def sets(self, scores: Float[Array, "..."], layout: Layout) -> Float[Array, "rows sets"]:
        """The score of each set."""

    @abc.abstractmethod
    def mask(self, kept: Bool[Array, "rows sets"], shape: Shape) -> Bool[Array, "..."]:
        """The mask of the kept sets."""

    def kept_sets(self, mask: Bool[Array, "..."], layout: Layout) -> Bool[Array, "rows sets"]:
        """Which sets a mask keeps: the inverse of `mask`."""
        return self.sets(mask.astype(jnp.float32), layout) > 0

    def counts(self, shapes: Mapping[str, Shape], densities: Mapping[str, float]) -> dict[str, Any]:
        """Static counts of each layer: the kept sets of each row."""
        return set_counts(densities, {name: self.units(shape) for name, shape in shapes.items()})

    def sparsity(self, sparsity: float | None) -> float:
        """The checked sparsity; patterns that fix their own override this."""
        return _checks.fraction("sparsity", sparsity)

    def draw(self, scores: Float[Array, "..."], count: Any) -> Kept:
        """Keeps the `count` highest sets of every row; a traced count gives no layout."""
        kept = highest_in_rows(self.sets(scores, Dense()), count)
        is_static = not isinstance(count, jax.core.Tracer)
        layout = self.layout_of(kept, scores.shape, int(count)) if is_static else Dense()
        return Kept(self.mask(kept, scores.shape), layout)

    def layout_of(self, kept: Bool[Array, "rows sets"], shape: Shape, count: int) -> Layout:
        """The layout of kept sets, `count` in each row; `Dense()` where the pattern has none."""
        del kept, shape, count
        return Dense()

    def move(self, kept: Bool[Array, "rows sets"], mask: Array, layout: Layout) -> Kept:
        """What is kept after some sets were exchanged for others, as many in each row as before."""
        count = layout.channels.shape[1] if isinstance(layout, BlockLayout) else None
        new = Dense() if count is None else self.layout_of(kept, mask.shape, count)
        return Kept(self.mask(kept, mask.shape), new)

    def moves(
        self, fraction: Float[Array, ""], active: Int[Array, "rows 1"]
    ) -> Int[Array, "rows 1"]:
        """How many of the active sets of a row a fraction is: the nearest number.

        A row has few sets, and the floor would stop moving them while the fraction is not small.
        """
        return jnp.floor(fraction * active + 0.5).astype(jnp.int32)

    def shrinking(self, shape: Shape) -> ShrinkingLayout | Dense:
        """The marker of a layout whose kept count changes in training."""
        del shape
        return Dense()

    def shrink(
        self,
        scores: Float[Array, "..."],
        mask: Bool[Array, "..."],
        layout: Layout,
        density: Float[Array, ""],
        final: Any,
    ) -> Bool[Array, "..."]:
        """Prunes further sets, down to a density; what is pruned stays pruned.

        Args:
          scores: of the weights.
          mask: what is kept now.
          layout: the marker from `shrinking`.
          density: traced; the nearest number of sets is kept, but no fewer than `final`.
          final: the static counts at the end.

        Returns:
          The smaller mask.
        """
        units = self.units(mask.shape)
        count = jnp.maximum(final, jnp.round(density * units.sets).astype(jnp.int32))
        return self.keep(scores, mask, layout, count)

    def keep(
        self, scores: Float[Array, "..."], mask: Bool[Array, "..."], layout: Layout, count: Any
    ) -> Bool[Array, "..."]:
        """The mask of the `count` highest sets of each row among those that are kept now."""
        kept = self.kept_sets(mask, layout)
        best = highest_in_rows(jnp.where(kept, self.sets(scores, layout), -jnp.inf), count)
        return self.mask(best & kept, mask.shape)

    def comparable(self, sets: Float[Array, "rows sets"], unit: Units) -> Float[Array, "rows sets"]:
        """Set scores that compare across layers: the mean over a set's weights, not their sum."""
        return sets / unit.weights

    def global_counts(
        self, scores: Mapping[str, Float[Array, "..."]], density: Any
    ) -> dict[str, Any]:
        """Counts of each layer when one threshold runs through the sets of all layers.

        Sets are taken in descending order of score until their weights reach the density of all
        weights. A layer whose rows must keep the same count keeps the nearest one, at least 1.

        Args:
          scores: layer name -> scores.
          density: of all layers together, a number or traced.

        Returns:
          Layer name -> kept sets of each row: ints, or traced where the scores are.
        """
        units = {name: self.units(leaf.shape) for name, leaf in scores.items()}
        sets = {
            name: self.comparable(self.sets(leaf, Dense()), units[name]).reshape(-1)
            for name, leaf in scores.items()
        }
        chosen = _above_threshold(sets, units, density)
        counts: dict[str, Any] = {}
        for name, unit in units.items():
            total = chosen[name].sum()
            if unit.rows > 1:
                total = jnp.maximum(1, jnp.round(total / unit.rows).astype(jnp.int32))
            counts[name] = total
        if any(isinstance(count, jax.core.Tracer) for count in counts.values()):
            return counts
        return {name: int(count) for name, count in counts.items()}


def _above_threshold(
    sets: Mapping[str, Float[Array, " n"]], units: Mapping[str, Units], density: Any
) -> dict[str, Bool[Array, " n"]]:
    """The sets of all layers with the highest scores whose weights make up a density of all."""
    scores = jnp.concatenate([jnp.where(jnp.isnan(x), -jnp.inf, x) for x in sets.values()])
    weights = [unit.weights for unit in units.values()]
    sizes = [len(leaf) for leaf in sets.values()]
    target = density * sum(size * weight for size, weight in zip(sizes, weights))
    if len(set(weights)) == 1:
        sets_kept = target / weights[0]
        count = round(sets_kept) if isinstance(sets_kept, float) else jnp.round(sets_kept)
        chosen = ranks(scores) < count
    else:
        order = jnp.argsort(scores, stable=True, descending=True)
        each = jnp.concatenate([jnp.full(s, w) for s, w in zip(sizes, weights)])[order]
        within = jnp.cumsum(each) - each / 2 <= target
        chosen = jnp.zeros(len(scores), bool).at[order].set(within)
    ends = list(itertools.accumulate(sizes))[:-1]
    return dict(zip(sets, jnp.split(chosen, ends)))
