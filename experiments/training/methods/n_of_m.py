"""N:M sparsity: SR-STE and STE."""

import dataclasses
from typing import Any

from blocksparse_jax import patterns
from blocksparse_jax.patterns import Pattern
from experiments.training.methods.options import Options, Setup


@dataclasses.dataclass(frozen=True)
class NOfM(Options):
    """N:M sparsity.

    Attributes:
      n: kept weights of every m.
      m: consecutive weights along the input axis.
    """

    n: int = 2
    m: int = 4

    def make_pattern(self) -> Pattern:
        """N:M."""
        return patterns.n_of_m(self.n, self.m)

    def arguments(self, setup: Setup) -> dict[str, Any]:
        """All options."""
        return dataclasses.asdict(self)


@dataclasses.dataclass(frozen=True)
class SrSte(NOfM):
    """N:M sparsity with decay of the pruned weights.

    Attributes:
      decay: pull of pruned weights towards zero.
    """

    decay: float = 2e-4
