"""Weights that make room for others, or for fewer of them."""

import dataclasses
import itertools
from typing import Any, ClassVar

import blocksparse_jax as bsj
from blocksparse_jax import patterns
from blocksparse_jax.patterns import Pattern
from blocksparse_jax.schedules import AnyOf, Schedule
from experiments.training.methods.options import (
    AnyPattern,
    Options,
    Setup,
    between_parts,
    first_three_quarters,
)


@dataclasses.dataclass(frozen=True)
class DeepR(Options):
    """Single weights on a random walk, rewired at every step.

    Attributes:
      rate: of the noise and of L1, where the paper has the learning rate.
      temperature: of the noise, at the start.
      final_temperature: at the end of training.
      l1: pull towards zero.
      budget: how the layers share the density: uniform, erk, er or global.
    """

    draws_in_steps: ClassVar[bool] = True
    rate: float = 0.01
    temperature: float = 1e-5
    final_temperature: float = 1e-15
    l1: float = 1e-5
    budget: str = "erk"

    def make_pattern(self) -> Pattern:
        """Single weights."""
        return patterns.unstructured()

    def arguments(self, setup: Setup) -> dict[str, Any]:
        """All options; every step rewires."""
        return dataclasses.asdict(self) | {
            "sparsity": setup.sparsity,
            "schedule": bsj.between(0, max(1, setup.length.total - 1)),
            "key": setup.key,
        }


@dataclasses.dataclass(frozen=True)
class Dsr(AnyPattern):
    """Weights, kernels (`--dsr.pattern kernel:mean`) or channels that move between layers.

    Attributes:
      threshold: of the mean size of a set of weights, at the start.
      fraction: of the kept sets, how many should move at an update.
      update_every: steps between mask updates, until 3/4 of training. None is the authors' 100,
        200, 400 and 800 steps, from the start, 1/8, 2/5 and 7/10 of training on (their epochs 0,
        25, 80 and 140 of 200), and in runs below 4000 steps the first is a fortieth of the run.
    """

    draws_in_steps: ClassVar[bool] = True
    threshold: float = 1e-3
    fraction: float = 0.1
    update_every: int | None = None

    def arguments(self, setup: Setup) -> dict[str, Any]:
        """All options, the steps between updates as a schedule."""
        return super().arguments(setup) | {
            "threshold": self.threshold,
            "fraction": self.fraction,
            "schedule": self._schedule(setup),
            "key": setup.key,
        }

    def _schedule(self, setup: Setup) -> Schedule:
        if self.update_every is not None:
            return first_three_quarters(setup, self.update_every)
        first, total = setup.part(40, most=100), setup.length.total
        bounds = [total * epoch // 200 for epoch in (0, 25, 80, 140, 200)]
        slower = [
            bsj.every(first * 2**i, start, until=end)
            for i, (start, end) in enumerate(itertools.pairwise(bounds))
            if start < end
        ]
        return AnyOf(tuple(slower))


@dataclasses.dataclass(frozen=True)
class GraNet(Options):
    """Weights pruned over all layers until 11/16 of training, a part of them exchanged.

    Attributes:
      pattern: unstructured, kernel, window, channel, fan_in or one_by_n, with its arguments behind
        colons: one_by_n:16.
      initial_sparsity: sparsity at the start.
      fraction: of the kept weights, exchanged at the first update.
      final_fraction: at the last update.
      update_every: steps between mask updates; None is the authors' 1000, or in runs below 62,000
        steps a 62nd of the run, but at least 10, for no update applies a gradient.
    """

    pattern: str = "unstructured"
    initial_sparsity: float = 0.0
    fraction: float = 0.5
    final_fraction: float = 0.005
    update_every: int | None = None

    def make_pattern(self) -> Pattern:
        """The pattern that `pattern` names."""
        return AnyPattern(self.pattern).make_pattern()

    def arguments(self, setup: Setup) -> dict[str, Any]:
        """All options, the steps of the updates as a schedule."""
        every = setup.every(self.update_every, setup.part(62, least=10, most=1000))
        return {
            "sparsity": setup.sparsity,
            "pattern": self.make_pattern(),
            "initial_sparsity": self.initial_sparsity,
            "fraction": self.fraction,
            "final_fraction": self.final_fraction,
            "schedule": between_parts(setup, 0.0, 110 / 160, every),
            "key": setup.key,
        }


@dataclasses.dataclass(frozen=True)
class SRigL(Options):
    """As many weights in every filter, moved until 3/4 of training.

    Attributes:
      update_every: steps between mask updates; None is 100, or an epoch if that is shorter.
      drop_fraction: of the kept weights, at the first update.
      min_salient: the part of its fan-in that a filter needs as salient weights.
      budget: how the layers share the density: uniform, erk or er.
    """

    update_every: int | None = None
    drop_fraction: float = 0.3
    min_salient: float = 0.3
    budget: str = "erk"

    def make_pattern(self) -> Pattern:
        """As many weights in every filter."""
        return patterns.fan_in()

    def arguments(self, setup: Setup) -> dict[str, Any]:
        """All options, the steps between updates as a schedule."""
        return {
            "sparsity": setup.sparsity,
            "schedule": first_three_quarters(setup, self.update_every),
            "drop_fraction": self.drop_fraction,
            "min_salient": self.min_salient,
            "budget": self.budget,
            "key": setup.key,
        }


@dataclasses.dataclass(frozen=True)
class Mest(AnyPattern):
    """Sets of any pattern that mutate until 3/4 of training, fewer towards the end of that.

    Attributes:
      fraction: of the kept sets, at first.
      gradient_weight: of the gradient's size beside the weight's.
      soft: above the target between two updates.
      update_every: steps between mask updates; None is a 32nd of the run, the authors' 5 epochs of
        160, but at least 10 steps.
    """

    draws_in_steps: ClassVar[bool] = True
    fraction: float = 0.2
    gradient_weight: float = 0.1
    soft: bool = False
    update_every: int | None = None

    def arguments(self, setup: Setup) -> dict[str, Any]:
        """All options, the steps of the updates as a schedule, which waits for one period."""
        every, total = setup.every(self.update_every, setup.part(32, least=10)), setup.length.total
        start = min(total // 2, every)
        return super().arguments(setup) | {
            "fraction": self.fraction,
            "gradient_weight": self.gradient_weight,
            "soft": self.soft,
            "schedule": bsj.between(start, max(start + 1, int(0.75 * total)), every=every),
            "key": setup.key,
        }


@dataclasses.dataclass(frozen=True)
class Narang(Options):
    """Single weights pruned by a rising threshold, from the end of the first epoch to half of all.

    Attributes:
      slope_ratio: how much faster the threshold rises from a quarter of training on.
      update_every: steps between mask updates; None is 100, or an epoch if that is shorter.
      budget: how the layers share the density: uniform, erk or er.
    """

    slope_ratio: float = 1.5
    update_every: int | None = None
    budget: str = "uniform"

    def make_pattern(self) -> Pattern:
        """Single weights."""
        return patterns.unstructured()

    def arguments(self, setup: Setup) -> dict[str, Any]:
        """All options, the steps of the updates as a schedule."""
        first_epoch = setup.length.steps_per_epoch / setup.length.total
        return {
            "sparsity": setup.sparsity,
            "ramp": setup.length.total // 4,
            "schedule": between_parts(setup, min(0.125, first_epoch), 0.5, self.update_every),
            "slope_ratio": self.slope_ratio,
            "budget": self.budget,
        }
