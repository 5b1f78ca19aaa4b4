"""Readers of the files in which data sets are published as arrays: `.npz`, idx and pickles.

Nothing here knows a data set.
"""

import gzip
import io
import math
import pickle
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8

from experiments.data.archives import MAX_BYTES, hidden, too_large


def read_npz(path: Path) -> dict[str, np.ndarray]:
    """Reads the arrays of an `.npz`.

    Raises:
      zipfile.BadZipFile: the file is none, it is encrypted, or it holds anything but arrays.
      ValueError: an array is too large.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            if any(entry.file_size > MAX_BYTES for entry in archive.infolist()):
                raise too_large(path)
            entries = [entry for entry in archive.infolist() if not hidden(entry.filename)]
            return {
                entry.filename.removesuffix(".npy"): _read_npy(archive, entry) for entry in entries
            }
    except (RuntimeError, MemoryError) as error:  # zipfile's for encryption and odd compression
        raise zipfile.BadZipFile(str(error)) from error


def _read_npy(archive: zipfile.ZipFile, entry: zipfile.ZipInfo) -> np.ndarray:
    """The array of one file in an `.npz`; BadZipFile if it is none, or holds Python objects."""
    try:
        with archive.open(entry) as file:
            return np.lib.format.read_array(file, allow_pickle=False)
    except (ValueError, SyntaxError) as error:  # NumPy's
        raise zipfile.BadZipFile(f"{entry.filename}: {error}") from error


def read_idx(entry: str, data: bytes) -> UInt8[np.ndarray, "..."]:
    r"""Reads an idx file of unsigned bytes.

    The file holds the bytes 0, 0, the type 8, the rank, the sizes as big-endian int32, the values.

    Args:
      entry: name of the file, for messages.
      data: bytes of the file, gzipped or not.

    Returns:
      The array.

    Raises:
      EOFError: this is no idx file of bytes, or it is cut short.
      ValueError: the file is too large.

    Example:
      >>> read_idx("a", b"\0\0\x08\x01" + b"\0\0\0\x02" + b"ab").tolist()
      [97, 98]

    Reference: LeCun, Cortes and Burges, The MNIST database of handwritten digits.
    """
    if data.startswith(b"\x1f\x8b"):  # gzipped, whatever its name says
        try:
            with gzip.GzipFile(fileobj=io.BytesIO(data)) as file:
                data = file.read(MAX_BYTES + 1)
        except (OSError, EOFError, zlib.error) as error:
            raise EOFError(f"{entry}: {error}") from error
        if len(data) > MAX_BYTES:
            raise too_large(entry)
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
