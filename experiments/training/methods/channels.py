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
from experiments.models.spaces import channel_spaces
from experiments.training.execution import State
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
        spaces = channel_spaces(state.params)
        return _without(state, spaces, self._kept(spaces, state.params))

    def _kept(self, spaces: Any, params: Any) -> dict[str, np.ndarray]:
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

    def _kept(self, spaces: Any, params: Any) -> dict[str, np.ndarray]:
        return bsj.channels_above(spaces, params, self.threshold)


@dataclasses.dataclass(frozen=True)
class Sss(Shrinking):
    """L1 on the scales of batch norms by a proximal gradient, which makes them exactly zero.

    Attributes:
      every: epochs between two removals; None is 10, or half of a run of fewer than 20.
      penalty: gamma, of L1.
      momentum: of the scales.
    """

    penalty: float = 5e-4
    momentum: float = 0.9

    def arguments(self, setup: Setup) -> dict[str, Any]:
        """The optimizer of all other parameters, and the options."""
        return {
            "optimizer": setup.optimizer,
            "learning_rate": setup.learning_rate,
            "penalty": self.penalty,
            "momentum": self.momentum,
        }

    def combined(
        self,
        method: optax.GradientTransformation,
        optimizer: optax.GradientTransformation,
        setup: Setup,
    ) -> optax.GradientTransformation:
        """The method, which holds the optimizer."""
        return method

    def _kept(self, spaces: Any, params: Any) -> dict[str, np.ndarray]:
        scales = bsj.channel_maxima(spaces, params, where=bsj.norm_scales)
        return {
            space: (values > _DEAD) | (np.arange(values.size) == values.argmax())
            for space, values in scales.items()
        }


@dataclasses.dataclass(frozen=True)
class Slimming(Penalized):
    """L1 on the scales of batch norms, then removal of the channels of the smallest ones.

    As many channels go as take `--sparsity` of the sparse layers' weights with them.

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
    return _without(state, spaces, largest_for(scales, spaces, state.params, setup.sparsity))


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


def _without(state: State, spaces: Any, kept: dict[str, np.ndarray]) -> State:
    """The state with only these channels; the same one where all stay."""
    if all(keeps.all() for keeps in kept.values()):
        return state
    trees = state.params, state.batch_stats, state.opt_state
    params, batch_stats, opt_state = bsj.remove_channels(spaces, kept, *trees)
    return dataclasses.replace(state, params=params, batch_stats=batch_stats, opt_state=opt_state)
