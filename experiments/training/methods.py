"""The options of each training method, and the arguments of its function that they become.

An options class holds what `--METHOD.OPTION` sets. It says which pattern they mean and what the
library's function is called with; when masks change is the library's business (`get_spec`).
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax

import blocksparse_jax as bsj
from blocksparse_jax import _checks, patterns
from blocksparse_jax.patterns import Pattern
from experiments.models.spaces import with_channel_orders
from experiments.training.length import Length
from experiments.training.patterns import named


class Setup(NamedTuple):
    """What a run gives to its method.

    Attributes:
      sparsity: fraction of the sparse layers' weights that is removed.
      key: JAX random key of the method.
      length: of the run.
      params: the initial parameters.
      loss_fn: (params, batch) -> loss of the dense network.
      batch: of the training set, (images, labels); None where there is none.
    """

    sparsity: float
    key: jax.Array
    length: Length
    params: Any
    loss_fn: Callable[[Any, Any], jax.Array] | None = None
    batch: Any = None

    def every(self, update_every: int | None) -> int:
        """Steps between updates: as asked, else 100, or an epoch if that is shorter."""
        if update_every is None:
            return min(100, self.length.steps_per_epoch)
        return _checks.positive_int("update_every", update_every)


@dataclasses.dataclass(frozen=True)
class Options:
    """No options, no pattern: dense training, and the base of all others."""

    def make_pattern(self) -> Pattern | None:
        """Makes the pattern that the options mean; None trains dense."""
        return None

    def fixed_sparsity(self) -> float | None:
        """The sparsity that the pattern fixes, 0 without one; None where the run sets it."""
        pattern = self.make_pattern()
        density = pattern.density if pattern else 1.0
        return None if density is None else 1 - density

    def check(self) -> None:
        """ValueError where options exclude each other; the library checks each one's value."""

    def arguments(self, setup: Setup) -> dict[str, Any]:
        """Returns the arguments of the method's function in a run.

        Args:
          setup: what the run gives to its method.
        """
        return {}

    def prepare(self, params: Any, batch_stats: Any, sparsity: float) -> tuple[Any, Any]:
        """The network that training starts from, made of the initial one."""
        return params, batch_stats


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
        return options | {"schedule": _first_three_quarters(setup, options.pop("update_every"))}


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
            "schedule": _first_three_quarters(setup, self.update_every),
            "drop_fraction": self.drop_fraction,
            "budget": self.budget,
            "key": setup.key,
        }


@dataclasses.dataclass(frozen=True)
class AnyPattern(Options):
    """Masks of any pattern.

    Attributes:
      pattern: unstructured, kernel, window, channel, n_of_m, one_by_n or block, with its arguments
        behind colons: one_by_n:16, block:32, n_of_m:2:4.
      budget: how the layers share the density: uniform, erk, er or global.
    """

    pattern: str = "unstructured"
    budget: str = "uniform"

    def make_pattern(self) -> Pattern:
        """The pattern that `pattern` names."""
        return named(self.pattern)

    def arguments(self, setup: Setup) -> dict[str, Any]:
        """The pattern, the budget, and the sparsity unless the pattern fixes it."""
        pattern = self.make_pattern()
        sparsity = setup.sparsity if pattern.density is None else None
        return {"sparsity": sparsity, "pattern": pattern, "budget": self.budget}


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
class Gradual(AnyPattern):
    """Masks of any pattern that grow sparser until half of training.

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
            "schedule": _first_three_quarters(setup, self.update_every),
            "key": setup.key,
        }


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


def _first_three_quarters(setup: Setup, update_every: int | None) -> bsj.schedules.Every:
    """RigL's schedule: masks move until 3/4 of training."""
    return bsj.every(setup.every(update_every), until=max(1, int(0.75 * setup.length.total)))
