"""One-shot magnitude pruning."""

import dataclasses
from collections.abc import Callable

from blocksparse_jax import _checks
from blocksparse_jax.patterns import Pattern
from blocksparse_jax.transforms.one_shot import GRANULARITIES
from experiments.training.methods.options import AnyPattern


@dataclasses.dataclass(frozen=True)
class Magnitude(AnyPattern):
    """Masks by the magnitude of the initial weights.

    Attributes:
      granularity: in place of a pattern, weight, vector (a row of a kernel slice), kernel (a kernel
        slice) or filter.
    """

    granularity: str | None = None

    def check(self) -> None:
        """A granularity is a pattern."""
        self.make_pattern()
        if self.granularity is not None and self.pattern != Magnitude.pattern:
            raise ValueError(
                f"granularity: {self.granularity!r} is a pattern of its own, so pattern "
                f"{self.pattern!r} has no effect; leave one of them out"
            )

    def make_pattern(self) -> Pattern:
        """The pattern of the granularity, or that which `pattern` names."""
        if self.granularity is None:
            return super().make_pattern()
        names: dict[str, Callable[[], Pattern]] = dict(GRANULARITIES)
        return names[_checks.choice("granularity", self.granularity, names)]()
