"""One run's folder: config.json, metrics.jsonl, result.json and checkpoints.

All are written so that a stop loses nothing, by one process at a time. The rows of metrics.jsonl
are there as TensorBoard events too.
"""

import dataclasses
import shlex
import shutil
from pathlib import Path
from typing import Any

from experiments.training import folder_lock, metrics_log
from experiments.training.checkpoints import Checkpoints
from experiments.training.config import TrainConfig, flat, resolve
from experiments.training.events import Events
from experiments.training.files import read_json_map, write_json
from experiments.training.folder_lock import FolderLock
from experiments.training.registry import METHODS

# Where things are, not what is trained: they may change between a stop and its resume.
_PLACE = ("out", "data_dir", "data_workers", "steps_per_dispatch")
# What a run that was stopped before it began may leave.
_LEFTOVERS = {folder_lock.NAME, "config.json.part"}


class RunFolder:
    """The folder of one run.

    Attributes:
      path: where it is.
      checkpoints: those of the run.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path).absolute()
        self.checkpoints = Checkpoints(self.path)
        self._lock = FolderLock(self.path)
        self._metrics = self.path / "metrics.jsonl"
        self._events: Events | None = None  # from the first row of this process on
        self._begins = False
        self._made: list[Path] = []  # the folders that `open` has made, the outermost last

    @classmethod
    def open(cls, config: TrainConfig, resume: bool) -> "RunFolder":
        """Takes the folder for a run, or leaves everything as it was.

        Args:
          config: a resolved config.
          resume: go on with the run in the folder.

        Returns:
          The folder, which other runs cannot use until `close`.

        Raises:
          ValueError: the folder cannot be written, is in use or is not empty; or with `resume` it
            is absent, or its config.json is missing, garbled or of another run.
        """
        folder = cls(str(config.out))
        folder.checkpoints.kept = config.keep_checkpoint
        folder._begins = not resume
        try:
            folder._take(str(config.out))
        except OSError as error:
            folder.discard()
            raise ValueError(
                f"out: {config.out} cannot be written ({error.strerror}); choose another --out"
            ) from error
        except BaseException:
            folder.discard()
            raise
        return folder

    def _take(self, out: str) -> None:
        """Checks and locks the folder, which is made for a new run."""
        try:
            out.encode("utf-8")
        except UnicodeEncodeError:
            raise ValueError(
                f"out: {out!a} is not valid text in this locale; set PYTHONUTF8=1 or "
                "LC_ALL=C.UTF-8, or choose another --out"
            ) from None
        if self.path.is_symlink() and not self.path.exists():
            raise ValueError(f"out: {out} is a link to nothing; choose another --out")
        if self.path.exists() and not self.path.is_dir():
            raise ValueError(f"out: {out} is a file; choose a folder")
        if self._begins:
            above = [self.path, *self.path.parents]
            missing = [path for path in above if not path.exists()]
            self.path.mkdir(parents=True, exist_ok=True)
            self._made = missing
        elif not self.path.exists() or not self._contents():
            what = "is empty" if self.path.exists() else "does not exist"
            raise ValueError(
                f"resume: {out} {what}, so there is no run to go on with; leave --resume out to "
                "start one"
            )
        self._lock.acquire()
        if self._begins and self._contents():
            self._begins = False  # what is there is not this run's to discard
            raise ValueError(
                f"out: {out} is not empty; add --resume to go on with that run, or choose another "
                "--out"
            )

    def _contents(self) -> set[str]:
        return {path.name for path in self.path.iterdir()} - _LEFTOVERS

    def discard(self) -> None:
        """Removes what a run that did not begin has written, and lets other runs use the folder."""
        if self._begins and self._lock.held:
            for name in ("config.json", "metrics.jsonl"):
                (self.path / name).unlink(missing_ok=True)
                (self.path / f"{name}.part").unlink(missing_ok=True)
            shutil.rmtree(self.checkpoints.path, ignore_errors=True)
        self.close()
        for path in self._made:
            if path.exists() and not any(path.iterdir()):
                path.rmdir()

    def lock(self) -> None:
        """Takes the folder again after `close`.

        Raises:
          ValueError: another run holds it.
        """
        self._lock.acquire()

    def close(self) -> None:
        """Lets other runs use the folder; nothing happens where they can already."""
        self._lock.release()

    @property
    def resume_command(self) -> str:
        """The command that goes on with the run."""
        return f"python -m experiments.train --resume --out {shlex.quote(str(self.path))}"

    def start(self, config: TrainConfig) -> None:
        """Makes the folder, and writes config.json where it does not hold the config.

        Args:
          config: a resolved config, with the places of the run.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        self.checkpoints.tidy()
        path = self.path / "config.json"
        if path.exists() and self.config().epochs == config.epochs:
            return
        # The result is that of the shorter run. Without it, that run goes on to its end again.
        (self.path / "result.json").unlink(missing_ok=True)
        write_json(path, dataclasses.asdict(config))

    def config(self) -> TrainConfig:
        """The run's config.

        Returns:
          What config.json holds.

        Raises:
          ValueError: config.json is missing, garbled or of another version.
        """
        config = self.stored("choose another --out")
        try:
            return resolve(config)
        except (ValueError, TypeError) as error:
            raise ValueError(f"{self.path / 'config.json'}: {error}") from error

    def stored(self, fix: str) -> TrainConfig:
        """The run's config, whatever its values are and whether or not it can run here.

        Args:
          fix: what to do where it cannot be read.

        Returns:
          What config.json holds.

        Raises:
          ValueError: config.json is missing, garbled or has other fields than this version's.
        """
        path = self.path / "config.json"
        stored = read_json_map(path, fix)
        options = stored.get("options")
        if stored.get("method") not in METHODS or not isinstance(options, dict):
            raise ValueError(
                f"{path}: other fields than a run of this version has (method "
                f"{stored.get('method')!r} with options {options!r}); {fix}"
            )
        options_type = type(METHODS[stored["method"]].options)
        for dataclass, values in ((TrainConfig, stored), (options_type, options)):
            fields = {field.name for field in dataclasses.fields(dataclass)}
            if unmatched := sorted(fields.symmetric_difference(values)):
                raise ValueError(
                    f"{path}: other fields than a run of this version has "
                    f"({', '.join(unmatched)}); {fix}"
                )
        return TrainConfig(**stored | {"options": options_type(**options)})

    def continued(self, config: TrainConfig) -> TrainConfig:
        """Checks that a config is that of the run in the folder; only places may differ.

        A run that has ended may also have more epochs. Its masks keep the schedule of the epochs
        that it had.

        Args:
          config: with no field left at None that the run has.

        Returns:
          The config of the run as it goes on.

        Raises:
          ValueError: names the fields that differ, or config.json is missing or garbled.
        """
        stored, new = self.config(), config
        mask_epochs, hint = stored.mask_epochs, ""
        assert stored.epochs is not None
        if new.epochs is not None and new.epochs > stored.epochs:
            if self.result() is None:
                hint = "; a run can be extended when it has ended, this one has not"
            else:
                mask_epochs = mask_epochs or stored.epochs
                stored = dataclasses.replace(stored, epochs=new.epochs)
        new = dataclasses.replace(new, mask_epochs=new.mask_epochs or stored.mask_epochs)
        if changed := changes(stored, new):
            raise ValueError(
                f"resume: {config.out} is a run with another config ({', '.join(changed)}){hint}; "
                "leave these flags out or choose another --out"
            )
        return dataclasses.replace(config, mask_epochs=mask_epochs)

    def append(self, row: dict[str, Any]) -> None:
        """Adds one row to metrics.jsonl and to the events of TensorBoard.

        Args:
          row: JSON values, with `kind` and `step`.
        """
        self._lock.check()
        metrics_log.append(self._metrics, row)
        if self._events is None:
            self._events = Events(self.path, self.metrics())
        else:
            self._events.append(row)

    def metrics(self) -> list[dict[str, Any]]:
        """The rows of metrics.jsonl.

        Returns:
          Rows in order; a last line that a stop cut short is left out.

        Raises:
          ValueError: a line before the last is garbled.
        """
        return metrics_log.read(self._metrics)

    def rewind(self, step: int, log_every: int, steps_per_epoch: int) -> None:
        """Drops the rows after a step, which a resumed run will write again.

        Args:
          step: the last step to keep.
          log_every: steps between two rows of a logging window.
          steps_per_epoch: steps between two rows of an epoch.

        Raises:
          ValueError: rows up to the step are missing.
        """
        missing = metrics_log.first_missing(self.metrics(), step, log_every, steps_per_epoch)
        if missing is not None:
            steps = [at for at in self.checkpoints.steps() if at >= missing]
            later = [f"checkpoints/{self.checkpoints.file(at).name}" for at in steps]
            raise ValueError(
                f"{self._metrics}: the row of step {missing} is missing, and the run goes on from "
                f"step {step}; restore the file, or delete {' and '.join(later)} to train from "
                "before that row again"
            )
        metrics_log.rewind(self._metrics, step)

    def save(self, step: int, tree: Any, meta: dict[str, Any]) -> None:
        """Writes a checkpoint; the last two are kept, and that of `keep_checkpoint`.

        Args:
          step: training steps done.
          tree: arrays and PRNG keys in any pytree.
          meta: JSON values.
        """
        self._lock.check()
        self.checkpoints.save(step, tree, meta)

    def latest(self) -> int | None:
        """The step of the last complete checkpoint, or None when there is none yet."""
        return max(self.checkpoints.steps(), default=None)

    def write_result(self, result: dict[str, Any]) -> None:
        """Writes result.json.

        Args:
          result: JSON values.
        """
        self._lock.check()
        write_json(self.path / "result.json", result)

    def result(self) -> dict[str, Any] | None:
        """Reads result.json.

        Returns:
          Its values; None before the run has ended.

        Raises:
          ValueError: it is garbled.
        """
        path = self.path / "result.json"
        fix = "delete it and run again with --resume"
        return read_json_map(path, fix) if path.exists() else None


def changes(stored: TrainConfig, new: TrainConfig) -> list[str]:
    """Where two configs of a run differ, places aside.

    Args:
      stored: of the run.
      new: as it would be run now.

    Returns:
      A line for each field, "name before -> after"; without the options where the methods differ,
      whose options have other names.
    """
    if stored.method != new.method:
        stored, new = (dataclasses.replace(one, options=None) for one in (stored, new))
    before, after = flat(stored), flat(new)
    return [
        f"{name} {before.get(name)!r} -> {after.get(name)!r}"
        for name in before | after
        if name not in _PLACE and before.get(name) != after.get(name)
    ]
