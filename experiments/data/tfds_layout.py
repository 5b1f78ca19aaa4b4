"""The TFDS layout on disk, written and read without TensorFlow:
DATA_DIR/NAME/VERSION/*.array_record with encoded images.
"""

import itertools
import re
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import tensorflow_datasets as tfds
from jaxtyping import Int, UInt8

from experiments.data.specs import SPECS, prepare_command

Example = dict[str, Any]
_CHUNK = 500


def png(image: UInt8[np.ndarray, "h w c"]) -> bytes:
    """An RGB or grey image as PNG bytes (lossless)."""
    pixels = image[..., ::-1] if image.shape[-1] == 3 else image
    return cv2.imencode(".png", np.ascontiguousarray(pixels))[1].tobytes()


def decode(data: bytes, channels: int) -> UInt8[np.ndarray, "h w c"]:
    """PNG or JPEG bytes as an RGB (3 channels) or grey (1) image, EXIF orientation ignored;
    ValueError if they are neither.

    Example:
        >>> decode(png(np.full((2, 3, 3), 7, np.uint8)), 3).tolist() == np.full((2, 3, 3), 7).tolist()
        True
    """
    flags = (
        cv2.IMREAD_GRAYSCALE if channels == 1 else cv2.IMREAD_COLOR_RGB
    ) | cv2.IMREAD_IGNORE_ORIENTATION
    image = cv2.imdecode(np.frombuffer(data, np.uint8), flags) if data else None
    if image is None:
        raise ValueError(
            f"image: expected PNG or JPEG bytes, got {len(data)} bytes that do not decode; prepare "
            f"the data set again"
        )
    return image.reshape(*image.shape[:2], channels)


def prepared_versions(name: str, data_dir: str | Path) -> list[Path]:
    """The prepared versions of a data set under `data_dir`, oldest first."""
    found = [
        p.parent
        for p in Path(data_dir, name).glob("*/dataset_info.json")
        if re.fullmatch(r"\d+\.\d+\.\d+", p.parent.name)
    ]
    return sorted(found, key=lambda p: [int(part) for part in p.name.split(".")])


def open_split(name: str, data_dir: str | Path, split: str) -> Sequence[Example]:
    """Random access to the examples of a prepared split, images left as PNG or JPEG bytes.

    Args:
        name: a name in `SPECS`.
        data_dir: TFDS folder.
        split: "train" or the set's `test_split`.

    Returns:
        A TFDS data source; `source[i]` and `source.__getitems__([i, ...])` give dicts with at least
        "image" and "label".

    Raises:
        FileNotFoundError: nothing is prepared there.
        ValueError: what is there is not in the array_record format, or holds other images or
          classes.
    """
    versions = prepared_versions(name, data_dir)
    if not versions:
        raise FileNotFoundError(
            f"data_dir: no {name} in {str(data_dir)!r}; prepare it "
            f"with:\n{prepare_command(name, data_dir)}"
        )
    builder = tfds.builder_from_directory(versions[-1])
    file_format = builder.info.file_format
    if (
        file_format is None
        or file_format.value != "array_record"
        or split not in builder.info.splits
    ):
        found = f"{file_format and file_format.value} with splits {list(builder.info.splits)}"
        raise ValueError(
            f"data_dir: expected {str(versions[-1])!r} to hold array_record files with a split "
            f"{split!r}, got {found}; "
            f"prepare it again, with --overwrite:\n{prepare_command(name, data_dir)}"
        )
    return builder.as_data_source(split=split, decoders={"image": tfds.decode.SkipDecoding()})


def read_arrays(
    name: str, data_dir: str | Path, split: str
) -> tuple[UInt8[np.ndarray, "n h w c"], Int[np.ndarray, " n"]]:
    """A whole prepared split as arrays (about 2 s for CIFAR-10).

    Args:
        name: a name in `SPECS`, of images of one size.
        data_dir: TFDS folder.
        split: "train" or the set's `test_split`.

    Returns:
        (pixels uint8 [n, h, w, c], labels int32 [n]).

    Raises:
        FileNotFoundError, ValueError: see `open_split`.
    """
    source: Any = open_split(
        name, data_dir, split
    )  # `__getitems__` reads ten times faster than `source[i]`
    shape = SPECS[name].image_shape
    x = np.empty((len(source), *shape), np.uint8)
    y = np.empty(len(source), np.int32)
    for start in range(0, len(x), _CHUNK):
        for i, example in enumerate(
            source.__getitems__(range(start, min(start + _CHUNK, len(x)))), start
        ):
            x[i], y[i] = decode(example["image"], shape[-1]), example["label"]
    return x, y


def _features(name: str, empty: str) -> tuple[str, tfds.features.FeaturesDict]:
    """Version and features of TFDS's own builder, looked up in an empty folder, or ours where it
    has none.
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
    """Write a data set in the TFDS layout: into a temporary folder that takes its place when
    everything is there.

    Args:
        name: a name in `SPECS`.
        data_dir: TFDS folder; made if missing.
        examples: pairs (split, example); images as PNG or JPEG bytes. Read once, in constant
          memory.
        class_names: names of the classes of each label feature, as far as they are known.
        overwrite: replace what is there.

    Returns:
        (folder of the version, number of examples in each split).

    Raises:
        ValueError: the set is there already and `overwrite` is false, or a split stays empty.
    """
    data_dir = Path(data_dir)
    data_dir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=data_dir, prefix=f".{name}-") as scratch:
        version, features = _features(name, scratch)
        folder, new = data_dir / name / version, Path(scratch, "new")
        if folder.exists() and not overwrite:
            raise ValueError(
                f"data_dir: {str(folder)!r} exists already; pass --overwrite to replace it"
            )
        for label, names in class_names.items():
            features[label].names = list(names)
        new.mkdir()
        counts = _write_records(name, version, features, new, examples)
        folder.parent.mkdir(exist_ok=True)
        if folder.exists():
            folder.rename(Path(scratch, "old"))
        new.rename(folder)
    return folder, counts


def _write_records(
    name: str,
    version: str,
    features: tfds.features.FeaturesDict,
    folder: Path,
    examples: Iterable[tuple[str, Example]],
) -> dict[str, int]:
    """Write the records and their metadata, in shards of some 100 MB."""
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
            writer.add_examples({split: records})
            counts[split] += len(records)
    writer.close_all()
    if empty := [split for split in splits if not counts[split]]:
        raise ValueError(
            f"source: expected examples of {' and '.join(splits)}, got none of "
            f"{' and '.join(empty)}; give the complete source"
        )
    return dict(counts)


def _chunks(examples: Iterable[tuple[str, Example]]) -> Iterator[list[tuple[str, Example]]]:
    """Lists of up to `_CHUNK` examples: the writer renews its metadata at each call."""
    iterator = iter(examples)
    while chunk := list(itertools.islice(iterator, _CHUNK)):
        yield chunk
