"""Short names for what a measurement depends on, so that it is repeated when that has changed."""

import functools
import hashlib
import zlib
from collections.abc import Iterable
from pathlib import Path

from experiments.bench.gpu import tiles
from pallas_kernels.block_sparse_conv import ConvSpec, xla

KERNELS = Path(xla.__file__).parents[1]  # the folder with one folder for each backend


def fingerprint(paths: Iterable[Path]) -> str:
    """Returns a short name for the contents of files.

    Args:
      paths: of the files; absent ones count as such.

    Returns:
      Eight hexadecimal digits.

    Example:
      >>> len(fingerprint([Path(__file__)]))
      8
    """
    digest = hashlib.sha256()
    for path in sorted(paths):
        content = path.read_bytes() if path.is_file() else b""
        digest.update(path.name.encode() + b"\0" + content + b"\0")
    return digest.hexdigest()[:8]


@functools.cache
def backend_fingerprint(name: str) -> str:
    """Returns the fingerprint of the sources of one backend's kernels, by the backend's name."""
    return fingerprint((KERNELS / name).glob("*.py"))


@functools.cache
def _implementation_fingerprint(name: str) -> str:
    shared = [
        path
        for folder in (KERNELS.parent, KERNELS, KERNELS / "xla")
        for path in folder.glob("*.py")
    ]
    return fingerprint({*shared, *(KERNELS / name).glob("*.py")})


def implementation_key(name: str, spec: ConvSpec | None = None) -> str:
    """Returns what an implementation's measurements depend on: its sources and its tiles.

    Args:
      name: of the implementation.
      spec: the static sizes of a convolution; None for all.

    Returns:
      A fingerprint of the sources; with a spec, also one of the tiles in which it runs.
    """
    sources = _implementation_fingerprint(name)
    if spec is None:
        return sources
    return f"{sources}-{zlib.crc32(str(tiles.chosen_tiles(name, spec)).encode()):08x}"
