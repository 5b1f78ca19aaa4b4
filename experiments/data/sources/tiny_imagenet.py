"""Tiny ImageNet: folders of 64x64 JPEGs, labelled by WordNet ids."""

import re
from pathlib import PurePosixPath

from experiments.data.archives import Files, find, read_text
from experiments.data.images import rgb_jpeg
from experiments.data.sources.source import Examples, Source
from experiments.data.specs import SPECS


def read(files: Files) -> Source:
    """Reads the official folder. A label is the index of its WordNet id in the sorted ids."""
    spec = SPECS["tiny_imagenet"]
    ids_file = find(files, r"wnids\.txt")
    root = PurePosixPath(ids_file).parent
    wnids = sorted(set(read_text(files, ids_file).split()))
    if len(wnids) != spec.num_classes:
        raise ValueError(
            f"source: {ids_file}: expected {spec.num_classes} different WordNet ids, got "
            f"{len(wnids)}; fetch it again"
        )
    images = []
    for entry in files:  # whatever lies in a folder of images is one, or refused
        if match := re.fullmatch(r"(?:.*/)?train/(\w+)/images/[^/]+", entry):
            images.append(("train", entry, match[1]))
    images += [(spec.test_split, entry, wnid) for entry, wnid in _annotations(files, root).items()]

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


def _annotations(files: Files, root: PurePosixPath) -> dict[str, str]:
    """The WordNet id of each validation image, in the order of the annotations.

    ValueError where an image has no annotation or two.
    """
    annotations_file = find(files, r"val/val_annotations\.txt")
    wnids: dict[str, str] = {}
    for number, line in enumerate(read_text(files, annotations_file).splitlines(), 1):
        name, _, rest = line.partition("\t")
        entry = str(root / "val/images" / name)
        if not rest or entry in wnids:
            raise ValueError(
                f"source: {annotations_file}, line {number}: expected an image of its own and its "
                f"class, got {line!r}; fetch it again"
            )
        wnids[entry] = rest.partition("\t")[0]
    folder = f"{root / 'val/images'}/"
    missing = [entry for entry in files if entry.startswith(folder) and entry not in wnids]
    if missing:
        raise ValueError(
            f"source: {missing[0]} is not in {annotations_file}, like {len(missing) - 1} other "
            f"images; fetch it again"
        )
    return wnids
