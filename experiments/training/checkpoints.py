"""The Orbax checkpoints of a run folder, with checksums."""

import contextlib
import logging
import shutil
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from experiments.training.files import read_json_map, write_json

KEEP = 2


class Checkpoints:
    """The checkpoints of one run; the last two are kept.

    Attributes:
      path: of their folder.
    """

    def __init__(self, run_folder: Path):
        self.path = run_folder / "checkpoints"
        self._sums_path = run_folder / "checksums.json"

    def steps(self) -> list[int]:
        """The steps of the complete checkpoints, in order; [] when there is none yet."""
        if not self.path.exists():
            return []
        return sorted(int(entry.name) for entry in self.path.iterdir() if entry.name.isdecimal())

    def remove_unfinished(self) -> None:
        """Removes what an interrupted save has left."""
        for entry in self.path.iterdir() if self.path.exists() else ():
            if ".orbax-checkpoint-tmp" in entry.name:
                shutil.rmtree(entry)

    def check_space(self) -> None:
        """Checks that the checkpoints still to come fit on the disk.

        Raises:
          OSError: they do not; the message says how much they need.
        """
        steps = self.steps()
        files = (self.path / str(steps[-1])).rglob("*")
        size = sum(file.stat().st_size for file in files if file.is_file())
        # A new one is written before the oldest is removed.
        needed, free = size * (KEEP + 1 - min(len(steps), KEEP)), shutil.disk_usage(self.path).free
        if free < needed:
            raise OSError(
                f"the disk of {self.path} is full: the checkpoints need {needed / 2**20:.0f} MiB, "
                f"and {free / 2**20:.0f} MiB are free"
            )

    def save(self, step: int, tree: Any, meta: dict[str, Any]) -> None:
        """Writes a checkpoint.

        The tree's leaves are stored by their position, so that any pytree node can be checkpointed;
        the structure comes from a freshly made state when they are read back.

        Args:
          step: training steps done.
          tree: arrays and PRNG keys in any pytree.
          meta: JSON values.

        Raises:
          OSError: it cannot be written.
        """
        arrays = {f"{i:05d}": _to_host(leaf) for i, leaf in enumerate(jax.tree.leaves(tree))}
        empty = {
            name: [list(a.shape), str(a.dtype)] for name, a in arrays.items() if a.size == 0
        }  # Orbax refuses empty arrays
        args = ocp.args.Composite(
            arrays=ocp.args.PyTreeSave({name: a for name, a in arrays.items() if a.size}),
            meta=ocp.args.JsonSave({"run": meta, "empty": empty}),
        )
        options = ocp.CheckpointManagerOptions(max_to_keep=KEEP, enable_async_checkpointing=False)
        sums = self._checksums()
        if sums.pop(str(step), None) is not None:  # of a checkpoint that was deleted
            write_json(self._sums_path, sums)
        try:
            with _quiet(), self._manager(options) as manager:
                manager.save(step, args=args, force=True)
        except Exception as error:  # Orbax raises many types where a file cannot be written
            raise OSError(f"{self._of(step)}: cannot be written ({_reason(error)})") from error
        kept = {str(kept) for kept in self.steps()}
        sums = {name: files for name, files in sums.items() if name in kept}
        write_json(self._sums_path, sums | {str(step): _checksums_of(self._of(step))})

    def meta(self, step: int) -> dict[str, Any]:
        """What `save` was given as `meta`.

        Args:
          step: of the checkpoint.

        Returns:
          JSON values.

        Raises:
          ValueError: the checkpoint cannot be read.
        """
        return self._read(step, meta=ocp.args.JsonRestore()).meta["run"]

    def restore(self, step: int, like: Any) -> Any:
        """Reads a checkpoint.

        Args:
          step: of the checkpoint.
          like: a tree of the structure that was saved; shapes may differ, dtypes may not.

        Returns:
          The tree that was saved.

        Raises:
          ValueError: the checkpoint cannot be read, or is of another structure.
        """
        read = self._read(step, arrays=ocp.args.PyTreeRestore(), meta=ocp.args.JsonRestore())
        arrays = dict(read.arrays) | {
            name: np.zeros(shape, dtype) for name, (shape, dtype) in read.meta["empty"].items()
        }
        leaves, structure = jax.tree.flatten(like)
        stored = [arrays[name] for name in sorted(arrays)]
        if [a.dtype for a in stored] != [_to_host(leaf).dtype for leaf in leaves]:
            raise ValueError(
                f"{self._of(step)}: holds {len(stored)} arrays that do not match this "
                f"version's {len(leaves)}; "
                "it was written by another version: train again with another --out"
            )
        return structure.unflatten([_to_device(a, leaf) for a, leaf in zip(stored, leaves)])

    def _of(self, step: int) -> Path:
        return self.path / str(step)

    def _manager(self, options: ocp.CheckpointManagerOptions) -> ocp.CheckpointManager:
        # With OCDBT, Orbax takes a folder's name for a glob pattern: one with brackets in it would
        # be written and could not be read.
        handlers = {
            "arrays": ocp.PyTreeCheckpointHandler(use_ocdbt=False),
            "meta": ocp.JsonCheckpointHandler(),
        }
        return ocp.CheckpointManager(self.path, item_handlers=handlers, options=options)

    def _checksums(self) -> dict[str, Any]:
        fix = "delete it: the checkpoints are then read unchecked"
        return read_json_map(self._sums_path, fix) if self._sums_path.exists() else {}

    def _read(self, step: int, **items: Any) -> Any:
        if not self._of(step).exists():
            raise ValueError(
                f"step: {self.path.parent} has no checkpoint of step {step}; it has "
                f"{', '.join(map(str, self.steps())) or 'none'}"
            )
        expected = self._checksums().get(
            str(step), {}
        )  # none when a stop came between a checkpoint and its checksums
        damaged = [
            name
            for name, crc in _checksums_of(self._of(step)).items()
            if expected.get(name, crc) != crc
        ]
        damaged += [name for name in expected if not (self._of(step) / name).exists()]
        if damaged:
            raise ValueError(
                f"{self._of(step)}: {damaged[0]} is damaged or missing; {self._without(step)}"
            )
        try:
            options = ocp.CheckpointManagerOptions(read_only=True)
            with _quiet(), self._manager(options) as manager:
                return manager.restore(step, args=ocp.args.Composite(**items))
        except Exception as error:  # Orbax raises many types for a damaged checkpoint
            raise ValueError(
                f"{self._of(step)}: cannot be read ({_reason(error)}); {self._without(step)}"
            ) from error

    def _without(self, step: int) -> str:
        return (
            f"delete the folder {step} to go on from the checkpoint before it, or from the start "
            "when there is none"
        )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keeps Orbax's threads from logging the traceback of an error that is raised anyway."""
    logger = logging.getLogger("absl")
    before = logger.level
    logger.setLevel(logging.CRITICAL + 1)
    try:
        yield
    finally:
        logger.setLevel(before)


def _reason(error: Exception) -> str:
    return str(error).splitlines()[0][:200] if str(error) else type(error).__name__


def _to_host(leaf: Any) -> np.ndarray:
    is_key = isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    return np.asarray(jax.random.key_data(leaf) if is_key else leaf)


def _to_device(array: np.ndarray, like: Any) -> jax.Array:
    if isinstance(like, jax.Array) and jnp.issubdtype(like.dtype, jax.dtypes.prng_key):
        return jax.random.wrap_key_data(jnp.asarray(array), impl=jax.random.key_impl(like))
    return jnp.array(array)


def _checksums_of(folder: Path) -> dict[str, int]:
    return {
        str(file.relative_to(folder)): zlib.crc32(file.read_bytes())
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }
