"""The training step that is timed: its trainer, its state and its batch."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.bench.gpu.training_units import StepOptions, Unit
from experiments.training.config import TrainConfig, resolve
from experiments.training.execution import State
from experiments.training.length import Length
from experiments.training.loop import Trainer
from experiments.training.methods import Hrbp

LENGTH = Length(steps_per_epoch=390, total=390 * 160)
STEP = 1  # the number that every timed step has: the masks do not change there


class StepSetup(NamedTuple):
    """What a step needs.

    Attributes:
      trainer: makes the step.
      state: before the first step.
      images: float32 batch, NHWC.
      labels: int32 classes.
    """

    trainer: Trainer
    state: State
    images: jax.Array
    labels: jax.Array


def set_up(
    options: StepOptions, unit: Unit, implementation: str | None, fused: bool | None = None
) -> StepSetup:
    """Prepares a step without running it.

    Args:
      options: of all steps.
      unit: the step.
      implementation: of the block-sparse conv; None for dense and masked.
      fused: as in `Trainer`.

    Returns:
      The step's trainer, state and batch, the same at every call.
    """
    network = unit.network
    classes = 1000 if network.dataset == "imagenet2012" else 10
    rng = np.random.default_rng(0)
    image_shape = (network.image_size, network.image_size, 3)
    images = jnp.asarray(rng.normal(size=(network.batch_size, *image_shape)), jnp.float32)
    labels = jnp.asarray(rng.integers(0, classes, network.batch_size), jnp.int32)
    config = _train_config(options, unit, implementation)
    trainer = Trainer(config, image_shape, classes, LENGTH, "NHWC", fused=fused)
    return StepSetup(trainer, trainer.init(), images, labels)


def _train_config(options: StepOptions, unit: Unit, implementation: str | None) -> Any:
    dense = unit.execution == "dense"
    blocks = Hrbp(group_size=options.group_size, channel_block=options.channel_block)
    return resolve(
        TrainConfig(
            dataset=unit.network.dataset,
            model=unit.network.model,
            method="dense" if dense else "hrbp",
            sparsity=unit.sparsity,
            execution="masked" if dense else unit.execution,
            precision=options.precision,
            width=unit.network.width,
            batch_size=unit.network.batch_size,
            implementation=implementation,
            options=None if dense else blocks,
        )
    )
