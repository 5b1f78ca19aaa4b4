"""Data sets for training: `load` one by name, then ask it for batches.

CIFAR-size sets are read once and sit on the device, where they are shuffled and augmented in jit;
ImageNet streams (streaming.py).
"""

import dataclasses
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, Key, UInt8

from blocksparse_jax._checks import choice
from experiments.data.augment import augment, normalize
from experiments.data.specs import (
    SPECS,
    Data,
    Spec,
    TestBatch,
    TrainBatch,
    count_steps,
    local_size,
    prepare_command,
    step_range,
)


class Split(NamedTuple):
    """Images and labels of one split, on the device."""

    x: jax.Array  # uint8 [n, h, w, c]
    y: jax.Array  # int32 [n]


@dataclasses.dataclass(frozen=True, eq=False)
class Dataset:
    """A data set that sits on the device. Its batches depend only on (seed, epoch, step), so a run
    resumes anywhere.

    Args:
        name: the name in `SPECS`.
        train: training images and labels.
        test: test images and labels.
        process: (index, count) of the processes that share each batch; see `Data`.

    Example:
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
        """(h, w, c) of one image."""
        return SPECS[self.name].image_shape

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return SPECS[self.name].num_classes

    def steps_per_epoch(self, batch_size: int) -> int:
        """Number of full training batches in an epoch; ValueError if the batch is larger than the
        training set.
        """
        return count_steps(len(self.train.x), batch_size, self.process[1])

    def train_batches(
        self, epoch: int, batch_size: int, seed: int, start_step: int = 0
    ) -> Iterator[TrainBatch]:
        """Shuffled, augmented and normalised training batches of one epoch.

        Args:
            epoch: number of the epoch; each has its own order and augmentation.
            batch_size: examples per batch, over all processes.
            seed: seed of the run.
            start_step: the first batch wanted; the batches from there on are those of the whole
              epoch.

        Returns:
            An iterator over (images float32 [n, h, w, c], labels int32 [n]).

        Raises:
            ValueError: `batch_size` or `start_step` does not fit the training set.
        """
        steps = step_range(start_step, self.steps_per_epoch(batch_size))
        key = jax.random.fold_in(jax.random.key(seed), epoch)
        order = _shuffle(key, len(self.train.x))
        batch = functools.partial(
            _train_batch,
            *self.train,
            order,
            key,
            spec=SPECS[self.name],
            batch_size=batch_size,
            process=self.process,
        )
        return (batch(jax.device_put(np.int32(step))) for step in steps)

    def test_batches(self, batch_size: int) -> Iterator[TestBatch]:
        """Every test example once, in order, the last batch padded.

        Args:
            batch_size: examples per batch, over all processes.

        Returns:
            An iterator over (images float32 [n, h, w, c], labels int32 [n], weights float32 [n]: 0
            for padding, else 1).
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


@functools.partial(jax.jit, static_argnums=1)
def _shuffle(key: Key[Array, ""], n: int) -> Int[Array, " n"]:
    return jax.random.permutation(key, n)


@functools.partial(jax.jit, static_argnames=("spec", "batch_size", "process"))
def _train_batch(
    x: UInt8[Array, "n h w c"],
    y: Int[Array, " n"],
    order: Int[Array, " n"],
    key: Key[Array, ""],
    step: Int[Array, ""],
    *,
    spec: Spec,
    batch_size: int,
    process: tuple[int, int],
) -> TrainBatch:
    """The batch of a step. Every process draws the whole batch and keeps its rows, so their number
    changes nothing.
    """
    rows = jax.lax.dynamic_slice(order, (step * batch_size,), (batch_size,))
    images = augment(jax.random.fold_in(key, step), x[rows], pad=spec.pad, flip=spec.flip)
    index, count = process
    return normalize(images[index::count], spec.mean, spec.std), y[rows][index::count]


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
    rows = start + jnp.arange(index, batch_size, count)
    last = len(x) - 1
    kept = jnp.minimum(rows, last)
    return normalize(x[kept], spec.mean, spec.std), y[kept], (rows <= last).astype(jnp.float32)


def load(
    name: str,
    data_dir: str | Path | None = None,
    *,
    download: bool = False,
    threads: int = 16,
    workers: int = 0,
) -> Data:
    """A data set, ready to give batches.

    Args:
        name: digits (inside scikit-learn, needs no files), mnist, cifar10, cifar100, tiny_imagenet
          or imagenet2012.
        data_dir: the TFDS folder that `python -m experiments.prepare_data` filled.
        download: fetch and prepare a missing set first, where its official archive needs no
          registration.
        threads: threads that read and decode a streamed set.
        workers: processes beside this one that do so; 0 for none.

    Returns:
        A `Dataset` on the device, or for imagenet2012 a `streaming.ImageNet`; both have the methods
        of `Data`.

    Raises:
        ValueError: unknown name (the nearest one is named), or files in another format.
        FileNotFoundError: nothing prepared; the message holds the command that prepares it.

    Example:
        >>> load("cifar1O")  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        ValueError: name: expected one of ..., got 'cifar1O'; did you mean 'cifar10'?
    """
    choice("name", name, SPECS)
    process = jax.process_index(), jax.process_count()
    if name == "digits":
        train, test = _digits()
        return Dataset(name, train, test, process)
    if data_dir is None:
        raise ValueError(
            f"data_dir: expected the folder that holds {name}; prepare one "
            f"with:\n{prepare_command(name, 'DIR')}"
        )
    from experiments.data import tfds_layout

    if download and not tfds_layout.prepared_versions(name, data_dir):
        from experiments import prepare_data

        prepare_data.main(prepare_data.Config(name, data_dir=Path(data_dir)))  # type: ignore[arg-type]
    splits = ("train", SPECS[name].test_split)
    if name == "imagenet2012":
        from experiments.data import streaming

        images, test_images = (tfds_layout.open_split(name, data_dir, split) for split in splits)
        return streaming.ImageNet(images, test_images, process, threads, workers)
    train, test = (
        Split(*map(jnp.asarray, tfds_layout.read_arrays(name, data_dir, split))) for split in splits
    )
    return Dataset(name, train, test, process)


def _digits() -> tuple[Split, Split]:
    """scikit-learn's digits: pixels 0..16 to 0..255, a random 80/20 split with a fixed seed."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    order = np.random.default_rng(0).permutation(len(digits.target))
    x = np.round(digits.images[order, :, :, None] * (255 / 16)).astype(np.uint8)
    y = digits.target[order].astype(np.int32)
    n = SPECS["digits"].sizes[0]
    return Split(jnp.asarray(x[:n]), jnp.asarray(y[:n])), Split(
        jnp.asarray(x[n:]), jnp.asarray(y[n:])
    )
