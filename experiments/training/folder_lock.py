"""The lock of a run folder: one process at a time writes to it."""

import errno
import fcntl
import os
import platform
import warnings
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
        self._descriptor: int | None = None

    def __del__(self) -> None:
        self.release()

    @property
    def held(self) -> bool:
        """Whether this object holds the lock."""
        return self._descriptor is not None

    def acquire(self) -> None:
        """Takes the lock; nothing happens where it is held already.

        Raises:
          ValueError: another run holds it; the message names its process.
          OSError: the folder cannot be written.
        """
        while not self.held:
            descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o644)
            try:
                self._lock(descriptor)
                if self._is_ours(descriptor):  # else its holder removed the file meanwhile
                    self._descriptor = descriptor
            finally:
                if not self.held:
                    os.close(descriptor)
        try:
            self._name_holder()
        except OSError:
            self.release()
            raise

    def check(self) -> None:
        """Checks that the folder is still the one that was locked.

        Raises:
          OSError: it was deleted or replaced.
        """
        if self._descriptor is not None and not self._is_ours(self._descriptor):
            raise OSError(f"{self._path.parent} was deleted or replaced while the run wrote to it")

    def release(self) -> None:
        """Gives the lock back and removes its file; nothing happens where it is not held."""
        if self._descriptor is None:
            return
        descriptor, self._descriptor = self._descriptor, None
        if self._is_ours(descriptor):
            self._path.unlink(missing_ok=True)
        os.close(descriptor)

    def _lock(self, descriptor: int) -> None:
        folder = self._path.parent
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.read(descriptor, 1000).decode(errors="replace")
            raise ValueError(
                f"out: {folder} is in use by another run ({holder or 'which has just begun'}); "
                "choose another --out, or wait until it has ended"
            ) from None
        except OSError as error:
            if error.errno not in _UNSUPPORTED:
                raise
            warnings.warn(
                f"{folder} cannot be locked ({error.strerror}): start no other run in it",
                stacklevel=4,
            )

    def _name_holder(self) -> None:
        """Writes into the file which process holds the lock, for the message of the others."""
        assert self._descriptor is not None
        with naming(self._path):
            os.ftruncate(self._descriptor, 0)
            os.pwrite(self._descriptor, f"process {os.getpid()} on {platform.node()}".encode(), 0)

    def _is_ours(self, descriptor: int) -> bool:
        """Whether the open file is the one that the path names."""
        try:
            return os.path.samestat(os.fstat(descriptor), os.stat(self._path))
        except OSError:
            return False
