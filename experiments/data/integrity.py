"""Checks of a prepared data set: it is whole, and what its name promises."""

from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordReader
from jaxtyping import UInt8

from experiments.data.images import decode
from experiments.data.specs import SPECS


def damaged(name: str, folder: Path, problem: str) -> ValueError:
    """The error for the folder of a prepared version, with the command that mends it."""
    return ValueError(
        f"data_dir: {str(folder)!r}: {problem}; prepare it again with --overwrite: python -m "
        f"experiments.prepare_data --dataset {name} --source PATH --data-dir "
        f"{folder.parent.parent} --overwrite"
    )


def open_builder(name: str, folder: Path, split: str) -> tfds.core.DatasetBuilder:
    """Opens a prepared version and checks its metadata and its files.

    Every file of the split is opened, which takes about a millisecond each.

    Args:
      name: a name in `SPECS`.
      folder: the folder of the version.
      split: the split that will be read.

    Returns:
      TFDS's builder.

    Raises:
      ValueError: the metadata cannot be read or describe another data set, or a file of the split
        is missing, cut, or another one than the metadata say.
    """
    try:
        builder = tfds.builder_from_directory(folder)
        file_format = builder.info.file_format
        features = dict(builder.info.features)
        splits = builder.info.splits
        files = dict(
            zip(splits[split].filepaths, splits[split].shard_lengths, strict=True)
            if split in splits
            else {}
        )
    except Exception as error:  # TFDS raises nearly any exception for damaged files
        raise damaged(
            name, folder, f"dataset_info.json or features.json is damaged ({first_line(error)})"
        ) from error
    if file_format is None or file_format.value != "array_record" or split not in splits:
        actual = f"{file_format and file_format.value} with splits {list(splits)}"
        raise damaged(
            name, folder, f"expected array_record files with a split {split!r}, got {actual}"
        )
    _check_features(name, folder, features)
    if not sum(files.values()):
        raise damaged(name, folder, f"the split {split!r} has no examples")
    for file, examples in files.items():
        _check_records(name, folder, Path(file), examples)
    return builder


def _check_features(name: str, folder: Path, features: dict[str, Any]) -> None:
    """Refuses images of another shape or dtype, and another number of classes."""
    spec = SPECS[name]
    image, label = features.get("image"), features.get("label")
    shape = (None, None, spec.image_shape[2]) if spec.varying_sizes else spec.image_shape
    if (
        not isinstance(image, tfds.features.Image)
        or (tuple(image.shape), image.np_dtype) != (shape, np.uint8)
        or not isinstance(label, tfds.features.ClassLabel)
        or label.num_classes != spec.num_classes
    ):
        raise damaged(
            name,
            folder,
            f"expected uint8 images {list(shape)} and labels of {spec.num_classes} classes, got "
            f"{image} and {label}",
        )


def _check_records(name: str, folder: Path, file: Path, examples: int) -> None:
    """Refuses a file that is missing, cut, or holds another number of examples."""
    if not file.is_file():
        raise damaged(name, folder, f"{file.name} is missing")
    try:
        reader = ArrayRecordReader(str(file))
        actual = reader.num_records()
        reader.close()  # only now it tells what it met
    except RuntimeError as error:
        problem = f"{file.name} is cut or damaged ({first_line(error)})"
        raise damaged(name, folder, problem) from error
    if actual != examples:
        problem = f"expected {examples:,} examples in {file.name}, got {actual:,}"
        raise damaged(name, folder, problem)


def decode_example(
    name: str, example: dict[str, Any], where: str
) -> tuple[UInt8[np.ndarray, "h w c"], np.int32]:
    """Decodes an example and checks it.

    Args:
      name: a name in `SPECS`.
      example: "image", bytes, and "label".
      where: the example in words, for messages.

    Returns:
      The pixels and the label.

    Raises:
      ValueError: the image does not decode or has another size, or the label is no class.
    """
    spec = SPECS[name]
    again = "prepare the data set again with --overwrite"
    try:
        image = decode(example["image"], spec.image_shape[2])
    except ValueError as error:
        raise ValueError(f"data_dir: {name}, {where}: {error}; {again}") from error
    if not spec.varying_sizes and image.shape != spec.image_shape:
        raise ValueError(
            f"data_dir: {name}, {where}: expected an image {list(spec.image_shape)}, got "
            f"{list(image.shape)}; {again}"
        )
    label = np.int32(example["label"])
    if not 0 <= label < spec.num_classes:
        raise ValueError(
            f"data_dir: {name}, {where}: expected a label 0 to {spec.num_classes - 1}, got "
            f"{label}; {again}"
        )
    return image, label


def first_line(error: Exception) -> str:
    """What an error says, in one line."""
    return (str(error) or type(error).__name__).splitlines()[0]
