"""Structured pruning: channels of a trained network, and groups that a penalty drives to zero."""

import dataclasses
from typing import Any

import jax

import blocksparse_jax as bsj
from blocksparse_jax import _checks, patterns
from blocksparse_jax.patterns import Pattern
from blocksparse_jax.patterns.channel import Channel
from experiments.models.spaces import channel_spaces, in_branch, inner_spaces
from experiments.training.execution import State, without_channels
from experiments.training.methods.options import (
    AnyPattern,
    Operation,
    Options,
    Setup,
    between_parts,
)


@dataclasses.dataclass(frozen=True)
class GroupLasso(AnyPattern):
    """Sets of any pattern whose norms are penalised, and which go until half of training.

    Then channels that are left without weights go, and the network is smaller, under masks where
    sets are gone that make no channel of the network. Our choice: half of training.

    Attributes:
      filters: penalise filters beside the pattern's sets.
      depth: layers of residual branches may go as a whole, and their branches with them.
      strength: of the penalty.
      threshold: root mean square of a set's weights below which it goes.
      update_every: steps between mask updates; None is 100, or an epoch if that is shorter.
    """

    pattern: str = "channel:input"
    filters: bool = False
    depth: bool = False
    strength: float = 5e-4
    threshold: float = 1e-4
    update_every: int | None = None

    def arguments(self, setup: Setup) -> dict[str, Any]:
        """All options, the pruning steps as a schedule."""
        return super().arguments(setup) | {
            "schedule": between_parts(setup, 0.0, 0.5, self.update_every),
            "strength": self.strength,
            "threshold": self.threshold,
            "also": (patterns.channel("output"),) if self.filters else (),
            "depth": in_branch if self.depth else None,
        }

    def operations(self, setup: Setup) -> dict[int, Operation]:
        """The removal of whole channels after masks have changed for the last time."""
        if not isinstance(self.make_pattern(), Channel) and not self.depth:
            return {}
        last = between_parts(setup, 0.0, 0.5, self.update_every).end
        return {last + 1: _without_unused}


def _without_unused(state: State, setup: Setup) -> State:
    spaces, inner = channel_spaces(state.params), inner_spaces(state.params)
    return without_channels(state, bsj.used_channels(spaces, state.params, vanishing=inner))


@dataclasses.dataclass(frozen=True)
class BrainDamage(Options):
    """The same taps of a channel go from all filters until half of training.

    Our choice: half of training.

    Attributes:
      strength: of the penalty.
      threshold: root mean square of a set's weights below which it goes.
      gradual: penalise only what is to go, and prune it when it is near zero; else penalise all,
        and prune once, at half of training.
      update_every: steps between mask updates; None is 100, or an epoch if that is shorter.
    """

    strength: float = 5e-4
    threshold: float = 1e-2
    gradual: bool = True
    update_every: int | None = None

    def make_pattern(self) -> Pattern:
        """Channel taps."""
        return patterns.channel_tap()

    def arguments(self, setup: Setup) -> dict[str, Any]:
        """All options, the pruning steps as a schedule."""
        return {
            "sparsity": setup.sparsity,
            "schedule": between_parts(setup, 0.0, 0.5, self.update_every),
            "strength": self.strength,
            "threshold": self.threshold,
            "gradual": self.gradual,
        }


@dataclasses.dataclass(frozen=True)
class TrainedChannels(Options):
    """Channels that go when the dense network has been trained.

    Attributes:
      prune_at: fraction of training after which channels are removed; the rest fine-tunes.
    """

    prune_at: float = 0.5

    def check(self) -> None:
        """ValueError unless channels go within training."""
        _checks.fraction("prune_at", self.prune_at, low_open=True)

    def fixed_sparsity(self) -> None:
        """The run sets it."""

    def operations(self, setup: Setup) -> dict[int, Operation]:
        """The removal, after `prune_at` of the steps."""
        return {max(1, int(self.prune_at * setup.length.total)): self.prune}

    def prune(self, state: State, setup: Setup) -> State:
        """The state of the smaller network."""
        params, kept = self.choose(setup)
        return without_channels(dataclasses.replace(state, params=params), kept)

    def choose(self, setup: Setup) -> tuple[Any, dict[str, Any]]:
        """The parameters, mended where the rule does it, and the kept channels of each space."""
        raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class L1Filters(TrainedChannels):
    """Filters of the smallest L1 norm go.

    Our choice: half of training for the dense network.
    """

    def choose(self, setup: Setup) -> tuple[Any, dict[str, Any]]:
        """The kept channels, by the weights alone."""
        spaces = channel_spaces(setup.params)
        counts = bsj.channel_counts(setup.params, spaces, setup.sparsity)
        return setup.params, bsj.l1_filters(setup.params, spaces, counts)


@dataclasses.dataclass(frozen=True)
class Pfa(TrainedChannels):
    """The most correlated channels go, by one energy of all layers' spectra.

    Our choice: half of training for the dense network.
    """

    def choose(self, setup: Setup) -> tuple[Any, dict[str, Any]]:
        """The kept channels, by the responses to a batch."""
        spaces = channel_spaces(setup.params)
        inputs = _capture(setup)(setup.params)
        return setup.params, bsj.pfa(setup.params, spaces, inputs, sparsity=setup.sparsity)


@dataclasses.dataclass(frozen=True)
class Reconstructed(TrainedChannels):
    """Channels go space by space, and the layers that read them are mended each time.

    Attributes:
      samples: positions in the batch's activations that each layer is mended by.
    """

    samples: int = 1000

    def choose(self, setup: Setup) -> tuple[Any, dict[str, Any]]:
        """The kept channels and mended layers; later layers see what the earlier ones now give."""
        spaces, params = channel_spaces(setup.params), setup.params
        counts = bsj.channel_counts(params, spaces, setup.sparsity)
        capture = _capture(setup)
        originals, kept = capture(params), dict[str, Any]()
        for space, count in counts.items():
            chosen, params = self.reconstruct(
                params,
                spaces,
                {space: count},
                capture(params),
                originals=originals,
                samples=self.samples,
                key=setup.key,
            )
            kept |= chosen
        return params, kept

    def reconstruct(self, *args: Any, **kwargs: Any) -> bsj.Reconstruction:
        """The kept channels and mended parameters, by the library's rule."""
        raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class ThiNet(Reconstructed):
    """Channels that the next layer misses least go, one after the other.

    Our choice: half of training for the dense network, fine-tuning when all layers are done.
    """

    def reconstruct(self, *args: Any, **kwargs: Any) -> bsj.Reconstruction:
        """By `thinet`."""
        return bsj.thinet(*args, **kwargs)


@dataclasses.dataclass(frozen=True)
class LassoChannels(Reconstructed):
    """Channels that an L1 penalty on their contributions removes first go.

    Our choice: half of training for the dense network.
    """

    def reconstruct(self, *args: Any, **kwargs: Any) -> bsj.Reconstruction:
        """By `lasso_channels`."""
        return bsj.lasso_channels(*args, **kwargs)


def _capture(setup: Setup) -> Any:
    """A jitted function of parameters: what the layers of the network at inference read."""
    if setup.batch is None:
        raise ValueError("batch: the method looks at the activations of one batch, got none")
    images, _ = setup.batch

    @jax.jit
    def capture(params: Any) -> Any:
        variables = {"params": params, "batch_stats": setup.batch_stats}
        return bsj.linen.capture_inputs(setup.model, variables, images, train=False)

    return capture
