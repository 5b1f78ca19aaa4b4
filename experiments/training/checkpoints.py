"""The checkpoints of a run folder: one zip file each, written in one step, read with its checksums.

`STEP.zip` holds the bytes of every array and `meta.json` with their shapes and dtypes. A zip file
has a checksum of each entry. What is mostly zeros, as pruned weights and masks are, is compressed.
"""

import json
import os
import shutil
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.training.files import naming

KEEP = 2
_META = "meta.json"
_PART = ".part"


class Spill(NamedTuple):
    """Where checkpoints above a size go.

    Attributes:
      path: of a folder on the same disk, which is made when it is needed.
      above: bytes.
    """

    path: Path
    above: int


class Checkpoints:
    """The checkpoints of one run; the last ones are kept.

    Attributes:
      path: of their folder.
      kept: the step of one that stays for good; None without.
      keep: how many of the others stay.
      spill: a second folder, for those that are too large for the first; None without.
    """

    def __init__(self, run_folder: Path, kept: int | None = None):
        self.path = run_folder / "checkpoints"
        self.kept = kept
        self.keep = KEEP
        self.spill: Spill | None = None

    def steps(self) -> list[int]:
        """The steps of the checkpoints, in order; [] when there is none yet."""
        return sorted(int(file.stem) for file in self._files(".zip") if file.stem.isdecimal())

    def file(self, step: int) -> Path:
        """The file of a checkpoint."""
        files = [folder / f"{step}.zip" for folder in self._folders()]
        return next((file for file in files if file.exists()), files[0])

    def tidy(self) -> None:
        """Removes what an interrupted save has left, and old checkpoints: see `Checkpoints`."""
        for file in self._files(_PART):
            file.unlink()
        for old in self.steps()[: -self.keep]:
            if old != self.kept:
                self.file(old).unlink()

    def check_space(self) -> None:
        """Checks that the checkpoints still to come fit on the disk.

        Raises:
          OSError: they do not; the message says how much they need.
        """
        steps = self.steps()
        size, free = self.file(steps[-1]).stat().st_size, shutil.disk_usage(self.path).free
        needed = size * (
            self.keep + 1 - min(len(steps), self.keep)
        )  # a new one comes before the oldest goes
        if self.kept is not None and self.kept not in steps:
            needed += size
        if free < needed:
            raise OSError(
                f"the disk of {self.path} is full: the checkpoints to come need "
                f"{needed / 1e6:.1f} MB, and {free / 1e6:.1f} MB are free"
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
        arrays = [_to_host(leaf) for leaf in jax.tree.leaves(tree)]
        kinds = [[list(array.shape), array.dtype.name] for array in arrays]
        file = self.path / f"{step}.zip"
        part = self._folders()[-1] / (file.name + _PART)
        for folder in self._folders():
            folder.mkdir(parents=True, exist_ok=True)
        try:
            with naming(file), open(part, "wb") as stream:
                with zipfile.ZipFile(stream, "w", compresslevel=1) as archive:
                    archive.writestr(_META, json.dumps({"run": meta, "arrays": kinds}))
                    for number, array in enumerate(arrays):
                        archive.compression = _compression(array)
                        with archive.open(str(number), "w", force_zip64=True) as entry:
                            entry.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
                stream.flush()
                os.fsync(stream.fileno())
            large = self.spill is not None and part.stat().st_size > self.spill.above
            part.replace(part.with_name(file.name) if large else file)
        finally:
            part.unlink(missing_ok=True)
        self.tidy()

    def meta(self, step: int) -> dict[str, Any]:
        """What `save` was given as `meta`.

        Args:
          step: of the checkpoint.

        Returns:
          JSON values.

        Raises:
          ValueError: the checkpoint cannot be read.
        """
        return self._read(step)[0]

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
        stored = self._read(step)[1]
        leaves, structure = jax.tree.flatten(like)
        if [array.dtype for array in stored] != [_to_host(leaf).dtype for leaf in leaves]:
            raise ValueError(
                f"{self.file(step)}: holds {len(stored)} arrays that do not match this "
                f"version's {len(leaves)}; "
                "it was written by another version: train again with another --out"
            )
        return structure.unflatten([_to_device(a, leaf) for a, leaf in zip(stored, leaves)])

    def _files(self, ending: str) -> list[Path]:
        folders = [folder for folder in self._folders() if folder.exists()]
        files = [file for folder in folders for file in folder.iterdir()]
        return [file for file in files if file.name.endswith(ending)]

    def _folders(self) -> list[Path]:
        return [self.path] if self.spill is None else [self.path, self.spill.path]

    def _read(self, step: int) -> tuple[dict[str, Any], list[np.ndarray]]:
        """The meta values and the arrays; ValueError where they are not what was saved."""
        file = self.file(step)
        if not file.exists():
            raise ValueError(
                f"step: {self.path.parent} has no checkpoint of step {step}; it has "
                f"{', '.join(map(str, self.steps())) or 'none'}"
            )
        try:
            with zipfile.ZipFile(file) as archive:
                meta = json.loads(archive.read(_META))
                arrays = [
                    np.frombuffer(archive.read(str(number)), jnp.dtype(dtype)).reshape(shape)
                    for number, (shape, dtype) in enumerate(meta["arrays"])
                ]
        except Exception as error:  # zipfile raises many types for a damaged file
            raise ValueError(
                f"{file}: is damaged ({error}); delete it to go on from the checkpoint before it, "
                "or from the start when there is none"
            ) from error
        return meta["run"], arrays


def _compression(array: np.ndarray) -> int:
    zeros = array.size - np.count_nonzero(array)
    return zipfile.ZIP_DEFLATED if zeros > array.size // 2 else zipfile.ZIP_STORED


def _to_host(leaf: Any) -> np.ndarray:
    is_key = isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    return np.asarray(jax.random.key_data(leaf) if is_key else leaf)


def _to_device(array: np.ndarray, like: Any) -> jax.Array:
    if isinstance(like, jax.Array) and jnp.issubdtype(like.dtype, jax.dtypes.prng_key):
        return jax.random.wrap_key_data(jnp.asarray(array), impl=jax.random.key_impl(like))
    return jnp.array(array)
