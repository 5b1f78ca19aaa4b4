"""The lock of a run folder: one process at a time writes to it."""

import contextlib
import errno
import fcntl
import os
import platform
import warnings
from io import TextIOWrapper
from pathlib import Path

from experiments.training.files import naming

NAME = "lock"  # of the file in the run folder
_UNSUPPORTED = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


class FolderLock:
    """An exclusive lock on a folder.

    The operating system drops it when the process ends, however it ends: the file that a crash
    leaves behind locks nothing.

    Args:
      folder: that exists when the lock is acquired.
    """

    def __init__(self, folder: Path):
        self._path = folder / NAME
        self._file: TextIOWrapper | None = None

    def __del__(self) -> None:
        self.release()

    @property
    def held(self) -> bool:
        """Whether this object holds the lock."""
        return self._file is not None

    def acquire(self) -> None:
        """Takes the lock; nothing happens where it is held already.

        Raises:
          ValueError: another run holds it; the message names its process.
          OSError: the folder cannot be written.
        """
        while not self.held:
            file = open(self._path, "a+", encoding="utf-8")
            try:
                self._lock(file)
            except BaseException:
                file.close()
                raise
            if self._is_ours(file):
                self._file = file
            else:  # its holder removed the file meanwhile
                file.close()
                continue
            try:
                with naming(self._path):
                    file.truncate(0)
                    file.write(f"process {os.getpid()} on {platform.node()}")
                    file.flush()
            except BaseException:
                self.release()
                raise

    def check(self) -> None:
        """Checks that the folder is still the one that was locked.

        Raises:
          OSError: it was deleted or replaced.
        """
        if self._file is not None and not self._is_ours(self._file):
            raise OSError(f"{self._path.parent} was deleted or replaced while the run wrote to it")

    def release(self) -> None:
        """Gives the lock back and removes its file; nothing happens where it is not held."""
        if self._file is None:
            return
        file, self._file = self._file, None
        if self._is_ours(file):
            self._path.unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # what a full disk did not take
            file.close()

    def _lock(self, file: TextIOWrapper) -> None:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise ValueError(
                f"out: {self._path.parent} is in use by another run "
                f"({file.read() or 'which has just begun'}); choose another --out, or wait until "
                "it has ended"
            ) from None
        except OSError as error:
            if error.errno not in _UNSUPPORTED:
                raise
            warnings.warn(
                f"{self._path.parent} cannot be locked ({error.strerror}): start no other run in it",
                stacklevel=4,
            )

    def _is_ours(self, file: TextIOWrapper) -> bool:
        """Whether the open file is the one that the path names."""
        try:
            return os.path.samestat(os.fstat(file.fileno()), os.stat(self._path))
        except FileNotFoundError:
            return False
