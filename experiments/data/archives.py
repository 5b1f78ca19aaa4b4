"""Folders, zip archives and tar archives as files by name, whatever state they are in.

Files that an operating system left beside the data (`._x`, `.DS_Store`, `__MACOSX`, `Thumbs.db`)
and links that lead nowhere are skipped. Nothing is ever extracted to the disk.
"""

import contextlib
import functools
import gzip
import lzma
import os
import pickle
import posixpath
import re
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

Files = Mapping[str, Callable[[], bytes]]

MAX_BYTES = 2**31
"""No published file of these data sets is larger once unpacked; a larger one is a mistake."""


@contextlib.contextmanager
def readable(path: Path, expected: str) -> Iterator[None]:
    """Turns errors of corrupted files in the `with` block into a ValueError that names `path`."""
    try:
        yield
    except FileNotFoundError:
        raise
    except (
        EOFError,
        gzip.BadGzipFile,
        lzma.LZMAError,
        pickle.UnpicklingError,
        tarfile.TarError,
        zipfile.BadZipFile,
        zlib.error,
    ) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0].rstrip(":")
        raise ValueError(
            f"source: {str(path)!r} is corrupted or not {expected} ({reason}); fetch it again"
        ) from error
    except OSError as error:
        raise ValueError(
            f"source: {str(path)!r} cannot be read ({error}); make it readable, or fetch it again"
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
      ValueError: a file is encrypted, or too large.
      OSError: a folder cannot be listed.
    """
    if path.is_dir():
        names = {file.relative_to(path).as_posix(): file for file in _walk(path)}
        yield {
            name: functools.partial(_read_file, names[name])
            for name in sorted(names)
            if not hidden(name)
        }
    elif path.suffix.lower() == ".zip":
        with zipfile.ZipFile(path) as archive:
            yield dict(sorted(_zip_files(archive).items()))
    else:
        contents: dict[str, bytes] = {}
        size = 0
        for entry, file in tar_members(path):
            contents[entry] = file.read()
            size += len(contents[entry])
            if size > MAX_BYTES:
                raise too_large(path)
        yield {entry: functools.partial(bytes, data) for entry, data in contents.items()}


def hidden(entry: str) -> bool:
    """Whether an operating system made a file for itself beside the data.

    Example:
      >>> [hidden(entry) for entry in ("./a/x.png", "a/._x.png", "__MACOSX/a", "a/Thumbs.db")]
      [False, True, True, True]
    """
    parts = [part for part in entry.split("/") if part not in ("", ".", "..")]
    system = {"__MACOSX", "Thumbs.db", "desktop.ini"}
    return any(part.startswith(".") or part in system for part in parts)


def too_large(name: str | Path) -> ValueError:
    """The error for a file that unpacks to more than `MAX_BYTES`."""
    return ValueError(
        f"source: {str(name)!r} holds more than {MAX_BYTES:,} bytes, which no file of this data "
        f"set does; fetch it again"
    )


def _walk(path: Path) -> Iterator[Path]:
    """The files below a folder, also those of linked folders; each real folder once."""

    def fail(error: OSError) -> None:
        raise error

    seen = set()
    for folder, subfolders, names in os.walk(path, onerror=fail, followlinks=True):
        real = os.path.realpath(folder)
        if real in seen:
            subfolders.clear()
            continue
        seen.add(real)
        subfolders.sort()
        yield from (file for name in names if (file := Path(folder, name)).is_file())


def _read_file(file: Path) -> bytes:
    """The bytes of a file on the disk."""
    if file.stat().st_size > MAX_BYTES:
        raise too_large(file)
    return file.read_bytes()


def _zip_files(archive: zipfile.ZipFile) -> dict[str, Callable[[], bytes]]:
    """Name -> function that reads the bytes, for the files of a zip archive and its links."""
    files: dict[str, Callable[[], bytes]] = {}
    links = {}
    for entry in archive.infolist():
        name = entry.filename
        if entry.is_dir() or hidden(name):
            continue
        if entry.flag_bits & 1:
            raise ValueError(
                f"source: {archive.filename}: {name} is encrypted; extract the archive with its "
                f"password and give the folder"
            )
        if entry.file_size > MAX_BYTES:
            raise too_large(f"{archive.filename}/{name}")
        if stat.S_ISLNK(entry.external_attr >> 16):
            target = _read_zip(archive, entry).decode(errors="replace")
            links[name] = posixpath.normpath(posixpath.join(posixpath.dirname(name), target))
        else:
            files[name] = functools.partial(_read_zip, archive, entry)
    return files | {name: files[target] for name, target in links.items() if target in files}


def _read_zip(archive: zipfile.ZipFile, entry: zipfile.ZipInfo) -> bytes:
    """The bytes of a file in a zip archive; BadZipFile if Python cannot unpack it."""
    try:
        return archive.read(entry)
    except NotImplementedError as error:
        raise zipfile.BadZipFile(f"{entry.filename}: {error}") from error


class _TarInfo(tarfile.TarInfo):
    """A member whose damaged or missing header is an error.

    Python's tarfile takes such a header for the end of the archive and gives fewer files
    (github.com/python/cpython/issues/120740).
    """

    @classmethod
    def fromtarfile(cls, tarfile_: tarfile.TarFile) -> "_TarInfo":
        """Reads the header at the current position."""
        try:
            return super().fromtarfile(tarfile_)
        except tarfile.HeaderError as error:
            if type(error).__name__ == "EOFHeaderError":
                raise
            raise tarfile.ReadError(f"{error} at byte {tarfile_.offset:,}") from error


def tar_members(archive: Path | IO[bytes]) -> Iterator[tuple[str, IO[bytes]]]:
    """Yields the name and the open file of each file in a tar archive, in one pass.

    Args:
      archive: the tar archive, compressed or not.

    Yields:
      The name and the file. A link gives the file that it leads to.

    Raises:
      tarfile.TarError: this is no tar archive, it is cut or damaged, or it holds a name twice.
      ValueError: a file is too large.
    """
    source: dict[str, Any] = (
        {"name": archive} if isinstance(archive, Path) else {"fileobj": archive}
    )
    names: set[str] = set()
    repeated = None
    with tarfile.open(**source, tarinfo=_TarInfo) as tar:
        for entry in tar:
            if hidden(entry.name) or (file := _open_member(tar, entry)) is None:
                continue
            if entry.size > MAX_BYTES:
                raise too_large(entry.name)
            if entry.name in names:
                repeated = entry.name
            names.add(entry.name)
            yield entry.name, file
        assert tar.fileobj is not None
        while tar.fileobj.read(2**20):  # the checksum of a compressed archive is at its end
            pass
    if repeated:
        raise tarfile.ReadError(f"{repeated} is in it twice")


def _open_member(tar: tarfile.TarFile, entry: tarfile.TarInfo) -> IO[bytes] | None:
    """The open file of a member; None for a folder, a device, and a link that leads nowhere."""
    try:
        return tar.extractfile(entry)
    except (KeyError, RecursionError):  # no such member, and links that lead to each other
        return None


def find(files: Files, pattern: str) -> str:
    """The first file whose path ends in the regular expression; FileNotFoundError if none does."""
    for entry in files:
        if re.search(rf"(^|/){pattern}$", entry):
            return entry
    raise FileNotFoundError(
        f"source: no file matches {pattern!r} among its {len(files)} files; give the complete "
        f"source"
    )


def read_text(files: Files, entry: str) -> str:
    """The text of a file, with or without a byte order mark; ValueError unless it is UTF-8."""
    try:
        return files[entry]().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"source: {entry}: expected UTF-8 text ({error}); fetch it again"
        ) from error
