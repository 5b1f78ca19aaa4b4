"""Converters from the published files of each data set, one module a data set.

A converter reads the original archive or folder and yields examples for the TFDS layout. Every
data set but ImageNet may also come as an `.npz` of arrays (`arrays.py`).
"""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

from experiments.data.archives import Files, open_files, readable
from experiments.data.array_files import read_npz
from experiments.data.sources import arrays, cifar, imagenet, mnist, tiny_imagenet
from experiments.data.sources.source import Examples, Source
from experiments.data.specs import SPECS

__all__ = ["Examples", "Source", "open_source"]

_CONVERTERS: dict[str, Callable[[Files], Source]] = {
    "mnist": mnist.read,
    "cifar10": cifar.read_cifar10,
    "cifar100": cifar.read_cifar100,
    "tiny_imagenet": tiny_imagenet.read,
}


@contextlib.contextmanager
def open_source(name: str, path: Path) -> Iterator[Source]:
    """Opens the original files of a data set.

    Args:
      name: a name in `SPECS` other than digits.
      path: the file or folder that `SPECS[name].source` describes.

    Yields:
      The `Source`. Its examples can be read only inside the `with` block.

    Raises:
      FileNotFoundError: `path`, or a file that belongs in it, is missing.
      ValueError: a file is corrupted or encrypted, or its images or labels are not those of the
        data set.
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
                source = imagenet.read(path)
            elif path.suffix.lower() == ".npz":
                source = arrays.from_arrays(name, read_npz(path))
            else:
                files = stack.enter_context(open_files(path))
                source = _CONVERTERS[name](files)
        yield source._replace(examples=guarded(source.examples))
