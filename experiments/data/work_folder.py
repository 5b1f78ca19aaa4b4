"""A folder for files that are not finished yet."""

import contextlib
import fcntl
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import IO

_LOCK = "lock"


@contextlib.contextmanager
def work_folder(path: Path) -> Iterator[Path]:
    """Gives a folder that is empty at first and removed at the end.

    It belongs to one process, by a lock that ends with the process. What a killed process left in
    it is removed by the next one.

    Args:
      path: the folder, always the same for one purpose; its parents are created if missing.

    Yields:
      The folder. A file "lock" lies in it.

    Raises:
      ValueError: another process works in it, or it cannot be written.
    """
    with writable(path.parent):
        lock = _lock(path)
    with lock:
        try:
            _empty(path)
            yield path
        finally:
            _empty(path)
            (path / _LOCK).unlink()
            with contextlib.suppress(OSError):  # the next process has begun
                path.rmdir()


@contextlib.contextmanager
def writable(folder: Path) -> Iterator[None]:
    """Turns errors of writing in the `with` block into a ValueError that names `folder`."""
    try:
        yield
    except (OSError, RuntimeError) as error:  # RuntimeError is array_record's
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"data_dir: {str(folder)!r} cannot be written ({reason}); make it a writable folder "
            f"with enough space, or choose another"
        ) from error


def _lock(path: Path) -> IO[str]:
    """Creates and locks the folder; the lock lasts as long as the file is open."""
    file = path / _LOCK
    while True:
        path.mkdir(parents=True, exist_ok=True)
        try:
            lock = file.open("w")
        except FileNotFoundError:  # its owner has just removed it
            continue
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(lock.fileno()), file.stat()):
                return lock
            lock.close()
        except FileNotFoundError:
            lock.close()
        except BlockingIOError:
            lock.close()
            raise ValueError(
                f"data_dir: another process works in {str(path)!r}; wait until it ends"
            ) from None


def _empty(path: Path) -> None:
    """Removes all but the lock."""
    for child in path.iterdir():
        if child.is_dir() and not child.is_symlink():
            shutil.rmtree(child)
        elif child.name != _LOCK:
            child.unlink()
