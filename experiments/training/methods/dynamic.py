"""Sets of weights that move: RigL, SET, SNFS, and any pattern."""

import dataclasses
from typing import Any

from blocksparse_jax import patterns
from blocksparse_jax.patterns import Pattern
from experiments.training.methods.options import (
    AnyPattern,
    Options,
    Setup,
    first_three_quarters,
)


@dataclasses.dataclass(frozen=True)
class Dynamic(Options):
    """Single weights that move until 3/4 of training.

    Attributes:
      update_every: steps between mask updates; None is 100, or an epoch if that is shorter.
      drop_fraction: of the kept weights, at the first update.
      budget: how the layers share the density: uniform, erk, er or global.
    """

    update_every: int | None = None
    drop_fraction: float = 0.3
    budget: str = "erk"

    def make_pattern(self) -> Pattern:
        """Single weights."""
        return patterns.unstructured()

    def arguments(self, setup: Setup) -> dict[str, Any]:
        """All options, the steps between updates as a schedule."""
        return {
            "sparsity": setup.sparsity,
            "schedule": first_three_quarters(setup, self.update_every),
            "drop_fraction": self.drop_fraction,
            "budget": self.budget,
            "key": setup.key,
        }


@dataclasses.dataclass(frozen=True)
class DropAndGrow(AnyPattern):
    """Sets of any pattern that move until 3/4 of training.

    Attributes:
      drop: magnitude, gradient, momentum or random: scores of what stays.
      grow: likewise, of what is grown.
      update_every: steps between mask updates; None is 100, or an epoch if that is shorter.
      drop_fraction: of the kept sets, at the first update.
    """

    drop: str = "magnitude"
    grow: str = "gradient"
    update_every: int | None = None
    drop_fraction: float = 0.3

    def arguments(self, setup: Setup) -> dict[str, Any]:
        """Those of any pattern, what is dropped and grown, and the steps of the updates."""
        return super().arguments(setup) | {
            "drop": self.drop,
            "grow": self.grow,
            "fraction": self.drop_fraction,
            "schedule": first_three_quarters(setup, self.update_every),
            "key": setup.key,
        }
