"""Readers of the file formats in which data sets are published.

Folders, zip and tar archives, `.npz`, idx files and pickled arrays. Nothing here knows a data set.
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
    """Turns errors of corrupted files in the `with` block into a ValueError that names `path`."""
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
    """Opens the files of a folder, a zip archive, or a tar archive that fits into memory.

    Args:
      path: the folder or the archive.

    Yields:
      Name -> function that reads the bytes. It works only inside the `with` block.

    Raises:
      tarfile.TarError: the file is neither a zip nor a tar archive, or it is corrupted.
      zipfile.BadZipFile: the zip archive is corrupted.
    """
    if path.is_dir():
        files = [file for file in sorted(path.rglob("*")) if file.is_file()]
        yield {file.relative_to(path).as_posix(): file.read_bytes for file in files}
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
    """Yields the name and the open file of each file in a tar archive, in one pass."""
    source: dict[str, Any] = (
        {"name": archive} if isinstance(archive, Path) else {"fileobj": archive}
    )
    with tarfile.open(**source) as tar:
        for entry in tar:
            if (file := tar.extractfile(entry)) is not None:
                yield entry.name, file


def find(files: Files, pattern: str) -> str:
    """The first file whose path ends in the regular expression; FileNotFoundError if none does."""
    for entry in files:
        if re.search(rf"(^|/){pattern}$", entry):
            return entry
    raise FileNotFoundError(
        f"source: no file matches {pattern!r} among its {len(files)} files; give the complete "
        f"source"
    )


def read_npz(path: Path) -> dict[str, np.ndarray]:
    """Reads the arrays of an `.npz`; zipfile.BadZipFile if it is none or holds Python objects."""
    try:
        with path.open("rb") as file, np.load(file) as archive:
            return {key: archive[key] for key in archive.files}
    except (ValueError, AttributeError) as error:  # NumPy raises these for other files
        raise zipfile.BadZipFile(str(error)) from error


def read_idx(entry: str, data: bytes) -> UInt8[np.ndarray, "..."]:
    r"""Reads an idx file of unsigned bytes.

    The file holds the bytes 0, 0, the type 8, the rank, the sizes as big-endian int32, the values.

    Args:
      entry: name of the file; it ends in .gz if the file is gzipped.
      data: bytes of the file.

    Returns:
      The array.

    Raises:
      EOFError: this is no idx file of bytes, or it is cut short.

    Example:
      >>> read_idx("a", b"\0\0\x08\x01" + b"\0\0\0\x02" + b"ab").tolist()
      [97, 98]

    Reference: LeCun, Cortes and Burges, The MNIST database of handwritten digits.
    """
    if entry.endswith(".gz"):
        data = gzip.decompress(data)
    error = EOFError(f"{entry}: no idx file of bytes, or cut short")
    if len(data) < 4 or data[:3] != b"\0\0\x08":
        raise error
    rank = data[3]
    header = 4 + 4 * rank
    if rank == 0 or len(data) < header:
        raise error
    shape = [int(size) for size in np.frombuffer(data[4:header], ">i4")]
    if len(data) - header != math.prod(shape):
        raise error
    return np.frombuffer(data, np.uint8, offset=header).reshape(shape)


class _ArrayUnpickler(pickle.Unpickler):
    """An unpickler of lists, dicts, strings and NumPy arrays that never runs code of the file."""

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
    """Unpickles containers of NumPy arrays, also those that Python 2 wrote.

    Raises:
      pickle.UnpicklingError: the bytes are no pickle, or hold anything else.

    Example:
      >>> read_pickle(pickle.dumps({"labels": [1, 2]}))
      {'labels': [1, 2]}
    """
    try:
        return _ArrayUnpickler(io.BytesIO(data), encoding="latin1").load()
    except Exception as error:  # for random bytes pickle raises nearly any exception
        raise pickle.UnpicklingError(str(error)) from error
