"""The TFDS layout on disk, read and written without TensorFlow.

`DATA_DIR/NAME/VERSION/*.array_record` hold the examples, with images as PNG or JPEG.
"""

import itertools
import re
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from jaxtyping import Int, UInt8

from experiments.data.integrity import damaged, decode_example, first_line, open_builder
from experiments.data.specs import SPECS, prepare_command
from experiments.data.work_folder import work_folder, writable

Example = dict[str, Any]
_CHUNK = 500


def prepared_versions(name: str, data_dir: str | Path) -> list[Path]:
    """The folders of the prepared versions of a data set, oldest version first."""
    return [
        folder for folder in _versions(name, data_dir) if Path(folder, "dataset_info.json").exists()
    ]


def _versions(name: str, data_dir: str | Path) -> list[Path]:
    """The folders named by a version, whether they are complete or not, oldest version first."""
    root = Path(data_dir, name)
    folders = root.iterdir() if root.is_dir() else ()
    versions = [folder for folder in folders if re.fullmatch(r"\d+\.\d+\.\d+", folder.name)]
    return sorted(versions, key=lambda folder: [int(part) for part in folder.name.split(".")])


def open_split(name: str, data_dir: str | Path, split: str) -> Sequence[Example]:
    """Opens the examples of a prepared split for random access; images stay PNG or JPEG bytes.

    Args:
      name: a name in `SPECS`.
      data_dir: TFDS folder.
      split: "train" or the set's `test_split`.

    Returns:
      A TFDS data source. `source[i]` gives a dict with at least "image" and "label",
      `source.__getitems__([i, ...])` a list of them.

    Raises:
      FileNotFoundError: the data set is not prepared in `data_dir`.
      ValueError: see `integrity.open_builder`.
    """
    versions = prepared_versions(name, data_dir)
    if not versions:
        if lost := _versions(name, data_dir):
            raise damaged(name, lost[-1], "dataset_info.json is missing")
        raise FileNotFoundError(
            f"data_dir: no {name} in {str(data_dir)!r}; prepare it "
            f"with:\n{prepare_command(name, data_dir)}"
        )
    builder = open_builder(name, versions[-1], split)
    return builder.as_data_source(split=split, decoders={"image": tfds.decode.SkipDecoding()})


def read_arrays(
    name: str, data_dir: str | Path, split: str
) -> tuple[UInt8[np.ndarray, "n h w c"], Int[np.ndarray, " n"]]:
    """Reads a whole prepared split into arrays (about 2 s for CIFAR-10).

    Args:
      name: a name in `SPECS`, of a data set whose images all have one size.
      data_dir: TFDS folder.
      split: "train" or the set's `test_split`.

    Returns:
      `(pixels uint8 [n, h, w, c], labels int32 [n])`.

    Raises:
      FileNotFoundError: see `open_split`.
      ValueError: see `open_split`; or an example cannot be read, or is none of the data set.
    """
    source: Any = open_split(name, data_dir, split)
    n = len(source)
    height, width, channels = SPECS[name].image_shape
    x = np.empty((n, height, width, channels), np.uint8)
    y = np.empty(n, np.int32)
    for start in range(0, n, _CHUNK):
        rows = range(start, min(start + _CHUNK, n))
        try:
            examples = source.__getitems__(rows)  # ten times faster than `source[i]` for each
        except Exception as error:  # the readers raise nearly any exception for damaged records
            problem = (
                f"examples {rows[0]} to {rows[-1]} of {split} cannot be read ({first_line(error)})"
            )
            raise damaged(name, prepared_versions(name, data_dir)[-1], problem) from error
        for i, example in zip(rows, examples, strict=True):
            x[i], y[i] = decode_example(name, example, f"example {i} of {split}")
    return x, y


def _features(name: str, empty: str) -> tuple[str, tfds.features.FeaturesDict]:
    """The version and the features of TFDS's builder, or of this project where TFDS has none.

    `empty` is an empty folder, in which TFDS looks the builder up.
    """
    if name in tfds.list_builders(with_community_datasets=False):
        builder = tfds.builder(name, data_dir=empty)
        return str(builder.version), builder.info.features
    spec = SPECS[name]
    return "1.0.0", tfds.features.FeaturesDict(
        {
            "id": tfds.features.Text(),
            "image": tfds.features.Image(shape=spec.image_shape),
            "label": tfds.features.ClassLabel(num_classes=spec.num_classes),
        }
    )


def write(
    name: str,
    data_dir: str | Path,
    examples: Iterable[tuple[str, Example]],
    class_names: Mapping[str, Sequence[str]],
    *,
    overwrite: bool = False,
) -> tuple[Path, dict[str, int]]:
    """Writes a data set in the TFDS layout.

    The files go into a folder `.NAME.partial`, which takes its final place when all of them are
    written: a data set is complete or absent. What a killed conversion left is removed.

    Args:
      name: a name in `SPECS`.
      data_dir: TFDS folder; created if missing.
      examples: pairs `(split, example)`, images as PNG or JPEG bytes. Read once, in constant
        memory.
      class_names: label feature -> names of its classes, where they are known.
      overwrite: whether to replace an existing copy.

    Returns:
      The folder of the version and the number of examples in each split.

    Raises:
      ValueError: a copy exists already and `overwrite` is false, a split stays empty, another
        process writes this data set, or the folder cannot be written.
    """
    data_dir = Path(data_dir)
    with work_folder(data_dir / f".{name}.partial") as work:
        lookup, new_folder = work / "lookup", work / "new"
        lookup.mkdir()
        new_folder.mkdir()
        version, features = _features(name, lookup)
        folder = data_dir / name / version
        _finish_replacing(folder)
        if folder.exists() and not overwrite:
            raise ValueError(
                f"data_dir: {str(folder)!r} exists already; pass --overwrite to replace it"
            )
        for label, names in class_names.items():
            features[label].names = list(names)
        counts = _write_records(name, version, features, new_folder, examples)
        with writable(data_dir):
            folder.parent.mkdir(exist_ok=True)
            if folder.exists():
                folder.rename(_replaced(folder))
            new_folder.rename(folder)
            _finish_replacing(folder)
    return folder, counts


def _replaced(folder: Path) -> Path:
    """The place of an old copy while the new one takes its own."""
    return folder.with_name(f"{folder.name}.replaced")


def _finish_replacing(folder: Path) -> None:
    """Removes the old copy; where the new one has not come, the old one stays."""
    old = _replaced(folder)
    if old.exists() and not folder.exists():
        old.rename(folder)
    elif old.exists():
        shutil.rmtree(old)


def _write_records(
    name: str,
    version: str,
    features: tfds.features.FeaturesDict,
    folder: Path,
    examples: Iterable[tuple[str, Example]],
) -> dict[str, int]:
    """Writes the records and their metadata in shards of about 100 MB; returns the counts."""
    splits = ("train", SPECS[name].test_split)
    identity = tfds.core.dataset_info.DatasetIdentity(
        name=name, version=tfds.core.Version(version), data_dir=str(folder), module_name=__name__
    )
    info = tfds.core.DatasetInfo(
        builder=identity, features=features, supervised_keys=("image", "label")
    )
    shard = 1250 if features["image"].shape[0] is None else 50_000
    writer = tfds.core.SequentialWriter(
        info, max_examples_per_shard=shard, file_format="array_record"
    )
    writer.initialize_splits(list(splits))
    counts = Counter(dict.fromkeys(splits, 0))
    for chunk in _chunks(examples):
        for split, group in itertools.groupby(chunk, key=lambda pair: pair[0]):
            records = [example for _, example in group]
            with writable(folder):
                writer.add_examples({split: records})
            counts[split] += len(records)
    with writable(folder):
        writer.close_all()
    if empty := [split for split in splits if not counts[split]]:
        raise ValueError(
            f"source: expected examples of {' and '.join(splits)}, got none of "
            f"{' and '.join(empty)}; give the complete source"
        )
    return dict(counts)


def _chunks(examples: Iterable[tuple[str, Example]]) -> Iterator[list[tuple[str, Example]]]:
    """Groups examples into lists of up to `_CHUNK`: each call of the writer rewrites metadata."""
    iterator = iter(examples)
    while chunk := list(itertools.islice(iterator, _CHUNK)):
        yield chunk
