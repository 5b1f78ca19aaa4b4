"""CIFAR-10 and CIFAR-100 in their "python version".

The files are pickled batches, in which each image is a row of 3 x 32 x 32 bytes.
"""

import pickle
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from experiments.data.archives import Files, find
from experiments.data.array_files import read_pickle
from experiments.data.sources.arrays import from_arrays
from experiments.data.sources.source import Source


def read_cifar10(files: Files) -> Source:
    """Reads CIFAR-10: five training batches, one test batch and `batches.meta`."""
    arrays = _read_batches(
        files,
        {"train": [f"data_batch_{i}" for i in range(1, 6)], "test": ["test_batch"]},
        {"y": "labels"},
    )
    class_names = _read_class_names(files, "batches.meta", {"label": "label_names"})
    return from_arrays("cifar10", arrays, class_names)


def read_cifar100(files: Files) -> Source:
    """Reads CIFAR-100: one training file, one test file and `meta`, with fine and coarse labels."""
    arrays = _read_batches(
        files,
        {"train": ["train"], "test": ["test"]},
        {"y": "fine_labels", "coarse": "coarse_labels"},
    )
    class_names = _read_class_names(
        files, "meta", {"label": "fine_label_names", "coarse_label": "coarse_label_names"}
    )
    return from_arrays("cifar100", arrays, class_names)


def _read_batches(
    files: Files, batch_files: Mapping[str, Sequence[str]], label_keys: Mapping[str, str]
) -> dict[str, np.ndarray]:
    """Joins the batches of each split into arrays.

    Args:
      files: the files of the archive.
      batch_files: split -> names of its batch files.
      label_keys: prefix of the array -> key of the labels in a batch.

    Returns:
      `x_SPLIT` uint8 `[n, 32, 32, 3]` and `PREFIX_SPLIT` `[n]` for each split and prefix.
    """
    arrays: dict[str, np.ndarray] = {}
    for split, entries in batch_files.items():
        batches = [_load(files, entry) for entry in entries]
        try:
            for prefix, key in label_keys.items():
                arrays[f"{prefix}_{split}"] = np.concatenate([batch[key] for batch in batches])
            rows = np.concatenate([batch["data"] for batch in batches])
            arrays[f"x_{split}"] = rows.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
        except (KeyError, TypeError, ValueError) as error:
            raise pickle.UnpicklingError(f"{', '.join(entries)}: {error}") from error
    return arrays


def _read_class_names(
    files: Files, meta_file: str, keys: Mapping[str, str]
) -> dict[str, list[str]]:
    """Reads the class names of each label feature; those that the file lacks are left out."""
    meta = _load(files, meta_file)
    if not isinstance(meta, dict):
        raise pickle.UnpicklingError(f"{meta_file}: expected a dict, got {type(meta).__name__}")
    class_names = {feature: meta[key] for feature, key in keys.items() if key in meta}
    for feature, names in class_names.items():
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise pickle.UnpicklingError(f"{meta_file}: {keys[feature]} is no list of names")
    return class_names


def _load(files: Files, entry: str) -> Any:
    """Unpickles one file; UnpicklingError with its name."""
    try:
        return read_pickle(files[find(files, entry)]())
    except pickle.UnpicklingError as error:
        raise pickle.UnpicklingError(f"{entry}: {error}") from error
