"""Tiny ImageNet: folders of 64x64 JPEGs, labelled by WordNet ids."""

import re
from pathlib import PurePosixPath

from experiments.data.archives import Files, find
from experiments.data.images import rgb_jpeg
from experiments.data.sources.source import Examples, Source
from experiments.data.specs import SPECS


def read(files: Files) -> Source:
    """Reads the official folder. A label is the index of its WordNet id in the sorted ids."""
    spec = SPECS["tiny_imagenet"]
    ids_file = find(files, r"wnids\.txt")
    root = PurePosixPath(ids_file).parent
    wnids = sorted(set(files[ids_file]().decode().split()))
    if len(wnids) != spec.num_classes:
        raise ValueError(
            f"source: {ids_file}: expected {spec.num_classes} different WordNet ids, got "
            f"{len(wnids)}; fetch it again"
        )
    images = []
    for entry in files:
        if match := re.fullmatch(r"(?:.*/)?train/(\w+)/images/[^/]+\.JPEG", entry):
            images.append(("train", entry, match[1]))
    annotations = files[find(files, r"val/val_annotations\.txt")]().decode().splitlines()
    for line in annotations:
        image, wnid, *_ = line.split("\t")
        images.append((spec.test_split, str(root / "val/images" / image), wnid))

    def examples() -> Examples:
        for split, entry, wnid in images:
            if wnid not in wnids or entry not in files:
                raise ValueError(
                    f"source: {entry}, class {wnid}: the image is missing, or its class is not in "
                    f"wnids.txt; fetch it again"
                )
            image = rgb_jpeg(files[entry](), entry, size=spec.image_shape[:2])
            name = PurePosixPath(entry).name
            yield split, {"id": name, "image": image, "label": wnids.index(wnid)}

    return Source(examples(), {"label": wnids}, len(images))
