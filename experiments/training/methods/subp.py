"""SUBP."""

import dataclasses
from typing import Any, ClassVar

import blocksparse_jax as bsj
from blocksparse_jax import _checks, patterns
from blocksparse_jax.patterns import Pattern
from experiments.training.methods.options import Options, Setup


@dataclasses.dataclass(frozen=True)
class Subp(Options):
    """SUBP, soft from 4% to 72% of training: the paper's epochs 10 to 180, of 250.

    Attributes:
      block: filters in a 1xN block.
      criterion: l1, l2 or bpar.
      curve: cubic, linear, cos or exp, of the progress from dense to the final sparsity.
      soft: pruned weights are trained too, until the pattern is final.
      version: of the paper's code: 2 scores the kept weights, 1 the pruned ones too.
      update_every: steps between mask updates; None is an epoch.
    """

    draws_in_steps: ClassVar[bool] = True
    block: int = 16
    criterion: str = "l1"
    curve: str = "cubic"
    soft: bool = True
    version: int = 2
    update_every: int | None = None

    def make_pattern(self) -> Pattern:
        """1xN blocks."""
        return patterns.one_by_n(_checks.positive_int("block", self.block))

    def arguments(self, setup: Setup) -> dict[str, Any]:
        """All options, the steps between updates as a schedule."""
        options = dataclasses.asdict(self)
        every, total = options.pop("update_every"), setup.length.total
        every = setup.length.steps_per_epoch if every is None else setup.every(every)
        every = min(every, max(1, total // 3))
        start, end = (round(total * epoch / 250 / every) * every for epoch in (10, 180))
        schedule = bsj.between(start, max(end, start + every), every=every)
        return options | {"sparsity": setup.sparsity, "schedule": schedule, "key": setup.key}
