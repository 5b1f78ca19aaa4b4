"""The file formats in which data sets are published: folders, zip, tar, npz, idx and pickled
arrays. Knows no data set.
"""

import contextlib
import functools
import gzip
import io
import math
import pickle
import re
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np
from jaxtyping import UInt8

Files = Mapping[str, Callable[[], bytes]]


@contextlib.contextmanager
def readable(path: Path, expected: str) -> Iterator[None]:
    """Within the block, a corrupted archive or file becomes a ValueError that names `path` and what
    was `expected`.
    """
    try:
        yield
    except (
        EOFError,
        gzip.BadGzipFile,
        pickle.UnpicklingError,
        tarfile.TarError,
        zipfile.BadZipFile,
        zlib.error,
    ) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(
            f"source: {str(path)!r} is corrupted or not {expected} ({reason}); fetch it again"
        ) from error


@contextlib.contextmanager
def open_files(path: Path) -> Iterator[Files]:
    """The files of a folder, a zip archive or a tar archive that fits into memory.

    Args:
        path: the folder or the archive.

    Yields:
        name -> function that reads the bytes, usable inside of the `with` block.

    Raises:
        tarfile.TarError, zipfile.BadZipFile: it is none of the three, or corrupted.
    """
    if path.is_dir():
        yield {
            p.relative_to(path).as_posix(): p.read_bytes
            for p in sorted(path.rglob("*"))
            if p.is_file()
        }
    elif path.suffix == ".zip":
        with zipfile.ZipFile(path) as archive:
            yield {
                entry: functools.partial(archive.read, entry)
                for entry in sorted(archive.namelist())
                if not entry.endswith("/")
            }
    else:
        yield {entry: functools.partial(bytes, file.read()) for entry, file in tar_members(path)}


def tar_members(archive: Path | IO[bytes]) -> Iterator[tuple[str, IO[bytes]]]:
    """Name and open file of each file in a tar archive (compressed or not), in one pass."""
    with (
        tarfile.open(archive) if isinstance(archive, Path) else tarfile.open(fileobj=archive) as tar
    ):
        for entry in tar:
            if (file := tar.extractfile(entry)) is not None:
                yield entry.name, file


def find(files: Files, pattern: str) -> str:
    """The first file whose path ends in the pattern; FileNotFoundError if there is none."""
    for entry in files:
        if re.search(rf"(^|/){pattern}$", entry):
            return entry
    raise FileNotFoundError(
        f"source: no file matches {pattern!r} among its {len(files)} files; give the complete "
        f"source"
    )


def read_npz(path: Path) -> dict[str, np.ndarray]:
    """The arrays of an .npz; zipfile.BadZipFile if it is none, or holds Python objects."""
    try:
        with path.open("rb") as file, np.load(file) as archive:
            return {key: archive[key] for key in archive.files}
    except (ValueError, AttributeError) as error:  # what numpy makes of another file
        raise zipfile.BadZipFile(str(error)) from error


def read_idx(entry: str, data: bytes) -> UInt8[np.ndarray, "..."]:
    r"""An idx file of bytes, gzipped or not: 0, 0, type 8, rank, the sizes as big-endian int32, the
     values.

    Args:
        entry: its name; ends in .gz if it is gzipped.
        data: bytes of the file.

    Returns:
        The array.

    Raises:
        EOFError: it is no such file.

    Example:
        >>> read_idx("a", b"\0\0\x08\x01" + b"\0\0\0\x02" + b"ab").tolist()
        [97, 98]

    Reference: LeCun, Cortes and Burges, The MNIST database of handwritten digits.
    """
    if entry.endswith(".gz"):
        data = gzip.decompress(data)
    header = 4 + 4 * data[3] if data[:3] == b"\0\0\x08" and len(data) > 3 else 0
    shape = (
        [int(n) for n in np.frombuffer(data[4:header], ">i4")] if 4 < header <= len(data) else []
    )
    if not shape or len(data) - header != math.prod(shape):
        raise EOFError(f"{entry}: no idx file of bytes, or cut short")
    return np.frombuffer(data, np.uint8, offset=header).reshape(shape)


class _ArrayUnpickler(pickle.Unpickler):
    """Admits lists, dicts, strings and NumPy arrays, and nothing that could run code."""

    def find_class(self, module: str, name: str) -> Any:
        if (
            name in ("ndarray", "dtype", "_reconstruct", "_frombuffer")
            and module.partition(".")[0] == "numpy"
        ):
            return super().find_class(module.replace("numpy.core", "numpy._core"), name)
        if (module, name) == ("_codecs", "encode"):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"unexpected {module}.{name} in the pickle")


def read_pickle(data: bytes) -> Any:
    """Unpickle containers of NumPy arrays, also of Python 2; pickle.UnpicklingError for anything
    else.

    Example:
        >>> read_pickle(pickle.dumps({"labels": [1, 2]}))
        {'labels': [1, 2]}
    """
    try:
        return _ArrayUnpickler(io.BytesIO(data), encoding="latin1").load()
    except Exception as error:  # noise makes pickle raise nearly anything
        raise pickle.UnpicklingError(str(error)) from error
