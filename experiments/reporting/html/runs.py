"""What a report knows of a run: read from its folder, whether or not it has ended."""

import dataclasses
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import blocksparse_jax as bsj
from experiments.data.specs import SPECS
from experiments.reporting.html.layers import Network, network_of
from experiments.training.config import TrainConfig, flat, resolve
from experiments.training.run_folder import RunFolder

_PLACES = ("out", "data_dir")  # settings that say where things are


@dataclasses.dataclass(frozen=True)
class ReportedRun:
    """One run.

    Attributes:
      label: what the report calls it.
      config: of the run.
      rows: of metrics.jsonl.
      result: as in result.json; None before the run has ended.
      network: its layers at the last checkpoint; None where they cannot be had.
      missing: why there are no layers.
    """

    label: str
    config: TrainConfig
    rows: list[dict[str, Any]]
    result: dict[str, Any] | None
    network: Network | None
    missing: str = ""

    @property
    def epochs(self) -> list[dict[str, Any]]:
        """The rows of the epochs."""
        return [row for row in self.rows if row["kind"] == "epoch"]

    @property
    def steps_per_epoch(self) -> int:
        """Steps of an epoch: as the rows have it, before the first one as the data set's size."""
        for row in self.epochs:
            if number(row.get("epoch")) is not None:
                return max(1, row["step"] // (int(row["epoch"]) + 1))
        return max(1, SPECS[self.config.dataset].sizes[0] // (self.config.batch_size or 1))

    @property
    def status(self) -> str:
        """How far the run is."""
        if self.result is not None:
            return "ended"
        step = max((row["step"] for row in self.rows), default=0)
        epochs = self.config.epochs or 0
        return f"not ended: step {step:,} of {epochs * self.steps_per_epoch:,}"

    @property
    def settings(self) -> dict[str, Any]:
        """The config by the names of its flags, without places."""
        fields = flat(self.config)
        return {name: value for name, value in fields.items() if name not in _PLACES}

    def value(self, name: str) -> Any:
        """A number or text of the result, before the end of the last epoch; None without."""
        last = self.epochs[-1] if self.epochs else {}
        return (self.result or last).get(name)

    def curve(self, kind: str, name: str) -> tuple[list[float], list[float]]:
        """The epochs and the values of one number, where it is finite.

        Args:
          kind: of the rows, train or epoch.
          name: of the number.
        """
        points = [
            (row["step"] / self.steps_per_epoch, value)
            for row in self.rows
            if row["kind"] == kind and (value := number(row.get(name))) is not None
        ]
        return [x for x, _ in points], [y for _, y in points]


def number(value: Any) -> float | None:
    """A finite number as a float; None for all else that JSON can hold."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return float(value) if is_number and math.isfinite(value) else None


def folders_of(paths: Sequence[str]) -> list[Path]:
    """The run folders that paths name: each is one, or holds some, as that of a comparison does.

    Args:
      paths: as given.

    Returns:
      Each folder once, in order; a path that is no run folder and holds none stays, to be refused.
    """
    folders: dict[str, Path] = {}
    for path in map(Path, paths):
        inside = [] if (path / "config.json").exists() else path.glob("*/config.json")
        for folder in sorted(config.parent for config in inside) or [path]:
            folders.setdefault(os.path.realpath(folder), folder)
    return list(folders.values())


def labels_of(folders: Sequence[Path]) -> list[str]:
    """Short names of folders, which differ: their paths below the folder that holds them all."""
    paths = [Path(os.path.realpath(folder)) for folder in folders]
    if len(paths) == 1:
        return [printable(paths[0].name)]
    above = os.path.commonpath([path.parent for path in paths])
    return [printable(os.path.relpath(path, above)) for path in paths]


def printable(text: str) -> str:
    """The text with escapes in place of characters that cannot be shown, or that turn others."""
    return "".join(
        char if char.isprintable() else char.encode("unicode_escape").decode() for char in text
    )


def read(folder: Path, label: str) -> ReportedRun:
    """Reads a run folder, also while the run goes on.

    Args:
      folder: of the run.
      label: what the report calls it.

    Returns:
      The run, without its layers where the data set or the checkpoint is missing.

    Raises:
      ValueError: the folder is not a run's, is of another version, or is damaged.
      OSError: it cannot be read.
    """
    files = RunFolder(folder)
    stored = files.stored("a report shows runs of this version only")
    runs_here = bsj.available_implementations().get(stored.implementation, "unknown") is None
    implementation = stored.implementation if runs_here else None
    try:
        config = resolve(dataclasses.replace(stored, implementation=implementation))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{files.path / 'config.json'}: {error}") from error
    rows, result = files.metrics(), files.result()
    network, missing = None, ""
    try:
        network = network_of(files, config)
    except (ValueError, OSError) as error:
        missing = " ".join(str(error).split())
    shown = dataclasses.replace(config, implementation=stored.implementation)
    return ReportedRun(label, shown, rows, result, network, missing)
