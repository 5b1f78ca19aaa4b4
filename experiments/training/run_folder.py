"""One run's folder: config.json, metrics.jsonl, result.json and Orbax checkpoints.

All are written so that a stop loses nothing.
"""

import dataclasses
import json
import zlib
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from experiments.training.config import TrainConfig
from experiments.training.registry import METHODS

# Where things are, not what is trained: they may change between a stop and its resume.
_PLACE = ("out", "data_dir")
_KEEP = 2


class RunFolder:
    """The folder of one run.

    Attributes:
      path: where it is.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path).absolute()

    @classmethod
    def open(cls, config: TrainConfig, resume: bool) -> "RunFolder":
        """Checks that a run may write to its folder; writes nothing yet.

        Args:
          config: a resolved config.
          resume: go on with the run in the folder.

        Returns:
          The folder.

        Raises:
          ValueError: the folder is not empty, or with `resume` it is absent, or its config.json is
            missing, garbled or of another run.
        """
        folder = cls(str(config.out))
        if folder.path.is_file():
            raise ValueError(f"out: {config.out} is a file; choose a folder")
        if resume and not folder.path.exists():
            raise ValueError(
                f"resume: {config.out} does not exist, so there is no run to go on with; leave "
                f"--resume out to start one"
            )
        if resume:
            folder.check_same_run(config)
        elif folder.path.exists() and any(folder.path.iterdir()):
            raise ValueError(
                f"out: {config.out} is not empty; add --resume to go on with that run, or choose "
                f"another --out"
            )
        return folder

    def start(self, config: TrainConfig) -> None:
        """Creates the folder and writes config.json, unless they are there.

        Args:
          config: a resolved config.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        if not (self.path / "config.json").exists():
            _write_json(self.path / "config.json", dataclasses.asdict(config))

    def config(self) -> TrainConfig:
        """The run's config.

        Returns:
          What config.json holds.

        Raises:
          ValueError: config.json is missing, garbled or of another version.
        """
        path = self.path / "config.json"
        stored = _read_json(path, "start the run again with another --out")
        if not isinstance(stored, dict):
            raise ValueError(
                f"{path}: expected a map of fields, got {type(stored).__name__}; choose another "
                "--out"
            )
        options = stored.get("options")
        if stored.get("method") not in METHODS or not isinstance(options, dict):
            raise ValueError(
                f"{path}: other fields than a run of this version has (method "
                f"{stored.get('method')!r} with options {options!r}); choose another --out"
            )
        options_type = type(METHODS[stored["method"]].options)
        for dataclass, values in ((TrainConfig, stored), (options_type, options)):
            fields = {field.name for field in dataclasses.fields(dataclass)}
            if unmatched := sorted(fields.symmetric_difference(values)):
                raise ValueError(
                    f"{path}: other fields than a run of this version has "
                    f"({', '.join(unmatched)}); choose another --out"
                )
        return TrainConfig(**stored | {"options": options_type(**options)})

    def check_same_run(self, config: TrainConfig) -> None:
        """Checks that a config is that of the run in the folder; only places may differ.

        Args:
          config: with no field left at None that the run has.

        Raises:
          ValueError: names the fields that differ, or config.json is missing or garbled.
        """
        stored, new = self.config(), config
        if stored.method != new.method:  # whose options have other names
            stored, new = (dataclasses.replace(one, options=None) for one in (stored, new))
        before, after = _flat(stored), _flat(new)
        changed = [
            f"{name} {before.get(name)!r} -> {after.get(name)!r}"
            for name in before | after
            if name not in _PLACE and before.get(name) != after.get(name)
        ]
        if changed:
            raise ValueError(
                f"resume: {config.out} is a run with another config ({', '.join(changed)}); leave "
                f"these flags out or choose another --out"
            )

    def append(self, row: dict[str, Any]) -> None:
        """Adds one row to metrics.jsonl.

        Args:
          row: JSON values, with `step`.
        """
        with open(self.path / "metrics.jsonl", "a") as file:
            file.write(json.dumps(row) + "\n")

    def metrics(self) -> list[dict[str, Any]]:
        """The rows of metrics.jsonl.

        Returns:
          Rows in order; a last line that a stop cut short is left out.

        Raises:
          ValueError: a line before the last is garbled.
        """
        path = self.path / "metrics.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        rows = []
        for number, line in enumerate(lines, 1):
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError as error:
                if number < len(lines):
                    raise ValueError(
                        f"{path}: line {number} is not JSON ({error}); delete that line"
                    ) from error
        return rows

    def rewind(self, step: int) -> None:
        """Drops the rows after a step, which a resumed run will write again.

        Args:
          step: the last step to keep.
        """
        rows = [row for row in self.metrics() if row["step"] <= step]
        _replace(self.path / "metrics.jsonl", "".join(json.dumps(row) + "\n" for row in rows))

    def save(self, step: int, tree: Any, meta: dict[str, Any]) -> None:
        """Writes a checkpoint; the last two are kept.

        The tree's leaves are stored by their position, so that any pytree node can be checkpointed;
        the structure comes from a freshly made state when they are read back.

        Args:
          step: training steps done.
          tree: arrays and PRNG keys in any pytree.
          meta: JSON values.
        """
        arrays = {f"{i:05d}": _to_host(leaf) for i, leaf in enumerate(jax.tree.leaves(tree))}
        empty = {
            name: [list(a.shape), str(a.dtype)] for name, a in arrays.items() if a.size == 0
        }  # Orbax refuses empty arrays
        args = ocp.args.Composite(
            arrays=ocp.args.StandardSave({name: a for name, a in arrays.items() if a.size}),
            meta=ocp.args.JsonSave({"run": meta, "empty": empty}),
        )
        options = ocp.CheckpointManagerOptions(max_to_keep=_KEEP, enable_async_checkpointing=False)
        with ocp.CheckpointManager(self.path / "checkpoints", options=options) as manager:
            manager.save(step, args=args)
            kept = {str(kept) for kept in manager.all_steps()}
        sums = {name: files for name, files in self._checksums().items() if name in kept}
        _write_json(
            self.path / "checksums.json", sums | {str(step): _checksums(self._checkpoint(step))}
        )

    def latest(self) -> int | None:
        """The step of the last complete checkpoint.

        Returns:
          A step, or None when there is none yet.
        """
        return max(self.steps(), default=None)

    def steps(self) -> list[int]:
        """The steps of the complete checkpoints.

        Returns:
          Steps in order, [] when there is none yet.
        """
        if not (self.path / "checkpoints").exists():
            return []
        with ocp.CheckpointManager(self.path / "checkpoints") as manager:
            return sorted(manager.all_steps())

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
        read = self._read(step, arrays=ocp.args.StandardRestore(), meta=ocp.args.JsonRestore())
        arrays = dict(read.arrays) | {
            name: np.zeros(shape, dtype) for name, (shape, dtype) in read.meta["empty"].items()
        }
        leaves, structure = jax.tree.flatten(like)
        stored = [arrays[name] for name in sorted(arrays)]
        if [a.dtype for a in stored] != [_to_host(leaf).dtype for leaf in leaves]:
            raise ValueError(
                f"{self._checkpoint(step)}: holds {len(stored)} arrays that do not match this "
                f"version's {len(leaves)}; "
                "it was written by another version: train again with another --out"
            )
        return structure.unflatten([_to_device(a, leaf) for a, leaf in zip(stored, leaves)])

    def _checkpoint(self, step: int) -> Path:
        return self.path / "checkpoints" / str(step)

    def _checksums(self) -> dict[str, dict[str, int]]:
        path = self.path / "checksums.json"
        return (
            _read_json(path, "delete it: the checkpoints are then read unchecked")
            if path.exists()
            else {}
        )

    def _read(self, step: int, **items: Any) -> Any:
        if not self._checkpoint(step).exists():
            raise ValueError(
                f"step: {self.path} has no checkpoint of step {step}; it has "
                f"{', '.join(map(str, self.steps())) or 'none'}"
            )
        expected = self._checksums().get(
            str(step), {}
        )  # none when a stop came between a checkpoint and its checksums
        damaged = [
            name
            for name, crc in _checksums(self._checkpoint(step)).items()
            if expected.get(name, crc) != crc
        ]
        damaged += [name for name in expected if not (self._checkpoint(step) / name).exists()]
        if damaged:
            raise ValueError(
                f"{self._checkpoint(step)}: {damaged[0]} is damaged or missing; "
                f"{self._without(step)}"
            )
        try:
            with ocp.CheckpointManager(self.path / "checkpoints") as manager:
                return manager.restore(step, args=ocp.args.Composite(**items))
        except Exception as error:  # Orbax raises many types for a damaged checkpoint
            reason = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
            raise ValueError(
                f"{self._checkpoint(step)}: cannot be read ({reason}); {self._without(step)}"
            ) from error

    def _without(self, step: int) -> str:
        return (
            f"delete the folder {step} to go on from the checkpoint before it, or from the start "
            "when there is none"
        )

    def write_result(self, result: dict[str, Any]) -> None:
        """Writes result.json.

        Args:
          result: JSON values.
        """
        _write_json(self.path / "result.json", result)

    def result(self) -> dict[str, Any] | None:
        """Reads result.json.

        Returns:
          Its values; None before the run has ended.

        Raises:
          ValueError: it is garbled.
        """
        path = self.path / "result.json"
        return _read_json(path, "delete it and run again with --resume") if path.exists() else None


def _flat(config: TrainConfig) -> dict[str, Any]:
    """The fields of a config, the method's options under the names of their flags."""
    fields = dataclasses.asdict(config)
    options = fields.pop("options") or {}
    return fields | {f"{config.method}.{name}": value for name, value in options.items()}


def _to_host(leaf: Any) -> np.ndarray:
    is_key = isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    return np.asarray(jax.random.key_data(leaf) if is_key else leaf)


def _to_device(array: np.ndarray, like: Any) -> jax.Array:
    if isinstance(like, jax.Array) and jnp.issubdtype(like.dtype, jax.dtypes.prng_key):
        return jax.random.wrap_key_data(jnp.asarray(array), impl=jax.random.key_impl(like))
    return jnp.array(array)


def _checksums(folder: Path) -> dict[str, int]:
    return {
        str(file.relative_to(folder)): zlib.crc32(file.read_bytes())
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }


def _replace(path: Path, text: str) -> None:
    """Writes a file in one step, so that a stop leaves the old one or the new one."""
    part = path.with_suffix(path.suffix + ".part")
    part.write_text(text)
    part.replace(path)


def _write_json(path: Path, value: Any) -> None:
    _replace(path, json.dumps(value, indent=2) + "\n")


def _read_json(path: Path, fix: str) -> Any:
    try:
        return json.loads(path.read_text())
    except (FileNotFoundError, NotADirectoryError):
        raise ValueError(f"{path}: missing, so {path.parent} is not the folder of a run") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not JSON ({error}); {fix}") from error
