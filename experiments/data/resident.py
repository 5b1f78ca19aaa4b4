"""Data sets that fit on the device: read once, then shuffled, augmented and normalised in jit."""

import dataclasses
import functools
from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, Key, UInt8

from experiments.data.augment import augment, normalize
from experiments.data.batches import TestBatch, TrainBatch, count_steps, local_size, step_range
from experiments.data.specs import SPECS, Spec


class Split(NamedTuple):
    """The images and labels of one split, on the device."""

    x: UInt8[Array, "n h w c"]
    y: Int[Array, " n"]


@dataclasses.dataclass(frozen=True, eq=False)
class Dataset:
    """A data set that sits on the device.

    Its batches depend only on (seed, epoch, step), so that a run can resume anywhere.

    Attributes:
      name: the name in `SPECS`.
      train: training images and labels.
      test: test images and labels.
      process: `(index, count)` of the processes that share each batch; see `batches.Data`.

    Example:
      >>> from experiments.data import load
      >>> data = load("digits")
      >>> data.image_shape, data.num_classes, data.steps_per_epoch(64)
      ((8, 8, 1), 10, 22)
      >>> images, labels = next(data.train_batches(epoch=0, batch_size=64, seed=0))
      >>> images.shape, labels.shape
      ((64, 8, 8, 1), (64,))
    """

    name: str
    train: Split
    test: Split
    process: tuple[int, int] = (0, 1)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """`(h, w, c)` of one image."""
        return SPECS[self.name].image_shape

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return SPECS[self.name].num_classes

    def steps_per_epoch(self, batch_size: int) -> int:
        """Number of full training batches in an epoch; ValueError if not even one is full."""
        return count_steps(len(self.train.x), batch_size, self.process[1])

    def train_batches(
        self, epoch: int, batch_size: int, seed: int, start_step: int = 0
    ) -> Iterator[TrainBatch]:
        """Gives the shuffled, augmented and normalised training batches of one epoch.

        Args:
          epoch: number of the epoch; each has its own order and augmentation.
          batch_size: examples in a batch, over all processes.
          seed: seed of the run.
          start_step: number of batches to skip; the batches that follow are those of the whole
            epoch.

        Returns:
          An iterator over `(images float32 [n, h, w, c], labels int32 [n])`.

        Raises:
          ValueError: `batch_size` or `start_step` does not fit the training set.
        """
        steps = step_range(start_step, self.steps_per_epoch(batch_size))
        rest = self.train_rest(epoch, batch_size, seed, start_step)
        return _batches(rest, len(steps))

    def train_rest(
        self, epoch: int, batch_size: int, seed: int, start_step: int = 0
    ) -> "EpochRest":
        """The batches of `train_batches`, to be made inside of a jitted program."""
        step_range(start_step, self.steps_per_epoch(batch_size))
        key = jax.random.fold_in(jax.random.key(seed), epoch)
        order = _shuffle(key, len(self.train.x))
        step = jax.device_put(np.int32(start_step))
        return EpochRest(*self.train, order, key, step, SPECS[self.name], batch_size, self.process)

    def test_batches(self, batch_size: int) -> Iterator[TestBatch]:
        """Gives every test example once, in order; the last batch is padded.

        Args:
          batch_size: examples in a batch, over all processes.

        Returns:
          An iterator over `(images float32 [n, h, w, c], labels int32 [n], weights float32 [n])`.
          The weights are 0 for padding and 1 for examples.
        """
        local_size(batch_size, self.process[1])
        batch = functools.partial(
            _test_batch,
            *self.test,
            spec=SPECS[self.name],
            batch_size=batch_size,
            process=self.process,
        )
        return (
            batch(jax.device_put(np.int32(start)))
            for start in range(0, len(self.test.x), batch_size)
        )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class EpochRest:
    """The batches of an epoch that are still to come.

    A pytree: a jitted program takes it and makes its batches itself.

    Attributes:
      x: training images.
      y: their labels.
      order: of the examples in this epoch.
      key: of the augmentation.
      step: number of the next batch.
      spec: of the data set.
      batch_size: examples in a batch, over all processes.
      process: see `batches.Data`.
    """

    x: UInt8[Array, "n h w c"]
    y: Int[Array, " n"]
    order: Int[Array, " n"]
    key: Key[Array, ""]
    step: Int[Array, ""]
    spec: Spec = dataclasses.field(metadata={"static": True})
    batch_size: int = dataclasses.field(metadata={"static": True})
    process: tuple[int, int] = dataclasses.field(metadata={"static": True})

    def batch(self) -> TrainBatch:
        """The next batch.

        Every process draws the whole batch and keeps its own rows, so that the batches do not
        depend on the number of processes.
        """
        start = (self.step * self.batch_size,)
        rows = jax.lax.dynamic_slice(self.order, start, (self.batch_size,))
        key = jax.random.fold_in(self.key, self.step)
        images = augment(key, self.x[rows], pad=self.spec.pad, flip=self.spec.flip)
        index, count = self.process
        images = normalize(images[index::count], self.spec.mean, self.spec.std)
        return images, self.y[rows][index::count]

    def split(self) -> tuple[TrainBatch, "EpochRest"]:
        """The next batch, made by a program of its own, and the batches after it."""
        batch, step = _next_batch(self)
        return batch, self.at(step)

    def at(self, step: Int[Array, ""]) -> "EpochRest":
        """The batches from another one on."""
        return dataclasses.replace(self, step=step)


def _batches(rest: EpochRest, count: int) -> Iterator[TrainBatch]:
    """So many batches. The number of the next one stays on the device, so nothing is sent there."""
    for _ in range(count):
        batch, rest = rest.split()
        yield batch


@jax.jit
def _next_batch(rest: EpochRest) -> tuple[TrainBatch, Int[Array, ""]]:
    return rest.batch(), rest.step + 1


@functools.partial(jax.jit, static_argnums=1)
def _shuffle(key: Key[Array, ""], n: int) -> Int[Array, " n"]:
    return jax.random.permutation(key, n)


@functools.partial(jax.jit, static_argnames=("spec", "batch_size", "process"))
def _test_batch(
    x: UInt8[Array, "n h w c"],
    y: Int[Array, " n"],
    start: Int[Array, ""],
    *,
    spec: Spec,
    batch_size: int,
    process: tuple[int, int],
) -> TestBatch:
    index, count = process
    rows = start + jnp.arange(index, batch_size, count, dtype=jnp.int32)
    last = len(x) - 1
    kept = jnp.minimum(rows, last)
    return normalize(x[kept], spec.mean, spec.std), y[kept], (rows <= last).astype(jnp.float32)
