"""1xN blocks: N consecutive filters x one input channel x the whole kernel."""

import dataclasses
from collections.abc import Mapping
from typing import ClassVar

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from blocksparse_jax import _checks
from blocksparse_jax.counts import Units
from blocksparse_jax.layout import BlockLayout, channel_layout
from blocksparse_jax.layout_nodes import ConsecutiveGroups, Layout
from blocksparse_jax.patterns._base import Pattern, Shape


@dataclasses.dataclass(frozen=True)
class OneByN(Pattern):
    """As many input channels for every group of N consecutive filters: see `one_by_n`."""

    noun: ClassVar[str] = "1xN blocks"
    group_size: int
    has_layout: ClassVar[bool] = True

    def size(self, cout: int) -> int:
        """Filters in a group of a layer: the largest divisor of `cout` that is at most N."""
        return _checks.divisor(cout, self.group_size)

    def check_leaves(self, leaves: Mapping[str, Array], label: str = "params") -> None:
        """As every pattern, and warns of blocks far smaller than asked for."""
        super().check_leaves(leaves, label)
        for name, leaf in leaves.items():
            cout = leaf.shape[-1]
            _checks.warn_of_collapse(name, "block", self.group_size, self.size(cout), cout)

    def _units(self, shape: Shape, label: str) -> Units:
        """A row for each group, of its input channels."""
        kh, kw, cin, cout = _checks.kernel_shape(label, shape)
        size = self.size(cout)
        return Units(rows=cout // size, sets=cin, weights=kh * kw * size)

    def _sets(
        self, scores: Float[Array, "kh kw cin cout"], layout: Layout
    ) -> Float[Array, "groups cin"]:
        """The sum over each block."""
        size = self.size(scores.shape[3])
        slices = scores.sum((0, 1))
        return slices.reshape(len(slices), -1, size).sum(-1).T

    def _mask(self, kept: Bool[Array, "groups cin"], shape: Shape) -> Bool[Array, "kh kw cin cout"]:
        """The kept blocks."""
        filters = jnp.repeat(kept, shape[3] // len(kept), axis=0)
        return jnp.broadcast_to(filters.T, shape)

    def _layout_of(self, kept: Bool[Array, "groups cin"], shape: Shape, count: int) -> BlockLayout:
        """Groups of consecutive filters, whole kernels."""
        kh, kw, cin, cout = shape
        filters = jnp.arange(cout, dtype=jnp.int32).reshape(len(kept), -1)
        taps = jnp.broadcast_to(jnp.arange(kh * kw, dtype=jnp.int32), (len(kept), kh * kw))
        return channel_layout(filters, kept, taps, (kh, kw, cin, cout), kept=count)

    def _shrinking(self, shape: Shape) -> ConsecutiveGroups:
        """Groups of consecutive filters, the channels read from the mask."""
        return ConsecutiveGroups(self.size(shape[3]))


def one_by_n(n: int) -> OneByN:
    """The uniform 1xN pattern: blocks of N consecutive filters x one channel x the whole kernel.

    Every group of N consecutive filters keeps the same number of input channels, so that threads
    get equal work.

    Args:
      n: N, filters in a block; a layer whose filter count it does not divide uses the largest
        divisor below it, and warns where that is less than half of what can be.

    Returns:
      A pattern for conv kernels and dense kernels that has a layout.

    Raises:
      ValueError: `n` is no integer of at least 1.

    Example:
      >>> from blocksparse_jax import layouts_from_scores
      >>> scores = {"conv": jnp.ones((3, 3, 32, 64))}
      >>> layouts_from_scores(scores, 0.75, pattern=one_by_n(16))["conv"].packed_shape
      (4, 8, 9, 16)

    Reference: Xiang et al., "SUBP", NeurIPS 2023; Lin et al., "1xN pattern for pruning
    convolutional neural networks", 2022.
    """
    return OneByN(_checks.positive_int("n", n))
