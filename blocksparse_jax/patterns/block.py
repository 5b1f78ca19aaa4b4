"""HRBP's blocks: groups of filters that keep the same input channels and the same taps."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, ClassVar

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from blocksparse_jax import _checks
from blocksparse_jax.counts import BlockCount, Units, block_counts
from blocksparse_jax.grouping.hrbp import hrbp_groups
from blocksparse_jax.grouping.search_together import Blocks, group_together
from blocksparse_jax.layout import BlockLayout, channel_layout, layout_to_mask
from blocksparse_jax.layout_nodes import FilterGroups, Layout
from blocksparse_jax.patterns._base import Kept, Pattern, Shape, check_static
from blocksparse_jax.patterns.unstructured import Unstructured
from blocksparse_jax.selection import highest_in_rows

_ROUNDS = 4  # of choosing channels given the taps, and taps given the channels


@dataclasses.dataclass(frozen=True)
class Block(Pattern):
    """Regrouped blocks: see `block`.

    The rows are groups of filters, their sets runs of input channels at the group's taps. Which
    filters form a group, and which taps it keeps, is found when masks are drawn; from then on the
    layout carries both, and only the channels move.
    """

    noun: ClassVar[str] = "HRBP blocks"
    group_size: int = 32
    block_density: float | None = None
    channel_block: int = 1
    has_layout: ClassVar[bool] = True

    def _run(self, cin: int) -> int:
        """Channels in a run: the largest divisor of `cin` that is at most `channel_block`."""
        return _checks.divisor(cin, self.channel_block)

    def _size(self, cout: int) -> int:
        """Filters in a group: the largest divisor of `cout` that is at most `group_size`."""
        return _checks.divisor(cout, self.group_size)

    def _units(self, shape: Shape, label: str) -> Units:
        """A row for each group, of its runs of channels, whole kernels."""
        kh, kw, cin, cout = _checks.kernel_shape(label, shape)
        size, run = self._size(cout), self._run(cin)
        return Units(rows=cout // size, sets=cin // run, weights=kh * kw * size * run)

    def check_leaves(self, leaves: Mapping[str, Array], label: str = "params") -> None:
        """As every pattern, and warns of groups or runs far smaller than asked for."""
        super().check_leaves(leaves, label)
        for name, leaf in leaves.items():
            cin, cout = leaf.shape[-2:]
            _checks.warn_of_collapse(name, "group_size", self.group_size, self._size(cout), cout)
            _checks.warn_of_collapse(name, "channel_block", self.channel_block, self._run(cin), cin)

    def counts(
        self, shapes: Mapping[str, Shape], densities: Mapping[str, float]
    ) -> dict[str, BlockCount]:
        """Kept channels and taps of each layer."""
        runs = {name: self._run(shape[-2]) for name, shape in shapes.items()}
        return block_counts(
            shapes, densities, block_density=self.block_density, channel_blocks=runs
        )

    def _draw(self, scores: Float[Array, "kh kw cin cout"], count: BlockCount) -> Kept:
        """Groups the filters and chooses channels and taps, so that the kept score is large."""
        layout = hrbp_groups(
            scores,
            group_size=self._size(scores.shape[3]),
            kept=count.kept,
            kept_taps=count.kept_taps,
            channel_block=self._run(scores.shape[2]),
        )
        return Kept(layout_to_mask(layout), layout)

    def draw_together(
        self, scores: Mapping[str, Float[Array, "..."]], counts: Mapping[str, BlockCount]
    ) -> dict[str, Kept]:
        """As `draw`; layers of as many filters share a search."""
        blocks = [
            Blocks(
                self._kernels(leaf.shape),
                self._size(leaf.shape[-1]),
                counts[name].kept,
                counts[name].kept_taps,
                self._run(leaf.shape[-2]),
            )
            for name, leaf in scores.items()
        ]
        found = group_together(list(scores.values()), blocks)
        return {name: Kept(*kept) for name, kept in zip(scores, found, strict=True)}

    def _sets(self, scores: Float[Array, "kh kw cin cout"], layout: Layout) -> Float[Array, "g r"]:
        """The sum over each group's filters and kept taps, and over each run of channels."""
        assert isinstance(layout, BlockLayout)
        kh, kw, cin, cout = layout.shape
        positions = scores.reshape(kh * kw, cin, cout)
        # [groups, kept_taps, group_size, cin]
        blocks = positions[layout.taps[:, :, None], :, layout.filters[:, None, :]]
        channels = blocks.sum((1, 2))
        return channels.reshape(len(channels), -1, layout.channel_block).sum(-1)

    def _kept_sets(self, mask: Bool[Array, "kh kw cin cout"], layout: Layout) -> Bool[Array, "g r"]:
        """The runs that the layout names."""
        assert isinstance(layout, BlockLayout)
        groups, runs = len(layout.filters), layout.shape[2] // layout.channel_block
        index = layout.channels // layout.channel_block
        return jnp.zeros((groups, runs), bool).at[jnp.arange(groups)[:, None], index].set(True)

    def _mask(self, kept: Bool[Array, "groups runs"], shape: Shape) -> Bool[Array, "..."]:
        """Not defined without the groups: see `move`."""
        raise NotImplementedError("the mask of HRBP's blocks follows from a layout: use move")

    def _move(self, kept: Bool[Array, "groups runs"], mask: Array, layout: Layout) -> Kept:
        """The same filters and taps with other channels."""
        assert isinstance(layout, BlockLayout)
        count = layout.channels.shape[1]
        moved = channel_layout(
            layout.filters, kept, layout.taps, layout.kernels.conv_shape, kept=count
        )
        return Kept(layout_to_mask(moved), moved)

    def global_counts(
        self, scores: Mapping[str, Float[Array, "..."]], density: Any
    ) -> dict[str, BlockCount]:
        """Counts for the density that each layer has when one threshold runs through all weights.

        Raises:
          ValueError: the scores are traced: the counts become shapes.
        """
        counts = Unstructured().global_counts(scores, density)
        check_static(counts, self.noun)
        densities = {  # of one kernel, and so of all that are stacked
            name: counts[name] / math.prod(leaf.shape[-4:]) for name, leaf in scores.items()
        }
        return self.counts({name: leaf.shape for name, leaf in scores.items()}, densities)

    def groups(self, scores: Float[Array, "kh kw cin cout"], count: BlockCount) -> FilterGroups:
        """The groups that `draw` finds, for a method that prunes them step by step."""
        layout = self.draw(scores, count).layout
        assert isinstance(layout, BlockLayout)
        return FilterGroups(layout.filters, layout.channel_block)

    def _shrinking(self, shape: Shape) -> FilterGroups:
        """Groups of consecutive filters, until `groups` has found others."""
        size = self._size(shape[3])
        filters = jnp.arange(shape[3], dtype=jnp.int32).reshape(-1, size)
        return FilterGroups(filters, self._run(shape[2]))

    def _shrink(
        self,
        scores: Float[Array, "kh kw cin cout"],
        mask: Bool[Array, "kh kw cin cout"],
        layout: Layout,
        density: Float[Array, ""],
        final: BlockCount,
    ) -> Bool[Array, "kh kw cin cout"]:
        """Prunes taps first, then runs of channels; what is pruned stays pruned."""
        assert isinstance(layout, FilterGroups)
        kh, kw, cin, cout = mask.shape
        run = layout.channel_block
        taps = jnp.maximum(final.kept_taps, jnp.round(density * kh * kw).astype(jnp.int32))
        runs = jnp.round(density * kh * kw * cin / (final.kept_taps * run)).astype(jnp.int32)
        runs = jnp.clip(runs, final.kept // run, cin // run)
        runs = jnp.where(taps > final.kept_taps, cin // run, runs)

        blocks = scores.reshape(kh * kw, cin, cout)[:, :, layout.filters].sum(-1)
        blocks = blocks.reshape(kh * kw, -1, run, len(layout.filters)).sum(2)  # [taps, runs, group]
        live = mask.reshape(kh * kw, -1, run, cout)[:, :, 0, layout.filters[:, 0]]
        kept_taps, kept_runs = _choose(
            blocks.transpose(2, 0, 1), live.transpose(2, 0, 1), taps, runs
        )

        by_group = kept_taps[:, :, None] & kept_runs[:, None, :]  # [groups, taps, runs]
        by_group = jnp.repeat(by_group, run, axis=2).transpose(1, 2, 0)
        groups = jnp.arange(len(layout.filters), dtype=jnp.int32)
        group_of = jnp.zeros(cout, jnp.int32).at[layout.filters].set(groups[:, None])
        return by_group[:, :, group_of].reshape(mask.shape)


def _choose(
    sums: Float[Array, "groups taps runs"],
    live: Bool[Array, "groups taps runs"],
    taps: Int[Array, ""],
    runs: Int[Array, ""],
) -> tuple[Bool[Array, "groups taps"], Bool[Array, "groups runs"]]:
    """The best taps and runs of each group among the live ones, chosen in turn."""
    live_taps, live_runs = live.any(2), live.any(1)

    def best(over: str, others: Array, alive: Array, count: Array) -> Array:
        scores = jnp.einsum(over, sums, others.astype(sums.dtype))
        return highest_in_rows(jnp.where(alive, scores, -jnp.inf), count) & alive

    kept_taps, kept_runs = live_taps, live_runs
    for _ in range(_ROUNDS):
        kept_runs = best("gtr,gt->gr", kept_taps, live_runs, runs)
        kept_taps = best("gtr,gr->gt", kept_runs, live_taps, taps)
    return kept_taps, kept_runs


def block(
    group_size: int = 32, block_density: float | None = None, channel_block: int = 1
) -> Block:
    """HRBP's pattern: groups of similar filters that keep the same input channels and taps.

    A layer keeps K channels and `ceil(block_density * kh * kw)` taps in every group, so its density
    is `K / cin * taps / (kh * kw)`. Filters are grouped so that the kept score is large.

    Args:
      group_size: filters in a group; a layer whose filter count it does not divide uses the largest
        divisor below it, and warns where that is less than half of what can be.
      block_density: fraction of the taps that a block keeps, in (0, 1]; 1 keeps whole kernels (HRBP
        without "++"). None is 1/3; a layer whose density is above that keeps as few taps as hold
        it, and a warning says so.
      channel_block: channels are kept in aligned runs of this many; likewise the largest divisor of
        cin.

    Returns:
      A pattern for conv kernels and dense kernels (`block_density` is 1 there) that has a layout.

    Raises:
      ValueError: a size out of range.

    Example:
      >>> from blocksparse_jax import layouts_from_scores
      >>> scores = {"conv": jnp.ones((3, 3, 64, 64))}
      >>> layouts_from_scores(scores, 0.9, pattern=block(group_size=32))["conv"].packed_shape
      (2, 19, 3, 32)

    Reference: Ma et al., "HRBP: hardware-friendly regrouping towards block-based pruning for sparse
    CNN training", CPAL 2024. Equal group sizes and kept counts are our choice.
    """
    _checks.positive_int("group_size", group_size)
    _checks.positive_int("channel_block", channel_block)
    if block_density is not None:
        block_density = float(
            _checks.fraction("block_density", block_density, low_open=True, high_open=False)
        )
    return Block(group_size, block_density, channel_block)
