"""The original files of each data set, read into examples for the TFDS layout."""

import contextlib
import io
import pickle
import re
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np
import tensorflow_datasets as tfds
from jaxtyping import UInt8
from PIL import Image, UnidentifiedImageError

from experiments.data.archives import (
    Files,
    find,
    open_files,
    read_idx,
    read_npz,
    read_pickle,
    readable,
    tar_members,
)
from experiments.data.specs import NPZ, SPECS
from experiments.data.tfds_layout import Example, png

Examples = Iterator[tuple[str, Example]]


class Source(NamedTuple):
    """What a converter found: examples one by one, as (split, example); names of classes; how many
    examples there should be.
    """

    examples: Examples
    class_names: dict[str, list[str]]
    total: int


@contextlib.contextmanager
def open_source(name: str, path: Path) -> Iterator[Source]:
    """Open the original files of a data set.

    Args:
        name: a name in `SPECS` other than digits.
        path: what `SPECS[name].source` describes.

    Yields:
        The `Source`, readable inside of the `with` block.

    Raises:
        FileNotFoundError: `path`, or a file that belongs into it, is missing.
        ValueError: a file is corrupted, or its images or labels are not those of the data set.
    """
    expected = SPECS[name].source
    if not path.exists():
        raise FileNotFoundError(f"source: {str(path)!r} does not exist; expected {expected}")

    def guarded(examples: Examples) -> Examples:
        with readable(path, expected):
            yield from examples

    with contextlib.ExitStack() as stack:
        with readable(path, expected):
            if name == "imagenet2012":
                source = Source(_imagenet(path), {}, sum(SPECS[name].sizes))
            elif path.suffix == ".npz":
                source = _from_arrays(name, read_npz(path), {})
            else:
                files = stack.enter_context(open_files(path))
                source = {"mnist": _mnist, "tiny_imagenet": _tiny_imagenet}.get(name, _cifar)(
                    name, files
                )
        yield source._replace(examples=guarded(source.examples))


def _mnist(name: str, files: Files) -> Source:
    arrays = {}
    for split, prefix in (("train", "train"), ("test", "t10k")):
        for key, kind in (("x", "images"), ("y", "labels")):
            entry = find(files, rf"{prefix}-{kind}[-.]idx[13]-ubyte(\.gz)?")
            arrays[f"{key}_{split}"] = read_idx(entry, files[entry]())
    return _from_arrays(name, arrays, {})


def _cifar(name: str, files: Files) -> Source:
    """The "python version": pickled batches, each image a row of 3 x 32 x 32 bytes."""
    if name == "cifar10":
        parts = {"train": [f"data_batch_{i}" for i in range(1, 6)], "test": ["test_batch"]}
        labels, meta, names = {"y": "labels"}, "batches.meta", {"label": "label_names"}
    else:
        parts = {"train": ["train"], "test": ["test"]}
        labels, meta = {"y": "fine_labels", "coarse": "coarse_labels"}, "meta"
        names = {"label": "fine_label_names", "coarse_label": "coarse_label_names"}
    arrays: dict[str, np.ndarray] = {}
    for split, entries in parts.items():
        batches = [read_pickle(files[find(files, entry)]()) for entry in entries]
        try:
            arrays |= {
                f"{key}_{split}": np.concatenate([batch[label] for batch in batches])
                for key, label in labels.items()
            }
            arrays[f"x_{split}"] = (
                np.concatenate([batch["data"] for batch in batches])
                .reshape(-1, 3, 32, 32)
                .transpose(0, 2, 3, 1)
            )
        except (KeyError, TypeError, ValueError) as error:
            raise pickle.UnpicklingError(f"{', '.join(entries)}: {error}") from error
    known = read_pickle(files[find(files, meta)]())
    return _from_arrays(
        name, arrays, {feature: known[key] for feature, key in names.items() if key in known}
    )


def _from_arrays(
    name: str, arrays: Mapping[str, np.ndarray], class_names: dict[str, list[str]]
) -> Source:
    """Check x_train, y_train, x_test, y_test (and coarse_train, coarse_test of cifar100), and make
    examples of them.
    """
    spec = SPECS[name]
    if missing := [key for key in ("x_train", "y_train", "x_test", "y_test") if key not in arrays]:
        raise ValueError(
            f"source: expected {NPZ}, got the keys {sorted(arrays)}; missing: {', '.join(missing)}"
        )
    splits = {}
    for split, ours in (("train", "train"), ("test", spec.test_split)):
        x = _images(f"x_{split}", arrays[f"x_{split}"], spec.image_shape)
        y = _labels(f"y_{split}", arrays[f"y_{split}"], len(x), spec.num_classes)
        coarse = arrays.get(f"coarse_{split}")
        splits[ours] = (
            x,
            y,
            np.full(len(x), -1)
            if coarse is None
            else _labels(f"coarse_{split}", coarse, len(x), 20),
        )

    def examples() -> Examples:
        for split, (x, y, coarse) in splits.items():
            for i, image in enumerate(x):
                example: Example = {"image": png(image), "label": int(y[i])}
                if name != "mnist":
                    example["id"] = f"{split}_{i:05d}"
                if name == "cifar100":
                    example["coarse_label"] = int(coarse[i])  # -1: unknown
                yield split, example

    return Source(examples(), class_names, sum(len(x) for x, _, _ in splits.values()))


def _images(key: str, x: np.ndarray, shape: tuple[int, int, int]) -> UInt8[np.ndarray, "n h w c"]:
    """The array with a channel axis; ValueError unless it holds uint8 images of the shape."""
    if x.shape[1:] == shape[:2] and shape[2] == 1:
        x = x[..., None]
    if x.dtype != np.uint8 or x.shape[1:] != shape or not len(x):
        expected = f"uint8 [n, {', '.join(map(str, shape))}], 0..255"
        raise ValueError(
            f"source: {key}: expected {expected}, got {x.dtype} {list(x.shape)}; convert it"
        )
    return x


def _labels(key: str, y: np.ndarray, n: int, classes: int) -> np.ndarray:
    """The labels with one axis; ValueError unless they are n integers in 0 .. classes - 1."""
    if y.shape == (n, 1):
        y = y[:, 0]
    if not np.issubdtype(y.dtype, np.integer) or y.shape != (n,):
        raise ValueError(
            f"source: {key}: expected {n} integers, one for each image, got {y.dtype} "
            f"{list(y.shape)}; convert it"
        )
    if y.min() < 0 or y.max() >= classes:
        raise ValueError(
            f"source: {key}: expected labels 0 to {classes - 1}, got {y.min()} to {y.max()}; is it "
            f"another data set?"
        )
    return y


def _tiny_imagenet(name: str, files: Files) -> Source:
    """Folders of JPEGs; the label is the index in the sorted WordNet ids."""
    spec = SPECS[name]
    ids = find(files, r"wnids\.txt")
    root = PurePosixPath(ids).parent
    wnids = sorted(set(files[ids]().decode().split()))
    if len(wnids) != spec.num_classes:
        raise ValueError(
            f"source: {ids}: expected {spec.num_classes} different WordNet ids, got {len(wnids)}; "
            f"fetch it again"
        )
    lines = files[find(files, r"val/val_annotations\.txt")]().decode().splitlines()
    trained = (re.fullmatch(r"(?:.*/)?train/(\w+)/images/[^/]+\.JPEG", entry) for entry in files)
    members = [("train", match[0], match[1]) for match in trained if match]
    members += [
        (spec.test_split, str(root / "val/images" / image), wnid)
        for image, wnid, *_ in (line.split("\t") for line in lines)
    ]

    def examples() -> Examples:
        for split, entry, wnid in members:
            if wnid not in wnids or entry not in files:
                raise ValueError(
                    f"source: {entry}, class {wnid}: the image is missing, or its class in "
                    f"wnids.txt; fetch it again"
                )
            image = rgb_jpeg(files[entry](), entry, size=spec.image_shape[:2])
            yield (
                split,
                {"id": PurePosixPath(entry).name, "image": image, "label": wnids.index(wnid)},
            )

    return Source(examples(), {"label": wnids}, len(members))


def _imagenet(path: Path) -> Examples:
    """The two official tar archives, in one pass and constant memory."""
    train, val = path / "ILSVRC2012_img_train.tar", path / "ILSVRC2012_img_val.tar"
    for archive in (train, val):
        if not archive.exists():
            raise FileNotFoundError(
                f"source: {str(archive)!r} does not exist; expected {SPECS['imagenet2012'].source}"
            )
    wnids = tfds.core.tfds_path("datasets/imagenet2012/labels.txt").read_text().split()
    answers = tfds.core.tfds_path("datasets/imagenet2012/validation_labels.txt").read_text().split()
    for folder, inner in tar_members(train):
        wnid = PurePosixPath(folder).stem
        if wnid not in wnids:
            raise ValueError(
                f"source: {train.name}: {folder} is no class of ImageNet 2012; fetch it again"
            )
        for entry, file in tar_members(inner):
            yield (
                "train",
                {
                    "file_name": entry,
                    "image": rgb_jpeg(file.read(), entry),
                    "label": wnids.index(wnid),
                },
            )
    for entry, file in tar_members(val):
        number = re.search(r"_val_(\d{8})\.JPEG$", entry)
        if not number or not 1 <= int(number[1]) <= len(answers):
            raise ValueError(
                f"source: {val.name}: expected ILSVRC2012_val_00000001.JPEG to {len(answers)}, got "
                f"{entry}; fetch it again"
            )
        label = wnids.index(answers[int(number[1]) - 1])
        yield (
            "validation",
            {"file_name": entry, "image": rgb_jpeg(file.read(), entry), "label": label},
        )


def rgb_jpeg(data: bytes, entry: str, *, size: tuple[int, int] | None = None) -> bytes:
    """An image file as an RGB or grey JPEG: kept as it is, or encoded anew if it is CMYK or a PNG
    (23 files of ImageNet).

    Args:
        data: bytes of the file.
        entry: its name, for messages.
        size: (h, w) in pixels that it must have; None for any.

    Returns:
        JPEG bytes.

    Raises:
        ValueError: no image, or one of another size.
    """
    try:
        with Image.open(io.BytesIO(data)) as image:
            if size and image.size != size[::-1]:
                raise ValueError(
                    f"source: {entry}: expected {size[0]} x {size[1]} pixels, got {image.height} x "
                    f"{image.width}; fetch it again"
                )
            if image.format == "JPEG" and image.mode in ("RGB", "L"):
                return data
            repaired = io.BytesIO()
            image.convert("RGB").save(repaired, "JPEG", quality=100, subsampling=0)
            return repaired.getvalue()
    except UnidentifiedImageError as error:
        raise ValueError(
            f"source: {entry}: expected a JPEG image, got {len(data)} bytes that are none; fetch "
            f"it again"
        ) from error
