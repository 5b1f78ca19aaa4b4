"""Functions that train on one batch over and over, to be timed."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from experiments.training.execution import State, copied
from experiments.training.loop import Metrics, Trainer


def stepper(
    trainer: Trainer, state: State, step: int, images: Array, labels: Array
) -> Callable[[], Any]:
    """A function that trains on one batch over and over, to be timed.

    Args:
      trainer: of the state.
      state: copied, since steps donate it.
      step: the number that each step has.
      images: float32 batch, NHWC.
      labels: int32 classes.

    Returns:
      A function without arguments that returns the new state and the metrics.
    """
    box = [copied(state)]

    def call() -> Any:
        box[0], metrics = trainer.step(box[0], step, images, labels)
        return box[0], metrics

    return call


def stepper_of_seeds(
    trainer: Trainer,
    states: Sequence[State],
    images: Float[Array, "seeds n h w c"],
    labels: Int[Array, "seeds n"],
) -> Callable[[], Any]:
    """A function that trains every seed on its batch in one program, over and over, to be timed.

    Args:
      trainer: of the first seed; the others differ from it in the seed alone.
      states: masked, one for each seed.
      images: float32 batches, NHWC.
      labels: int32 classes.

    Returns:
      A function without arguments that returns the new states and the metrics, stacked.
    """

    def train(state: State, images: Array, labels: Array) -> tuple[State, Metrics]:
        return trainer.train_step(state, {}, images, labels, trainer.key)

    step = jax.jit(jax.vmap(train), donate_argnums=0)
    box = [jax.tree.map(lambda *leaves: jnp.stack(leaves), *states)]

    def call() -> Any:
        box[0], metrics = step(box[0], images, labels)
        return box[0], metrics

    return call
