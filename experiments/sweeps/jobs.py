"""The runs of a table: which there are, how long each takes, and how one of them is run."""

import dataclasses
import fnmatch
import math
from pathlib import Path
from typing import Any, NamedTuple

from experiments.data.batches import Data
from experiments.data.specs import SPECS
from experiments.measuring.environment import device
from experiments.reporting import results
from experiments.sweeps.folder import SweepFolder
from experiments.sweeps.settings import at_scale
from experiments.sweeps.table import Cell, SweepTable
from experiments.training.config import TrainConfig, resolve
from experiments.training.fgsm import attack
from experiments.training.files import write_json
from experiments.training.programs import Programs
from experiments.training.run import Run
from experiments.training.run_folder import RunFolder, changes

CHECKPOINT_SECONDS = 25  # with the step or evaluation under way about half a minute
_FEW_ROWS = 10**9  # metrics.jsonl of a cell has rows of epochs only


class Job(NamedTuple):
    """A cell and a seed.

    Attributes:
      name: what `--cells` selects.
      cell: of the table, at the scale.
      path: its run folder.
      network: of the cell at the full scale, in words.
    """

    name: str
    cell: Cell
    path: Path
    network: str = ""

    @property
    def config(self) -> TrainConfig:
        """Of the run."""
        return self.cell.config

    @property
    def steps(self) -> int:
        """Of the whole run."""
        examples = self.config.examples or SPECS[self.config.dataset].sizes[0]
        assert self.config.batch_size is not None
        assert self.config.epochs is not None
        return examples // self.config.batch_size * self.config.epochs


def jobs(
    table: SweepTable,
    folder: SweepFolder,
    data_dir: str,
    scale: str,
    seeds: int,
    pattern: str,
    precision: str = "float32",
) -> list[Job]:
    """The runs of a table in order of what they tell: every cell once, then the next seed.

    Args:
      table: at the full scale.
      folder: of the sweeps.
      data_dir: of the data sets.
      scale: full, cpu or smoke.
      seeds: of each cell.
      pattern: of the names, with wildcards; what lies around it does not matter.
      precision: float32 or bfloat16.

    Returns:
      Runs; cells that are one run at a scale share its folder. The smoke scale has the first cell
      of each row.
    """
    found = []
    cells = list(table.cells)
    if scale == "smoke":
        cells = list({cell.row: cell for cell in reversed(cells)}.values())[::-1]
    for seed in range(seeds):
        for cell in cells:
            config = resolve(
                dataclasses.replace(
                    at_scale(cell.config, scale),
                    seed=seed,
                    data_dir=data_dir,
                    precision=precision,
                    log_every=_FEW_ROWS,
                )
            )
            path = folder.cell(config)
            config = dataclasses.replace(config, out=str(path))
            at_this_scale = dataclasses.replace(cell, config=config)
            job = Job(f"{cell.name}/seed{seed}", at_this_scale, path, cell.network)
            if fnmatch.fnmatch(job.name.lower(), f"*{pattern.lower()}*"):
                found.append(job)
    return found


def outdated(job: Job) -> str | None:
    """Whether a cell was run with other settings than it would be today.

    Its folder is named after what differs from the defaults, so a default that changes between two
    versions leaves the name as it is.

    Args:
      job: finished, under way, or yet to run.

    Returns:
      Which settings differ, and what to do; None where none does, or nothing was run.
    """
    if not (job.path / "config.json").exists():
        return None
    fix = f"delete {job.path} to run it anew"
    try:
        found = changes(resolve(RunFolder(job.path).stored(fix)), job.config)
    except ValueError as error:  # it has fields of another version
        return str(error)
    return f"run with other settings ({', '.join(found)}); {fix}" if found else None


def run(
    job: Job, folder: SweepFolder, data: Data, programs: Programs, deadline: float = math.inf
) -> bool:
    """Runs or resumes a cell.

    Args:
      job: which.
      folder: of the sweeps.
      data: the cell's data set.
      programs: of the cells before.
      deadline: of `time.monotonic()`, after which it stops.

    Returns:
      Whether it ended.

    Raises:
      Stopped: by a signal; the run goes on from its last checkpoint.
      FloatingPointError: the loss is not finite.
      ValueError: the method refuses its options, or the cell began with other settings.
      OSError: the folder cannot be written.
    """
    if reason := outdated(job):
        raise ValueError(f"{job.name}: {reason}")
    training = Run(
        job.config,
        resume=(job.path / "config.json").exists(),
        data=data,
        programs=programs,
        checkpoint_seconds=CHECKPOINT_SECONDS,
        spill=folder.spill(job.path),
        pictures=False,
    )
    if training.train(deadline=deadline) is None:
        return False
    if job.cell.epsilons:
        state, step = training.state, training.step
        report = attack(training.trainer, state, training.data, step, job.cell.epsilons)
        write_json(job.path / "attack.json", report)
    return True


def seconds_expected(job: Job, done: list[dict[str, Any]]) -> float | None:
    """How long a cell takes: as the same cell with another seed, or by steps that were timed.

    Args:
      job: which.
      done: the results of finished cells.

    Returns:
      Seconds of training; None where nothing like it was timed on this device.
    """
    here = device()
    same = ("method", "dataset", "model", "width", "sparsity", "batch_size", "execution")
    step_ms = None
    for result in done:
        if result["device"] == here and all(
            result[name] == getattr(job.config, name) for name in same
        ):
            if result["steps"] == job.steps:
                return float(result["train_seconds"])
            step_ms = result["step_ms_median"]
    return (
        None
        if (step_ms := step_ms or _benchmarked(job, here)) is None
        else (step_ms * job.steps / 1000)
    )


def _benchmarked(job: Job, here: str) -> float | None:
    """Milliseconds of the step in the committed benchmarks on this device."""
    config = job.config
    execution = "native" if config.method == "dense" else config.execution
    for name in results.names():
        if name.startswith("bench_training_") and results.read(name)["device"] == here:
            for row in results.read(name)["rows"]:
                if (row["model"], row["width"], row["batch_size"], row["execution"]) == (
                    *(config.model, config.width, config.batch_size),
                    execution,
                ) and row["sparsity"] == config.sparsity:
                    return float(row["step_ms_median"])
    return None
