"""Sparsity that rises while the network trains."""

import dataclasses
from typing import Any

import blocksparse_jax as bsj
from experiments.training.methods.options import AnyPattern, Setup


@dataclasses.dataclass(frozen=True)
class Gradual(AnyPattern):
    """Masks of any pattern that grow sparser until half of training.

    Our choice: the start and the end.

    Attributes:
      update_every: steps between mask updates; None is 100, or an epoch if that is shorter.
    """

    update_every: int | None = None

    def check(self) -> None:
        """A pattern that fixes its density has no way from dense to sparse."""
        pattern = self.make_pattern()
        if pattern.density is not None:
            raise ValueError(
                f"pattern: {self.pattern!r} always keeps {pattern.density:g} of the weights, so "
                "there is nothing to prune gradually; use --method magnitude or sr-ste, or another "
                "pattern"
            )

    def arguments(self, setup: Setup) -> dict[str, Any]:
        """Those of any pattern, and the pruning steps."""
        end, every = max(1, setup.length.total // 2), setup.every(self.update_every)
        return super().arguments(setup) | {"schedule": bsj.between(0, end, every=every)}
