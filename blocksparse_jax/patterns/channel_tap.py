"""Channel taps: one tap of one input channel, of all filters."""

import dataclasses
from typing import ClassVar

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from blocksparse_jax import _checks
from blocksparse_jax.counts import Units
from blocksparse_jax.layout_nodes import Layout
from blocksparse_jax.patterns._base import Pattern, Shape


@dataclasses.dataclass(frozen=True)
class ChannelTap(Pattern):
    """The same taps of each channel for all filters: see `channel_tap`."""

    noun: ClassVar[str] = "channel taps"

    def _units(self, shape: Shape, label: str) -> Units:
        """One row of all (tap, channel)."""
        kh, kw, cin, cout = _checks.kernel_shape(label, shape)
        return Units(rows=1, sets=kh * kw * cin, weights=cout)

    def _sets(self, scores: Float[Array, "kh kw cin cout"], layout: Layout) -> Float[Array, "1 n"]:
        """The sum over the filters."""
        return scores.sum(-1).reshape(1, -1)

    def _mask(self, kept: Bool[Array, "1 n"], shape: Shape) -> Bool[Array, "kh kw cin cout"]:
        """The kept taps, of all filters."""
        return jnp.broadcast_to(kept.reshape(*shape[:3], 1), shape)


def channel_tap() -> ChannelTap:
    """The pattern of channel taps: all filters read the same taps of an input channel.

    Seen as a matrix product, whole columns of the matrix of patches are gone.

    Returns:
      A pattern for conv kernels and dense kernels (of which a channel tap is an input channel),
      without a layout, since every channel may keep other taps: it runs masked-dense.

    Example:
      >>> from blocksparse_jax import masks_from_scores
      >>> scores = {"conv": jnp.arange(576.0).reshape(3, 3, 8, 8)}
      >>> masks = masks_from_scores(scores, 0.75, pattern=channel_tap())
      >>> masks["conv"].any(-1).sum((0, 1)).tolist()
      [2, 2, 2, 2, 2, 2, 3, 3]

    Reference: Lebedev & Lempitsky, "Fast ConvNets using group-wise brain damage", CVPR 2016; the
    filter shapes of Wen et al., "Learning structured sparsity in deep neural networks", NIPS 2016.
    """
    return ChannelTap()
