"""The folder of all sweeps, which travels from machine to machine.

`cells/` holds a run folder for each cell and seed, `cache/` what was compiled, `tables/` the
tables. It stays below `LIMIT` bytes: finished cells keep their numbers only, the cache is cut, and
a checkpoint that is too large lies beside the folder, in `FOLDER.here`, which stays on its machine.
"""

import re
import shutil
from pathlib import Path
from typing import Any

import jax

from experiments.measuring.environment import device
from experiments.training.checkpoints import Spill
from experiments.training.config import TrainConfig
from experiments.training.files import naming, read_json_map, write_json
from experiments.training.folder_lock import FolderLock
from experiments.training.run_folder import RunFolder

LIMIT = 48 << 20
CACHE = 12 << 20  # of it
_SPARE = 2 << 20  # what a cell may add to the cache and its metrics before the next look
_NUMBERS = {"config.json", "metrics.jsonl", "result.json", "attack.json", "failed.json"}


class SweepFolder:
    """The folder of all sweeps.

    Args:
      path: of the folder; it is made.
      limit: bytes that it may have.

    Raises:
      OSError: it cannot be written.
      ValueError: another sweep uses it.
    """

    def __init__(self, path: str | Path, limit: int = LIMIT):
        self.path, self._limit = Path(path).absolute(), limit
        self.here = self.path.with_name(self.path.name + ".here")
        with naming(self.path):
            (self.path / "cells").mkdir(parents=True, exist_ok=True)
        self._lock = FolderLock(self.path)
        self._lock.acquire()
        self.tidy()

    def close(self) -> None:
        """Lets other sweeps use the folder."""
        self._lock.release()

    def cell(self, config: TrainConfig) -> Path:
        """The run folder of a resolved config, by its default name."""
        return self.path / "cells" / Path(str(config.out)).name

    def finished(self, cell: Path, attacked: bool) -> dict[str, Any] | None:
        """What a cell has brought.

        Args:
          cell: its run folder.
          attacked: whether the numbers of an attack belong to it.

        Returns:
          result.json, with the attack's rows as `attack`; `failed` alone where the loss was not
          finite; None where the cell has not ended.
        """
        if (failed := cell / "failed.json").exists():
            return read_json_map(failed, "delete it to run the cell again")
        result = RunFolder(cell).result()
        if result is None or not attacked:
            return result
        file = cell / "attack.json"
        if not file.exists():
            return None
        return result | {"attack": read_json_map(file, "delete the cell's folder")["rows"]}

    def fail(self, cell: Path, error: FloatingPointError) -> None:
        """Notes that a cell's loss is not finite, so that it does not run again."""
        cell.mkdir(exist_ok=True)
        write_json(cell / "failed.json", {"failed": str(error)})

    def spill(self, cell: Path) -> Spill:
        """Where a cell's checkpoints go that do not fit into the folder."""
        others = _size(self.path) - _size(self.path / "cache") - _size(cell)
        room = self._limit - min(CACHE, self._limit // 4) - _SPARE - others
        return Spill(self.here / cell.name, max(0, room))

    def prune(self, cell: Path) -> None:
        """Leaves a finished cell its numbers only."""
        shutil.rmtree(cell / "checkpoints", ignore_errors=True)
        shutil.rmtree(self.here / cell.name, ignore_errors=True)
        for file in cell.iterdir():
            if file.name not in _NUMBERS and file.is_file():
                file.unlink()

    def tidy(self) -> None:
        """Cuts the cache, the oldest programs first."""
        files = [file for file in (self.path / "cache").rglob("*") if file.is_file()]
        kept = 0
        for file in sorted(files, key=lambda file: file.stat().st_mtime, reverse=True):
            kept += file.stat().st_size
            if kept > min(CACHE, self._limit // 4):
                file.unlink()

    def use_cache(self) -> None:
        """Keeps compiled programs in the folder, unless JAX has a cache already.

        Each kind of device has its own: a program for one processor may crash on another.
        """
        if jax.config.jax_compilation_cache_dir is None:
            kind = re.sub(r"\W+", "-", device())
            jax.config.update("jax_compilation_cache_dir", str(self.path / "cache" / kind))
            jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


def _size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
