"""Networks that become smaller while they train: channels are removed between two steps.

These methods mask nothing: training is dense before and after, and the network that is left is the
sparse one.
"""

import dataclasses
from typing import Any

import numpy as np
import optax

import blocksparse_jax as bsj
from blocksparse_jax import _checks, tree
from experiments.models.spaces import branches, channel_spaces, with_branch_factors
from experiments.training.execution import State, channels_of, without_channels
from experiments.training.methods.options import Operation, Options, Setup

_DEAD = 1e-8  # a factor that is zero up to rounding


class Penalized(Options):
    """A method that masks no weights: its penalty brings channels to zero."""

    def combined(
        self,
        method: optax.GradientTransformation,
        optimizer: optax.GradientTransformation,
        setup: Setup,
    ) -> optax.GradientTransformation:
        """The penalty joins the gradient; no weights are masked."""
        return optax.chain(method, optimizer)


@dataclasses.dataclass(frozen=True)
class Shrinking(Penalized):
    """A method that removes the channels that its penalty has brought to zero, period by period."""

    every: int | None = None

    def fixed_because(self) -> str:
        """What decides how much is removed, in place of `--sparsity`."""
        return "channels that its penalty brings to zero are removed, however many they are"

    def operations(self, setup: Setup) -> dict[int, Operation]:
        """Removes channels at the end of each period but the last, after which nothing trains."""
        epochs = setup.length.total // setup.length.steps_per_epoch
        every = max(1, min(10, epochs // 2)) if self.every is None else self.every
        period = _checks.positive_int("every", every) * setup.length.steps_per_epoch
        return dict.fromkeys(range(period, setup.length.total, period), self._shrink)

    def _shrink(self, state: State, setup: Setup) -> State:
        return without_channels(state, self._kept(state))

    def _kept(self, state: State) -> dict[str, np.ndarray]:
        """The channels that stay."""
        raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class PruneTrain(Shrinking):
    """A group lasso over channels, whose strength follows from the first loss.

    Attributes:
      every: epochs between two removals; None is 10 (the paper has 5 for ImageNet), or half of a
        run of fewer than 20.
      ratio: of the penalty to the whole loss at the first step.
      threshold: a channel goes where all its weights are smaller.
    """

    ratio: float = 0.2
    threshold: float = 1e-4

    def arguments(self, setup: Setup) -> dict[str, Any]:
        """The network's channel spaces, and the ratio."""
        return {"spaces": channel_spaces(setup.params), "ratio": self.ratio}

    def _kept(self, state: State) -> dict[str, np.ndarray]:
        return bsj.channels_above(channel_spaces(state.params), state.params, self.threshold)


@dataclasses.dataclass(frozen=True)
class Sss(Shrinking):
    """L1 on scaling factors by a proximal gradient, which makes them exactly zero.

    Attributes:
      every: epochs between two removals; None is 10, or half of a run of fewer than 20.
      factors: "neurons", the scales of batch norms; "blocks", one factor of each residual branch;
        or "both". None is the paper's choice: blocks in a ResNet, neurons elsewhere.
      penalty: gamma, of L1.
      momentum: of the scales.
    """

    factors: str | None = None
    penalty: float = 5e-4
    momentum: float = 0.9

    def check(self) -> None:
        """ValueError for other factors."""
        if self.factors is not None:
            _checks.choice("factors", self.factors, ("neurons", "blocks", "both"))

    def prepare(self, params: Any, batch_stats: Any, sparsity: float) -> tuple[Any, Any]:
        """A factor of each branch."""
        has_branches = bool(branches(params))
        if self.factors in ("blocks", "both") and not has_branches:
            raise ValueError(
                f"factors: {self.factors!r} scales residual branches, and the network has none; "
                "use --sss.factors neurons, or a ResNet"
            )
        if self.factors == "neurons" or not has_branches:
            return params, batch_stats
        return with_branch_factors(params), batch_stats

    def arguments(self, setup: Setup) -> dict[str, Any]:
        """The optimizer of all other parameters, and the options."""
        return {
            "optimizer": setup.optimizer,
            "learning_rate": setup.learning_rate,
            "penalty": self.penalty,
            "momentum": self.momentum,
            "where": self._is_factor(setup.params),
        }

    def _is_factor(self, params: Any) -> tree.Where:
        """The chosen factors; those of branches alone where `prepare` put them there."""
        blocks_alone = self.factors == "blocks" or (self.factors is None and branches(params))
        return bsj.branch_factors if blocks_alone else bsj.scaling_factors

    def combined(
        self,
        method: optax.GradientTransformation,
        optimizer: optax.GradientTransformation,
        setup: Setup,
    ) -> optax.GradientTransformation:
        """The method, which holds the optimizer."""
        return method

    def _kept(self, state: State) -> dict[str, np.ndarray]:
        kept, params, sizes = {}, state.params, channels_of(state)
        if self._is_factor(params) is bsj.scaling_factors:
            scales = bsj.channel_maxima(channel_spaces(params), params, where=bsj.norm_scales)
            kept = {
                space: (values > _DEAD) | (np.arange(values.size) == values.argmax())
                for space, values in scales.items()
                if values.size
            }
        for block, inner in branches(params).items():
            if abs(params[block].get("factor", 1.0)) <= _DEAD:
                kept |= {space: np.zeros(sizes[space], bool) for space in inner}
        return kept


@dataclasses.dataclass(frozen=True)
class Slimming(Penalized):
    """L1 on the scales of batch norms, then removal of the channels of the smallest ones.

    As many channels go as take `--sparsity` of the sparse layers' weights with them. Our choice: a
    fraction of weights in the place of channels, half of training for the penalty.

    Attributes:
      penalty: lambda, of L1, until the channels go.
      prune_at: fraction of training after which they go; the rest fine-tunes what is left.
    """

    penalty: float = 1e-4
    prune_at: float = 0.5

    def check(self) -> None:
        """ValueError unless channels go within training."""
        _checks.fraction("prune_at", self.prune_at, low_open=True)

    def fixed_sparsity(self) -> None:
        """The run sets it."""

    def arguments(self, setup: Setup) -> dict[str, Any]:
        """The penalty, until the channels go."""
        return {"penalty": self.penalty, "until": self._step(setup)}

    def operations(self, setup: Setup) -> dict[int, Operation]:
        """Removes channels once."""
        return {self._step(setup): _slim}

    def _step(self, setup: Setup) -> int:
        return max(1, int(self.prune_at * setup.length.total))


def _slim(state: State, setup: Setup) -> State:
    spaces = channel_spaces(state.params)
    scales = bsj.channel_maxima(spaces, state.params, where=bsj.norm_scales)
    return without_channels(state, largest_for(scales, spaces, state.params, setup.sparsity))


def largest_for(
    scores: dict[str, np.ndarray], spaces: Any, params: Any, sparsity: float
) -> dict[str, np.ndarray]:
    """The channels of the largest scores, as few removed as take a fraction of the weights along.

    Args:
      scores: `{space: vector}`, ranked over all spaces together.
      spaces: `{space: [(leaf name, axis), ...]}`.
      params: the parameters.
      sparsity: fraction of the sparse layers' weights to remove.

    Returns:
      `{space: bool vector}`, True = stays; the best channel of each space does in any case.
    """
    shapes = tree.shapes(tree.choose(None, params))
    channels = sum(vector.size for vector in scores.values())

    def left(gone: int) -> float:
        """Weights after the removal of that many channels."""
        counts = {name: np.array(shape) for name, shape in shapes.items()}
        for space, kept in bsj.largest_channels(scores, gone / channels).items():
            for name, axis in spaces[space]:
                if name in counts:
                    counts[name][axis] = kept.sum()
        return sum(count.prod() for count in counts.values())

    target = (1 - sparsity) * left(0)
    few, many = 0, channels - 1  # left(many) is as little as can be
    while few < many:
        middle = (few + many) // 2
        few, many = (few, middle) if left(middle) <= target else (middle + 1, many)
    return bsj.largest_channels(scores, few / channels)
