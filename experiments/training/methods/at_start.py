"""Masks that are chosen before training and stay."""

import dataclasses
from typing import Any

import blocksparse_jax as bsj
from blocksparse_jax import patterns
from blocksparse_jax.patterns import Pattern
from experiments.training.methods.options import AnyPattern, Options, Setup


@dataclasses.dataclass(frozen=True)
class Snip(AnyPattern):
    """Masks of any pattern, by the sensitivity of one batch's loss."""

    def arguments(self, setup: Setup) -> dict[str, Any]:
        """Those of any pattern, and the scores of the batch."""
        if setup.loss_fn is None or setup.batch is None:
            raise ValueError("batch: snip scores weights by the loss of one batch, got none")
        scores = bsj.snip(setup.loss_fn, setup.params, setup.batch)
        return super().arguments(setup) | {"scores": scores, "name": "snip"}


@dataclasses.dataclass(frozen=True)
class RandomWeights(Options):
    """Single weights drawn at random.

    Attributes:
      budget: how the layers share the density: uniform, erk, er or global.
    """

    budget: str = "uniform"

    def make_pattern(self) -> Pattern:
        """Single weights."""
        return patterns.unstructured()

    def arguments(self, setup: Setup) -> dict[str, Any]:
        """The drawn masks."""
        masks = bsj.random_masks(setup.key, setup.params, setup.sparsity, budget=self.budget)
        return {"masks": masks, "sparsity": setup.sparsity}


@dataclasses.dataclass(frozen=True)
class RandomChannels(Options):
    """Input channels drawn at random."""

    def make_pattern(self) -> Pattern:
        """Input channels."""
        return patterns.channel("input")

    def arguments(self, setup: Setup) -> dict[str, Any]:
        """The layouts of the drawn channels."""
        layouts = bsj.random_channel_layouts(setup.key, setup.params, setup.sparsity)
        return {"layouts": layouts, "sparsity": setup.sparsity}
