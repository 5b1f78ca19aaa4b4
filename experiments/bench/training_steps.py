"""The training steps that are timed on a CPU: of the zoo in every execution, and of PyTorch."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from blocksparse_jax.tree import path_name
from experiments.bench.torch_baseline.process import TorchProcess
from experiments.measuring.row_names import TORCH
from experiments.measuring.timing import timed
from experiments.training.config import TrainConfig, resolve
from experiments.training.length import Length
from experiments.training.loop import Trainer
from experiments.training.methods import Hrbp
from experiments.training.optimizer import learning_rate
from experiments.training.stepper import stepper

CLASSES = 10
LENGTH = Length(steps_per_epoch=390, total=390 * 160)  # of CIFAR-10's usual training
STEP = 1  # the number that every timed step has: the masks do not change there
BLOCK_DENSITIES = (1 / 3, 2 / 3, 1.0)  # 3, 6 or all of 9 taps
TOLERANCES = {"float32": 1e-3, "bfloat16": 2e-2}  # of the losses, relative


@dataclasses.dataclass(frozen=True)
class Problem:
    """What every execution trains.

    Attributes:
      model: of the zoo.
      width: factor on the channels.
      image_size: pixels.
      batch_size: images in a step.
      precision: of the activations.
      implementation: of the block-sparse conv; None picks.
    """

    model: str
    width: float
    image_size: int
    batch_size: int
    precision: str
    implementation: str | None

    def batch(self) -> tuple[np.ndarray, np.ndarray]:
        """Returns random NHWC images and labels, the same ones at every call."""
        rng = np.random.default_rng(0)
        images = rng.normal(size=(self.batch_size, self.image_size, self.image_size, 3))
        labels = rng.integers(0, CLASSES, self.batch_size)
        return images.astype(np.float32), labels.astype(np.int32)


@dataclasses.dataclass(frozen=True)
class Variant:
    """One way to run the step.

    Attributes:
      execution: dense (in XLA), native (dense in the native kernels), masked, sparse, packed or
        `TORCH`.
      data_format: of the activations.
      sparsity: of static HRBP; 0 for dense.
      policy: how PyTorch's threads wait.
    """

    execution: str
    data_format: str
    sparsity: float = 0.0
    policy: str | None = None

    @property
    def block_density(self) -> float:
        """The fraction of the taps that a group keeps: a third, or more at a higher density."""
        density = 1 - self.sparsity
        return next(fraction for fraction in BLOCK_DENSITIES if fraction >= density)

    def describe(self) -> dict[str, Any]:
        """Returns what a row of the report says of the variant."""
        row: dict[str, Any] = {
            "sparsity": self.sparsity,
            "execution": self.execution,
            "data_format": self.data_format,
        }
        if self.sparsity:
            row["block_density"] = round(self.block_density, 4)
        if self.policy:
            row["policy"] = self.policy
        return row


class Step(NamedTuple):
    """A step that is ready to be timed.

    Attributes:
      first_loss: the loss of the first step, from the initial weights.
      call: makes one more step and returns the milliseconds that it took.
    """

    first_loss: float
    call: Callable[[], float]


def variants(sparsities: tuple[float, ...]) -> Iterator[Variant]:
    """Yields the executions of the zoo that are timed: dense, and for each sparsity three sparse.

    Args:
      sparsities: fractions of the weights removed.

    Yields:
      Variants.
    """
    for data_format in ("NHWC", "CHWN"):
        yield Variant("dense", data_format)
    yield Variant("native", "CHWN")
    for sparsity in sparsities:
        for execution in ("masked", "sparse", "packed"):
            yield Variant(execution, "CHWN", sparsity)


def xla_step(problem: Problem, variant: Variant) -> Step:
    """Prepares a step of the zoo and runs it once.

    Args:
      problem: the network and the batch.
      variant: how it runs.

    Returns:
      The step.
    """
    trainer = make_trainer(problem, variant)
    images, labels = map(jnp.asarray, problem.batch())
    step = stepper(trainer, trainer.init(), STEP, images, labels)
    first_loss = float(step()[1].loss)
    return Step(first_loss, timed(step))


def make_trainer(problem: Problem, variant: Variant) -> Trainer:
    """Returns the training of a network in one execution."""
    image_shape = (problem.image_size, problem.image_size, 3)
    return Trainer(
        _train_config(problem, variant), image_shape, CLASSES, LENGTH, variant.data_format
    )


def _train_config(problem: Problem, variant: Variant) -> TrainConfig:
    dense = variant.execution in ("dense", "native")
    return resolve(
        TrainConfig(
            dataset="cifar10",
            model=problem.model,
            method="dense" if dense else "hrbp",
            sparsity=variant.sparsity,
            execution="masked" if dense else variant.execution,
            precision=problem.precision,
            width=problem.width,
            batch_size=problem.batch_size,
            implementation="dense" if variant.execution == "dense" else problem.implementation,
            options=None if dense else Hrbp(block_density=variant.block_density),
        )
    )


def torch_steps(problem: Problem, torch: Mapping[str, TorchProcess]) -> dict[Variant, Step]:
    """Prepares PyTorch's dense step and runs it once in each process.

    The step has the zoo's initial weights and batch, and the same optimizer.

    Args:
      problem: the network and the batch.
      torch: processes by policy.

    Returns:
      Steps; none without a process.
    """
    if not torch:
        return {}
    trainer = make_trainer(problem, Variant("dense", "NHWC"))
    leaves = jax.tree_util.tree_leaves_with_path(trainer.init().params)
    images, labels = problem.batch()
    arrays: dict[str, Any] = {
        "weights": {path_name(path): np.asarray(leaf) for path, leaf in leaves},
        "images": images,
        "labels": labels,
    }
    options = {
        "lr": float(learning_rate(trainer.config, LENGTH)(STEP)),
        "momentum": trainer.config.momentum,
        "weight_decay": trainer.config.weight_decay,
    }
    steps = {}
    for policy, process in torch.items():
        call = process.load("training", arrays, **options)["step"]
        first_loss = float(process.results("step")[0])
        steps[Variant(TORCH, "channels_last", policy=policy)] = Step(first_loss, call)
    return steps


def check_losses(losses: Mapping[Variant, float], precision: str) -> None:
    """Compares the first losses of all executions at one sparsity.

    Args:
      losses: of the first step.
      precision: of the activations.

    Raises:
      AssertionError: they differ.
    """
    for sparsity in dict.fromkeys(variant.sparsity for variant in losses):
        group = {
            f"{variant.execution} {variant.policy or variant.data_format}": loss
            for variant, loss in losses.items()
            if variant.sparsity == sparsity
        }
        low, high = min(group.values()), max(group.values())
        if not high - low <= TOLERANCES[precision] * abs(high):
            raise AssertionError(
                f"the executions at sparsity {sparsity:g} disagree, nothing was timed; losses of "
                f"the first step: {group}"
            )
