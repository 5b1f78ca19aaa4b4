"""The frame of every pattern: sets of weights that are kept or pruned together."""

import abc
import dataclasses
import functools
import itertools
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from blocksparse_jax import _checks
from blocksparse_jax.counts import Units, set_counts, warn_if_off
from blocksparse_jax.kernels import Kernels, kernels
from blocksparse_jax.layout import BlockLayout, conv_layout
from blocksparse_jax.layout_nodes import Dense, Layout, ShrinkingLayout
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

    The methods with an underscore, which a pattern defines, see one conv kernel
    `[kh, kw, cin, cout]`; those without, which everyone calls, take leaves that hold dense or
    stacked kernels too (`kernels.py`). The rows of stacked kernels follow each other, so every
    kernel of a stack keeps as many sets.

    Attributes:
      noun: what the sets are called in reports.
      has_layout: whether its masks fit a `BlockLayout`, so that the block-sparse convolution runs
        them.
      any_rank: whether leaves of one or three axes are divided too, as they are.
      density: the density that the pattern itself fixes; None where a sparsity sets it.
    """

    noun: ClassVar[str]
    has_layout: ClassVar[bool] = False
    any_rank: ClassVar[bool] = False

    @property
    def density(self) -> float | None:
        """The density that the pattern itself fixes, or None."""
        return None

    @abc.abstractmethod
    def _units(self, shape: Shape, label: str) -> Units:
        """How the pattern divides a kernel; ValueError, naming `label`, where it cannot."""

    @abc.abstractmethod
    def _sets(self, scores: Float[Array, "..."], layout: Layout) -> Float[Array, "rows sets"]:
        """The score of each set."""

    @abc.abstractmethod
    def _mask(self, kept: Bool[Array, "rows sets"], shape: Shape) -> Bool[Array, "..."]:
        """The mask of the kept sets."""

    def _kept_sets(self, mask: Bool[Array, "..."], layout: Layout) -> Bool[Array, "rows sets"]:
        """Which sets a mask keeps: the inverse of `_mask`."""
        return self._sets(mask.astype(jnp.float32), layout) > 0

    def _draw(self, scores: Float[Array, "..."], count: Any) -> Kept:
        """Keeps the `count` highest sets of every row; a traced count gives no layout."""
        kept = highest_in_rows(self._sets(scores, Dense()), count)
        is_static = not isinstance(count, jax.core.Tracer)
        layout = self._layout_of(kept, scores.shape, int(count)) if is_static else Dense()
        return Kept(self._mask(kept, scores.shape), layout)

    def _layout_of(self, kept: Bool[Array, "rows sets"], shape: Shape, count: int) -> Layout:
        """The layout of kept sets, `count` in each row; `Dense()` where the pattern has none."""
        del kept, shape, count
        return Dense()

    def _move(self, kept: Bool[Array, "rows sets"], mask: Array, layout: Layout) -> Kept:
        """What is kept after some sets were exchanged for others, as many in each row as before."""
        count = layout.channels.shape[1] if isinstance(layout, BlockLayout) else None
        new = Dense() if count is None else self._layout_of(kept, mask.shape, count)
        return Kept(self._mask(kept, mask.shape), new)

    def _shrinking(self, shape: Shape) -> ShrinkingLayout | Dense:
        """The marker of a layout whose kept count changes in training."""
        del shape
        return Dense()

    def _shrink(
        self,
        scores: Float[Array, "..."],
        mask: Bool[Array, "..."],
        layout: Layout,
        density: Float[Array, ""],
        final: Any,
    ) -> Bool[Array, "..."]:
        """The smaller mask: see `shrink`."""
        units = self.units(mask.shape)
        count = jnp.maximum(final, jnp.round(density * units.sets).astype(jnp.int32))
        return self.keep(scores, mask, layout, count)

    def _kernels(self, shape: Shape, label: str = "scores") -> Kernels:
        """The kernels in a leaf."""
        return kernels(label, shape, any_rank=self.any_rank)

    def units(self, shape: Shape, label: str = "scores") -> Units:
        """How the pattern divides a leaf; ValueError, naming `label`, where it cannot."""
        of = self._kernels(shape, label)
        one = self._units(of.conv_shape, label)
        return one._replace(rows=of.count * one.rows)

    def sets(self, scores: Float[Array, "..."], layout: Layout) -> Float[Array, "rows sets"]:
        """The score of each set."""
        of = self._kernels(scores.shape)
        return _rows(of.each(self._sets)(of.as_conv(scores), conv_layout(layout)))

    def mask(self, kept: Bool[Array, "rows sets"], shape: Shape) -> Bool[Array, "..."]:
        """The mask of the kept sets."""
        of = self._kernels(shape)
        masks = of.each(lambda kept: self._mask(kept, of.conv_shape))
        return masks(_of_each_kernel(kept, of)).reshape(shape)

    def kept_sets(self, mask: Bool[Array, "..."], layout: Layout) -> Bool[Array, "rows sets"]:
        """Which sets a mask keeps: the inverse of `mask`."""
        of = self._kernels(mask.shape)
        return _rows(of.each(self._kept_sets)(of.as_conv(mask), conv_layout(layout)))

    def check_leaves(self, leaves: Mapping[str, Array], label: str = "params") -> None:
        """Raises a ValueError that names the first leaf which the pattern cannot divide."""
        for name, leaf in leaves.items():
            self.units(leaf.shape, f"{label}[{name!r}]")

    def counts(self, shapes: Mapping[str, Shape], densities: Mapping[str, float]) -> dict[str, Any]:
        """Static counts of each layer: the kept sets of each row."""
        return set_counts(densities, {name: self.units(shape) for name, shape in shapes.items()})

    def sparsity(self, sparsity: float | None) -> float:
        """The checked sparsity; patterns that fix their own override this."""
        return _checks.fraction("sparsity", sparsity)

    def draw(self, scores: Float[Array, "..."], count: Any) -> Kept:
        """Keeps the `count` highest sets of every row; a traced count gives no layout."""
        of = self._kernels(scores.shape)
        draw = functools.partial(self._draw, count=count)
        for _ in of.stack:
            draw = functools.partial(jax.lax.map, draw)  # one by one, for the memory of a search
        return _in_leaf(draw(of.as_conv(scores)), of, scores.shape)

    def draw_together(
        self, scores: Mapping[str, Float[Array, "..."]], counts: Mapping[str, Any]
    ) -> dict[str, Kept] | None:
        """What `draw` keeps of every layer, by static counts; None where one by one is as well."""
        del scores, counts
        return None

    def move(self, kept: Bool[Array, "rows sets"], mask: Array, layout: Layout) -> Kept:
        """What is kept after some sets were exchanged for others, as many in each row as before."""
        of = self._kernels(mask.shape)
        moved = of.each(self._move)(
            _of_each_kernel(kept, of), of.as_conv(mask), conv_layout(layout)
        )
        return _in_leaf(moved, of, mask.shape)

    def moves(
        self, fraction: Float[Array, ""], active: Int[Array, "rows 1"]
    ) -> Int[Array, "rows 1"]:
        """How many of the active sets of a row a fraction is: the nearest number.

        A row has few sets, and the floor would stop moving them while the fraction is not small.
        """
        return jnp.floor(fraction * active.astype(fraction.dtype) + 0.5).astype(jnp.int32)

    def shrinking(self, shape: Shape) -> ShrinkingLayout | Dense:
        """The marker of a layout whose kept count changes in training."""
        of = self._kernels(shape)
        return jax.tree.map(
            lambda array: jnp.broadcast_to(array, (*of.stack, *array.shape)),
            self._shrinking(of.conv_shape),
        )

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
        of = self._kernels(mask.shape)

        def shrink(scores: Array, mask: Array, layout: Layout) -> Array:
            return self._shrink(scores, mask, layout, density, final)

        smaller = of.each(shrink)(of.as_conv(scores), of.as_conv(mask), conv_layout(layout))
        return smaller.reshape(mask.shape)

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

        A step is one set more in every row of a layer: the best set of each row, then the second
        best, and so on. It scores the mean over the rows. Every layer takes its first step, so that
        none is cut off; further steps follow in descending order of score until their weights reach
        the density of all weights. A warning gives the density where whole steps miss it.

        Args:
          scores: layer name -> scores.
          density: of all layers together, a number or traced.

        Returns:
          Layer name -> kept sets of each row: ints, or traced where the scores are.
        """
        units = {name: self.units(leaf.shape) for name, leaf in scores.items()}
        steps = {name: self._steps(leaf, units[name]) for name, leaf in scores.items()}
        weights = {name: unit.rows * unit.weights for name, unit in units.items()}
        taken = _above_threshold(steps, weights, density)
        counts: dict[str, Any] = {name: layer.sum() for name, layer in taken.items()}
        if any(isinstance(count, jax.core.Tracer) for count in counts.values()):
            return counts
        counts = {name: int(count) for name, count in counts.items()}
        size = sum(leaf.size for leaf in scores.values())
        reached = sum(count * weights[name] for name, count in counts.items()) / size
        fix = "another budget, another pattern or more layers"
        warn_if_off(abs(reached - density), density, "one threshold through whole sets", fix)
        return counts

    def _steps(self, scores: Float[Array, "..."], unit: Units) -> Float[Array, " sets"]:
        """The mean over all rows of their best set, of their second best, and so on."""
        sets = self.comparable(self.sets(scores, Dense()), unit)
        sets = jnp.nan_to_num(sets, nan=-jnp.inf, neginf=-jnp.inf)
        return sets[0] if unit.rows == 1 else jnp.sort(sets, axis=1, descending=True).mean(0)


def _rows(rows: Array) -> Array:
    """The rows of stacked kernels, one after the other."""
    return rows.reshape(-1, rows.shape[-1])


def _of_each_kernel(rows: Array, of: Kernels) -> Array:
    """The inverse of `_rows`."""
    return rows.reshape(*of.stack, -1, rows.shape[-1])


def _in_leaf(kept: Kept, of: Kernels, shape: Shape) -> Kept:
    """What is kept of conv kernels, in the leaf's shape."""
    layout = kept.layout
    if isinstance(layout, BlockLayout):
        layout = dataclasses.replace(layout, shape=of.shape)
    return Kept(kept.mask.reshape(shape), layout)


def check_static(counts: Mapping[str, Any], noun: str) -> None:
    """Raises a ValueError where counts that become the shapes of a layout are traced."""
    for name, count in counts.items():
        if isinstance(count, jax.core.Tracer):
            raise ValueError(
                f"budget: 'global' reads the scores of {name!r} on the host, since the counts of "
                f"{noun} are shapes; call this outside of jit, or use another budget"
            )


def _above_threshold(
    steps: Mapping[str, Float[Array, " n"]], weights: Mapping[str, int], density: Any
) -> dict[str, Bool[Array, " n"]]:
    """The steps of all layers with the highest scores whose weights make up a density of all.

    The best step of every layer counts as one with a score above all others.
    """
    scores = jnp.concatenate([leaf.at[jnp.argmax(leaf)].set(jnp.inf) for leaf in steps.values()])
    sizes = [len(leaf) for leaf in steps.values()]
    target = density * sum(size * weight for size, weight in zip(sizes, weights.values()))
    if len(set(weights.values())) == 1:
        exact = target / next(iter(weights.values()))
        count = round(exact) if isinstance(exact, float) else jnp.round(exact).astype(jnp.int32)
        chosen = ranks(scores) < jnp.maximum(count, len(sizes))
    else:
        order = jnp.argsort(scores, stable=True, descending=True)
        each = jnp.asarray(np.repeat(list(weights.values()), sizes), jnp.int32)[order]
        middle = jnp.cumsum(each).astype(jnp.float32) - each.astype(jnp.float32) / 2
        within = (middle <= target) | jnp.isposinf(scores[order])
        chosen = jnp.zeros(len(scores), bool).at[order].set(within)
    ends = list(itertools.accumulate(sizes))[:-1]
    return dict(zip(steps, jnp.split(chosen, ends)))
