"""Lottery tickets: train, prune by magnitude, go back to an early step, again and again."""

import dataclasses
from typing import Any

import blocksparse_jax as bsj
from blocksparse_jax import _checks
from experiments.training.execution import State
from experiments.training.length import Length, Passes
from experiments.training.methods.options import AnyPattern, Operation, Setup


@dataclasses.dataclass(frozen=True)
class Lottery(AnyPattern):
    """Iterative magnitude pruning with rewinding, all passes within the epochs of the run.

    A run of R rounds has R + 1 passes, the first of them dense. The learning rate follows its whole
    schedule in each. Our choice: the passes share the epochs of the run, momentum goes back with
    the weights, and the early step.

    Attributes:
      prune_fraction: of what is left, pruned in each round.
      rewind_fraction: the part of a pass after which the weights are those that every later pass
        starts from; 0 is the initial ones.
    """

    budget: str = "global"
    prune_fraction: float = 0.2
    rewind_fraction: float = 0.03

    def check(self) -> None:
        """ValueError for a fraction out of range."""
        _checks.fraction("prune_fraction", self.prune_fraction, low_open=True)
        _checks.fraction("rewind_fraction", self.rewind_fraction)

    def count(self, sparsity: float) -> int:
        """How many passes a run has: as many as there are rounds of pruning, and one."""
        return len(bsj.lottery_sparsities(sparsity, self.prune_fraction)) + 1

    def passes(self, length: Length, sparsity: float) -> Passes:
        """All of the same length."""
        rounds = self.count(sparsity) - 1
        total, fraction = length.total, self.rewind_fraction
        early = int(fraction * total / (1 + rounds * (1 - fraction)))
        end = (total + rounds * early) // (rounds + 1)
        if end == early:
            raise ValueError(
                f"epochs: {rounds} rounds of pruning need at least {rounds + 1} steps, and the run "
                f"has {total}; train for more epochs, or raise lottery.prune_fraction "
                f"({self.prune_fraction:g})"
            )
        return Passes(early, end, rounds + 1)

    def arguments(self, setup: Setup) -> dict[str, Any]:
        """The pattern, and the updates before which the passes end."""
        passes = self.passes(setup.length, setup.sparsity)
        arguments = super().arguments(setup) | {"name": "lottery"}
        del arguments["budget"]
        if not passes.ends:
            return arguments
        first, last = passes.ends[0] - 1, passes.ends[-1] - 1
        # of a single round the schedule has a second step, at which nothing happens
        schedule = bsj.between(first, max(last, first + 1), every=passes.end - passes.early)
        return arguments | {"schedule": schedule}

    def operations(self, setup: Setup) -> dict[int, Operation]:
        """Keeps the early state, and at the end of every pass but the last prunes and rewinds."""
        passes = self.passes(setup.length, setup.sparsity)
        sparsities = bsj.lottery_sparsities(setup.sparsity, self.prune_fraction)
        rounds = {
            end: self._pruning(sparsity)
            for end, sparsity in zip(passes.ends, sparsities, strict=True)
        }
        return {0: _remember, passes.early: _remember} | rounds

    def _pruning(self, sparsity: float) -> Operation:
        """The operation that leaves a sparsity."""

        def prune(state: State, setup: Setup) -> State:
            masks = bsj.lottery_ticket(
                state.params,
                bsj.get_masks(state.opt_state),
                sparsity,
                pattern=self.make_pattern(),
                budget=self.budget,
            )
            early = state.aside
            return dataclasses.replace(
                state,
                params=bsj.apply_masks(early["params"], masks),
                batch_stats=early["batch_stats"],
                opt_state=bsj.replace_masks(early["opt_state"], masks),
            )

        return prune


def _remember(state: State, setup: Setup) -> State:
    """Keeps all of the state: moments and the learning rate go back with the weights."""
    fields = ("params", "batch_stats", "opt_state")
    return dataclasses.replace(state, aside={name: getattr(state, name) for name in fields})
