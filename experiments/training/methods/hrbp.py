"""HRBP with masks that stay, and with channels that move."""

import dataclasses
from typing import Any

from blocksparse_jax import patterns
from blocksparse_jax.patterns import Pattern
from experiments.models.spaces import with_channel_orders
from experiments.training.methods.options import Options, Setup, first_three_quarters


@dataclasses.dataclass(frozen=True)
class Hrbp(Options):
    """HRBP with masks that stay.

    Attributes:
      group_size: filters in a group.
      block_density: fraction of the taps that a group keeps; 1 keeps whole kernels; None is 1/3,
        and more where a layer's density needs it.
      channel_block: input channels come in aligned runs of this many.
      channel_order: reorder the channels once, before training, so that these runs lose little;
        with magnitude scores.
      budget: how the layers share the density: uniform, erk, er or global.
      scores: magnitude, gradient or random, of the first masks.
    """

    group_size: int = 32
    block_density: float | None = None
    channel_block: int = 1
    channel_order: bool = False
    budget: str = "uniform"
    scores: str = "magnitude"

    def check(self) -> None:
        """A reordering serves runs of channels."""
        if self.channel_order and (self.channel_block == 1 or self.scores != "magnitude"):
            raise ValueError(
                "channel_order: it serves runs of channels by magnitude, expected channel_block=8 "
                f"or the like and scores='magnitude', got channel_block={self.channel_block} and "
                f"scores={self.scores!r}"
            )

    def make_pattern(self) -> Pattern:
        """HRBP's blocks."""
        return patterns.block(self.group_size, self.block_density, self.channel_block)

    def arguments(self, setup: Setup) -> dict[str, Any]:
        """All options but the order of the channels, which `prepare` sees to."""
        options = dataclasses.asdict(self)
        del options["channel_order"]
        return options | {"sparsity": setup.sparsity, "key": setup.key}

    def prepare(self, params: Any, batch_stats: Any, sparsity: float) -> tuple[Any, Any]:
        """Similar channels side by side, where asked for."""
        if not self.channel_order:
            return params, batch_stats
        names = ("channel_block", "group_size", "block_density", "budget")
        sizes = {name: getattr(self, name) for name in names}
        return with_channel_orders(params, batch_stats, sparsity, **sizes)


@dataclasses.dataclass(frozen=True)
class HrbpDynamic(Hrbp):
    """HRBP whose channels move until 3/4 of training.

    Attributes:
      update_every: steps between mask updates; None is 100, or an epoch if that is shorter.
      drop_fraction: of the kept channels, at the first update.
    """

    update_every: int | None = None
    drop_fraction: float = 0.3

    def arguments(self, setup: Setup) -> dict[str, Any]:
        """Those of static HRBP, and the steps of the updates."""
        options = super().arguments(setup)
        return options | {"schedule": first_three_quarters(setup, options.pop("update_every"))}
