"""Sets of weights that move: RigL, SET, SNFS, and any pattern."""

import dataclasses
from typing import Any, ClassVar

from experiments.training.methods.options import (
    AnyPattern,
    Setup,
    first_three_quarters,
)


@dataclasses.dataclass(frozen=True)
class Dynamic(AnyPattern):
    """Single weights, or sets of any pattern, that move until 3/4 of training.

    Attributes:
      update_every: steps between mask updates; None is 100, or an epoch if that is shorter.
      drop_fraction: of the kept weights, at the first update.
    """

    draws_in_steps: ClassVar[bool] = True
    budget: str = "erk"
    update_every: int | None = None
    drop_fraction: float = 0.3

    def arguments(self, setup: Setup) -> dict[str, Any]:
        """All options, the steps between updates as a schedule."""
        return super().arguments(setup) | {
            "schedule": first_three_quarters(setup, self.update_every),
            "drop_fraction": self.drop_fraction,
            "key": setup.key,
        }


@dataclasses.dataclass(frozen=True)
class Set(Dynamic):
    """As `Dynamic`, with what SET alone has.

    Attributes:
      drop: magnitude, or signed: the smallest positive and the largest negative weights each.
    """

    budget: str = "er"
    drop: str = "magnitude"

    def arguments(self, setup: Setup) -> dict[str, Any]:
        """Those of `Dynamic`, and what is dropped."""
        return super().arguments(setup) | {"drop": self.drop}


@dataclasses.dataclass(frozen=True)
class DropAndGrow(AnyPattern):
    """Sets of any pattern that move until 3/4 of training.

    Attributes:
      drop: magnitude, gradient, momentum or random: scores of what stays.
      grow: likewise, of what is grown.
      update_every: steps between mask updates; None is 100, or an epoch if that is shorter.
      drop_fraction: of the kept sets, at the first update.
    """

    draws_in_steps: ClassVar[bool] = True
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
