"""The base of all methods' options, and what a run gives to its method.

An options class holds what `--METHOD.OPTION` sets. It says which pattern they mean and what the
library's function is called with; when masks change is the library's business (`get_spec`). What a
method does between two steps, such as pruning a trained network, are its `operations`.
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import jax
import optax
from flax import linen as nn

import blocksparse_jax as bsj
from blocksparse_jax import _checks
from blocksparse_jax.patterns import Pattern
from experiments.training.execution import State
from experiments.training.length import Length
from experiments.training.patterns import named


class Setup(NamedTuple):
    """What a run gives to its method.

    Attributes:
      sparsity: fraction of the sparse layers' weights that is removed.
      key: JAX random key of the method.
      length: of the run.
      params: the initial parameters.
      loss_fn: (params, batch) -> loss of the dense network, in training mode.
      batch: of the training set, (images, labels); None where there is none.
      model: the network, a linen module whose convolutions are dense.
      batch_stats: its batch statistics.
      examples: of the training set in an epoch.
      end: the run's last step, beyond `length` where the run was extended; None is `length.total`.
    """

    sparsity: float
    key: jax.Array
    length: Length
    params: Any
    loss_fn: Callable[[Any, Any], jax.Array] | None = None
    batch: Any = None
    model: nn.Module | None = None
    batch_stats: Any = None
    examples: int | None = None
    end: int | None = None

    def every(self, update_every: int | None) -> int:
        """Steps between updates: as asked, else 100, or an epoch if that is shorter."""
        if update_every is None:
            return min(100, self.length.steps_per_epoch)
        return _checks.positive_int("update_every", update_every)


class Weights(NamedTuple):
    """The weights of a training step.

    Attributes:
      params: the parameters.
      masked: what the forward pass takes of them (`bsj.masked`), in the masked form of the state.
      opt_state: the optimizer's, before the step.
    """

    params: Any
    masked: Any
    opt_state: Any


@dataclasses.dataclass(frozen=True)
class Options:
    """No options, no pattern: dense training, and the base of all others."""

    default_sparsity: ClassVar[float] = 0.9

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

    def operations(self, setup: Setup) -> dict[int, "Operation"]:
        """What the method does between two steps: (state, setup) -> state, by steps done before.

        The operation gets the state in the masked form and a setup with its parameters, statistics
        and loss. It may set new masks (`bsj.replace_masks`), parameters and moments, of the same
        shapes, and keep a tree for later in `state.aside`.

        Args:
          setup: what the run gives to its method, before training.
        """
        return {}

    def loss(
        self, network: Callable[[Any], tuple[jax.Array, Any]], weights: Weights, setup: Setup
    ) -> tuple[jax.Array, Any]:
        """The loss of a training step, traced.

        Args:
          network: weights -> (the loss of the network with them, anything).
          weights: of the step.
          setup: what the run gives to its method, before training.

        Returns:
          The loss, and what `network` returned with it.
        """
        return network(weights.masked)

    def optimizer(
        self, base: optax.GradientTransformation, setup: Setup
    ) -> optax.GradientTransformation:
        """The optimizer behind the method, made of the run's own (weight decay, sgd or adam)."""
        return base

    def finish(self, state: State, folder: Path) -> dict[str, Any]:
        """What the method adds to result.json, and to the run folder, at the end.

        Args:
          state: after the last step, in the masked form.
          folder: of the run.
        """
        return {}

    def prepare(self, params: Any, batch_stats: Any, sparsity: float) -> tuple[Any, Any]:
        """The network that training starts from, made of the initial one."""
        return params, batch_stats


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


def first_three_quarters(setup: Setup, update_every: int | None) -> bsj.schedules.Every:
    """RigL's schedule: masks move until 3/4 of training."""
    return bsj.every(setup.every(update_every), until=max(1, int(0.75 * setup.length.total)))


Operation = Callable[[State, Setup], State]
