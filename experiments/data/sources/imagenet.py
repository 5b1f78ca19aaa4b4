"""ImageNet 2012: the two official tar archives."""

import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import IO

import tensorflow_datasets as tfds

from experiments.data.archives import readable, tar_members
from experiments.data.images import rgb_jpeg
from experiments.data.sources.source import Examples, Source
from experiments.data.specs import SPECS


def read(path: Path) -> Source:
    """Reads the folder of the two archives in one pass and constant memory."""
    return Source(_examples(path), {}, sum(SPECS["imagenet2012"].sizes))


def _examples(path: Path) -> Examples:
    train_archive = path / "ILSVRC2012_img_train.tar"
    validation_archive = path / "ILSVRC2012_img_val.tar"
    for archive in (train_archive, validation_archive):
        if not archive.exists():
            raise FileNotFoundError(
                f"source: {str(archive)!r} does not exist; expected {SPECS['imagenet2012'].source}"
            )
    wnids = _tfds_lines("labels.txt")
    validation_wnids = _tfds_lines("validation_labels.txt")

    with readable(train_archive, SPECS["imagenet2012"].source):
        for folder, class_archive in tar_members(train_archive):
            wnid = PurePosixPath(folder).stem
            if wnid not in wnids:
                raise ValueError(
                    f"source: {train_archive.name}: {folder} is no class of ImageNet 2012; fetch "
                    f"it again"
                )
            label = wnids.index(wnid)
            for entry, data in _images(class_archive, train_archive / folder):
                image = rgb_jpeg(data, entry)
                yield "train", {"file_name": entry, "image": image, "label": label}

    for entry, data in _images(validation_archive, validation_archive):
        number = re.search(r"_val_(\d{8})\.JPEG$", entry)
        if not number or not 1 <= int(number[1]) <= len(validation_wnids):
            raise ValueError(
                f"source: {validation_archive.name}: expected ILSVRC2012_val_00000001.JPEG to "
                f"{len(validation_wnids)}, got {entry}; fetch it again"
            )
        label = wnids.index(validation_wnids[int(number[1]) - 1])
        yield "validation", {"file_name": entry, "image": rgb_jpeg(data, entry), "label": label}


def _images(archive: Path | IO[bytes], path: Path) -> Iterator[tuple[str, bytes]]:
    """The name and the bytes of each image in an archive; errors name its `path`."""
    with readable(path, SPECS["imagenet2012"].source):
        for entry, file in tar_members(archive):
            yield entry, file.read()


def _tfds_lines(file: str) -> list[str]:
    """The lines of a list that TFDS ships with its ImageNet builder."""
    return tfds.core.tfds_path(f"datasets/imagenet2012/{file}").read_text().split()
