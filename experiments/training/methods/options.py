"""The base of all methods' options, and what a run gives to its method.

An options class holds what `--METHOD.OPTION` sets. It says which pattern they mean and what the
library's function is called with; when masks change is the library's business (`get_spec`). What a
method does between two steps, such as pruning a trained network, are its `operations`.
"""

import dataclasses
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import jax
import optax
from flax import linen as nn

import blocksparse_jax as bsj
from blocksparse_jax import _checks
from blocksparse_jax.patterns import Pattern
from experiments.training.execution import State
from experiments.training.length import Length, Passes
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
      optimizer: what trains the network without the method.
      learning_rate: of each step, step -> rate.
      image_shape: (height, width, channels) of its images.
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
    optimizer: optax.GradientTransformation | None = None
    learning_rate: optax.Schedule | None = None
    image_shape: tuple[int, ...] = ()
    examples: int | None = None
    end: int | None = None

    def logits(self, params: Any, images: jax.Array, *, train: bool) -> jax.Array:
        """The logits of the dense network, float32 unless the parameters are wider.

        Args:
          params: of the network.
          images: NHWC.
          train: whether batch norm takes the statistics of these images.

        Returns:
          An array [n, classes].
        """
        assert self.model is not None
        variables = {"params": params, "batch_stats": self.batch_stats or {}}
        if not train:
            return self.model.apply(variables, images, train=False)
        return self.model.apply(variables, images, train=True, mutable=["batch_stats"])[0]

    def every(self, update_every: int | None, usual: int | None = None) -> int:
        """Steps between updates: as asked, else the usual number, else 100 or a shorter epoch."""
        if update_every is None:
            return usual or min(100, self.length.steps_per_epoch)
        return _checks.positive_int("update_every", update_every)

    def part(self, parts: int, *, least: int = 1, most: int | None = None) -> int:
        """Steps between updates of which a run has `parts`, within bounds."""
        steps = max(least, self.length.total // parts)
        return steps if most is None else min(most, steps)


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
    """No options, no pattern: dense training, and the base of all others.

    Attributes:
      default_sparsity: where the run asks for none.
      draws_in_steps: whether the method's update draws from the run's key; it is then made anew
        where a step is traced, so that the program serves every seed.
    """

    default_sparsity: ClassVar[float] = 0.9
    draws_in_steps: ClassVar[bool] = False

    def make_pattern(self) -> Pattern | None:
        """Makes the pattern that the options mean; None trains dense."""
        return None

    def fixed_sparsity(self) -> float | None:
        """The sparsity that the pattern fixes, 0 without one; None where the run sets it."""
        pattern = self.make_pattern()
        density = pattern.density if pattern else 1.0
        return None if density is None else 1 - density

    def fixed_because(self) -> str:
        """What fixes the sparsity, in words; "" where nothing is pruned."""
        return str(self.make_pattern() or "")

    def check(self) -> None:
        """ValueError where options exclude each other; the library checks each one's value."""

    def batch(self, batches: Iterable[Any], classes: int) -> Any:
        """The examples that a method with `needs_batch` looks at before training.

        Args:
          batches: of the first epoch, (images, labels).
          classes: of the data set.

        Returns:
          Images and labels: those of the first batch.
        """
        return next(iter(batches))

    def passes(self, length: Length, sparsity: float) -> Passes:
        """How often training starts over: once, unless operations rewind it.

        Args:
          length: of the run.
          sparsity: that the run asks for.
        """
        return Passes(0, length.total, 1)

    def arguments(self, setup: Setup) -> dict[str, Any]:
        """Returns the arguments of the method's function in a run.

        Args:
          setup: what the run gives to its method.
        """
        return {}

    def operations(self, setup: Setup) -> dict[int, "Operation"]:
        """What the method does between two steps: (state, setup) -> state, by steps done before.

        That of step 0 runs before the first step, and says what `state.aside` holds: a resumed run
        reads as many arrays from its checkpoint.

        The operation gets the state in the masked form and a setup with its parameters, statistics
        and loss. It may set new masks (`bsj.replace_masks`), parameters and moments, keep a tree
        for later in `state.aside`, and make the network smaller (`bsj.remove_channels`): the steps
        after it compile for the new shapes, and the model has the channels that are left.

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

    def combined(
        self,
        method: optax.GradientTransformation,
        optimizer: optax.GradientTransformation,
        setup: Setup,
    ) -> optax.GradientTransformation:
        """The method with the optimizer of the run: pruned weights are zero after every step.

        Args:
          method: the method's transformation.
          optimizer: the run's own (weight decay, sgd or adam).
          setup: what the run gives to its method, before training.
        """
        return bsj.sparse(method, optimizer)

    def step_flops(self, kept: int, dense: int, pruned: int, dense_gradient: bool) -> int:
        """The FLOPs of a training step per image: forward pass and gradients.

        Args:
          kept: of the forward pass with the step's masks.
          dense: of the dense network's forward pass.
          pruned: the part of `dense` that the layers with masks have.
          dense_gradient: whether the method needs the gradient of all weights in this step.
        """
        return int(bsj.metrics.step_flops(kept, dense, dense_gradient))

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
      pattern: unstructured, kernel, vector, window, channel, channel_tap, fan_in, n_of_m, one_by_n
        or block, with its arguments behind colons: one_by_n:16, block:32, n_of_m:2:4.
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


def between_parts(
    setup: Setup, first: float, last: float, update_every: int | None
) -> bsj.schedules.Between:
    """A schedule between two parts of a run."""
    start = int(first * setup.length.total)
    end = max(start + 1, int(last * setup.length.total))
    return bsj.between(start, end, every=setup.every(update_every))


Operation = Callable[[State, Setup], State]
