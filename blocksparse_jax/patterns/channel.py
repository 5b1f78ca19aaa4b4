"""Whole channels: input channels that no filter reads, or filters that are gone."""

import dataclasses
import math
from typing import ClassVar, Literal

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from blocksparse_jax import _checks
from blocksparse_jax.counts import Units
from blocksparse_jax.layout import BlockLayout
from blocksparse_jax.layout_nodes import ConsecutiveGroups, Dense, Layout
from blocksparse_jax.patterns._base import Pattern, Shape
from blocksparse_jax.patterns.one_by_n import OneByN

Side = Literal["input", "output"]
SIDES: tuple[Side, ...] = ("input", "output")


@dataclasses.dataclass(frozen=True)
class Channel(Pattern):
    """Whole input or output channels: see `channel`."""

    noun: ClassVar[str] = "channels"
    any_rank: ClassVar[bool] = True
    side: Side = "output"

    @property
    def has_layout(self) -> bool:  # type: ignore[override]
        """Input channels: one group that holds all filters."""
        return self.side == "input"

    def _units(self, shape: Shape, label: str) -> Units:
        """One row of channels."""
        if len(shape) < 2 or min(shape) < 1:
            raise ValueError(
                f"{label}: expected a kernel [..., cin, cout] with positive sizes, got shape "
                f"{tuple(shape)}"
            )
        channels = shape[-2 if self.side == "input" else -1]
        return Units(rows=1, sets=channels, weights=math.prod(shape) // channels)

    def _sets(self, scores: Float[Array, "..."], layout: Layout) -> Float[Array, "1 channels"]:
        """The sum over each channel."""
        others = [axis for axis in range(scores.ndim) if axis != self._axis(scores.ndim)]
        return scores.sum(tuple(others))[None]

    def _mask(self, kept: Bool[Array, "1 channels"], shape: Shape) -> Bool[Array, "..."]:
        """All weights of the kept channels."""
        column = kept.reshape(-1, 1) if self.side == "input" else kept.reshape(1, -1)
        return jnp.broadcast_to(column, shape)

    def _layout_of(
        self, kept: Bool[Array, "1 channels"], shape: Shape, count: int
    ) -> BlockLayout | Dense:
        """One group of all filters; filters that are gone have no layout, nor have 1-D kernels."""
        if self.side == "output" or len(shape) != 4:
            return Dense()
        return OneByN(shape[3])._layout_of(kept, shape, count)

    def _shrinking(self, shape: Shape) -> ConsecutiveGroups | Dense:
        """One group of all filters, the channels read from the mask."""
        has_layout = self.side == "input" and len(shape) == 4
        return ConsecutiveGroups(shape[3]) if has_layout else Dense()

    def _axis(self, rank: int) -> int:
        return rank - 2 if self.side == "input" else rank - 1


def channel(side: Side = "output") -> Channel:
    """The pattern of whole channels.

    Args:
      side: "output" removes filters, "input" removes input channels, the same for all filters.

    Returns:
      A pattern for conv kernels, dense kernels and the kernels `[k, cin, cout]` of 1-D
      convolutions. Input channels of the first two have a layout, one group of all filters; output
      channels run masked-dense.

    Raises:
      ValueError: an unknown side.

    Example:
      >>> from blocksparse_jax import masks_from_scores
      >>> scores = {"conv": jnp.arange(576.0).reshape(3, 3, 8, 8)}
      >>> masks = masks_from_scores(scores, 0.75, pattern=channel("output"))
      >>> masks["conv"].any((0, 1, 2)).astype(int).tolist()
      [0, 0, 0, 0, 0, 0, 1, 1]

    Reference: Li et al., "Pruning filters for efficient convnets", ICLR 2017 (output); the random
    channel baseline (RC) of Ma et al., "HRBP", CPAL 2024 (input).
    """
    return Channel(_checks.choice("side", side, SIDES))
