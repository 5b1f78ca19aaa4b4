"""`load` opens a data set by name, ready to give batches."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from blocksparse_jax._checks import choice
from experiments.data.batches import Data
from experiments.data.resident import Dataset, Split
from experiments.data.specs import SPECS, prepare_command


def load(
    name: str,
    data_dir: str | Path | None = None,
    *,
    examples: int | None = None,
    download: bool = False,
    threads: int = 16,
    workers: int = 0,
) -> Data:
    """Opens a data set, ready to give batches.

    Args:
      name: digits (inside scikit-learn, needs no files), mnist, cifar10, cifar100, tiny_imagenet
        or imagenet2012.
      data_dir: the TFDS folder that `python -m experiments.prepare_data` filled.
      examples: training images, drawn in the same way each time; None is all. Not of imagenet2012,
        which streams.
      download: whether to fetch and prepare a missing data set first; only for those whose
        official archive needs no registration.
      threads: number of threads that read and decode a streamed data set, in each process.
      workers: number of additional processes that read and decode; 0 for none.

    Returns:
      A `Dataset` on the device, or for imagenet2012 a `streaming.ImageNet`; both have the methods
      of `Data`.

    Raises:
      ValueError: the name is unknown, there are fewer examples, or the files are in another format.
      FileNotFoundError: the data set is not prepared; the message gives the command that does it.

    Example:
      >>> load("cifar1O")  # doctest: +ELLIPSIS
      Traceback (most recent call last):
      ValueError: name: expected one of ..., got 'cifar1O'; did you mean 'cifar10'?
    """
    choice("name", name, SPECS)
    process = jax.process_index(), jax.process_count()
    if name == "digits":
        train, test = _digits()
        return Dataset(name, _part(train, examples), test, process)
    if data_dir is None:
        raise ValueError(
            f"data_dir: expected the folder that holds {name}; prepare one "
            f"with:\n{prepare_command(name, 'DIR')}"
        )
    from experiments.data import tfds_layout

    if download and not tfds_layout.prepared_versions(name, data_dir):
        from experiments.data.prepare import prepare

        prepare(name, Path(data_dir))
    splits = ("train", SPECS[name].test_split)
    if name == "imagenet2012":
        if examples is not None:
            raise ValueError(f"examples: imagenet2012 streams all its images, got {examples}")
        from experiments.data import streaming

        train_files, test_files = (
            tfds_layout.open_split(name, data_dir, split) for split in splits
        )
        return streaming.ImageNet(train_files, test_files, process, threads, workers)
    train, test = (_on_device(*tfds_layout.read_arrays(name, data_dir, split)) for split in splits)
    return Dataset(name, _part(train, examples), test, process)


def _part(split: Split, examples: int | None) -> Split:
    """So many examples of a split, drawn with a fixed seed; all of them for None."""
    if examples is None:
        return split
    if examples > len(split.x):
        raise ValueError(f"examples: expected at most {len(split.x)}, got {examples}")
    rows = np.random.default_rng(0).permutation(len(split.x))[:examples]
    return Split(split.x[rows], split.y[rows])


def _on_device(x: np.ndarray, y: np.ndarray) -> Split:
    """Copies the images and labels of one split to the device."""
    return Split(jnp.asarray(x), jnp.asarray(y))


def _digits() -> tuple[Split, Split]:
    """scikit-learn's digits, split 80/20 at random with a fixed seed.

    The pixels 0..16 are scaled to 0..255.
    """
    from sklearn.datasets import load_digits

    digits = load_digits()
    order = np.random.default_rng(0).permutation(len(digits.target))
    x = np.round(digits.images[order, :, :, None] * (255 / 16)).astype(np.uint8)
    y = digits.target[order].astype(np.int32)
    n = SPECS["digits"].sizes[0]
    return _on_device(x[:n], y[:n]), _on_device(x[n:], y[n:])
