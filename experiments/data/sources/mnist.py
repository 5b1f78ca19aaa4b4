"""MNIST: four idx files, gzipped or not."""

from experiments.data.archives import Files, find
from experiments.data.array_files import read_idx
from experiments.data.sources.arrays import from_arrays
from experiments.data.sources.source import Source


def read(files: Files) -> Source:
    """Reads the four official idx files."""
    arrays = {}
    for split, prefix in (("train", "train"), ("test", "t10k")):
        for key, kind in (("x", "images"), ("y", "labels")):
            entry = find(files, rf"{prefix}-{kind}[-.]idx[13]-ubyte(\.(?i:gz))?")
            arrays[f"{key}_{split}"] = read_idx(entry, files[entry]())
    return from_arrays("mnist", arrays)
