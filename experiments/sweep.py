r"""Runs or resumes the trainings that a table of a paper needs, and prints it beside the paper's.

    python -m experiments.sweep hrbp-static --data-dir data --scale cpu --seeds 1

`--list` shows the tables, `--dry-run` the cells and how long each is expected to take. Stop it
anywhere, even by a power cut, and start it again: finished cells never run twice, and the cell
under way goes on from its last checkpoint, at most half a minute back. So does a copy of the folder
on another machine; the folder stays below 48 MiB. A checkpoint that does not fit, such as that of a
dense VGG-19, stays on its machine (`OUT.here`): elsewhere that cell starts over.
"""

import contextlib
import dataclasses
import math
import shlex
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import jax
import tyro

from experiments.training import stopping

if __name__ == "__main__":
    stopping.end_at_once()  # the imports below take seconds

from blocksparse_jax import _checks
from experiments.data import load
from experiments.data.batches import Data
from experiments.measuring.memory import steady_memory
from experiments.reporting import markdown, results, sweep_figure
from experiments.reporting.reports import sweep as sweep_report
from experiments.sweeps import jobs, outcome, tables
from experiments.sweeps.folder import LIMIT, SweepFolder
from experiments.sweeps.settings import SCALES
from experiments.training.files import replace_text
from experiments.training.programs import Programs

_MAPS, _MANY_MAPS = Path("/proc/self/maps"), 40_000  # Linux refuses a process more than 65,530


@dataclasses.dataclass(frozen=True)
class SweepConfig:
    """Which table, and how much of it.

    Attributes:
      name: of the table; none shows all, as `--list` does.
      data_dir: where prepare_data wrote the data sets.
      out: folder of all sweeps, which may travel.
      minutes: start no step after so many; None runs to the end.
      seeds: of each cell.
      scale: full has the papers' settings; cpu a narrower network, fewer epochs, MNIST and a part
        of CIFAR-10; smoke an epoch on digits, to see that all of it runs.
      precision: float32 or bfloat16, of the activations.
      cells: a pattern of the cells' names, such as vgg19-90 or hrbp/seed0; the table has these.
      list: show the tables and end.
      dry_run: show the cells and end.
      results: a second place for the report; docs/results.md shows all of
        experiments/results/sweep_NAME_SCALE.json.
    """

    name: Annotated[str | None, tyro.conf.Positional] = None
    data_dir: str = "data"
    out: str = "runs/sweeps"
    minutes: float | None = None
    seeds: int = 3
    scale: str = "full"
    precision: str = "float32"
    cells: str = ""
    list: bool = False
    dry_run: bool = False
    results: str | None = None


def main(config: SweepConfig) -> dict[str, Any] | None:
    """Runs what is missing, writes and prints the table.

    Args:
      config: which table.

    Returns:
      What OUT/tables/NAME-SCALE.json holds; None after `list` and `dry_run`.

    Raises:
      ValueError: a field is wrong, no cell has such a name, or another sweep uses the folder.
      FileNotFoundError: a data set is not prepared.
      OSError: the folder cannot be written.
      Stopped: by a signal; the same command goes on.
    """
    began = time.monotonic()
    if config.list or config.name is None:
        _show_tables()
        return None
    table = tables.table(config.name)
    _checks.choice("scale", config.scale, SCALES)
    _checks.positive_int("seeds", config.seeds)
    if config.minutes is not None:
        _checks.number("minutes", config.minutes)
    deadline = math.inf if config.minutes is None else began + 60 * config.minutes
    with _folder(config.out) as folder:
        found = jobs.jobs(
            table,
            folder,
            config.data_dir,
            config.scale,
            config.seeds,
            config.cells,
            config.precision,
        )
        if table.cells and not found:
            names = ", ".join(dict.fromkeys(cell.name for cell in table.cells))
            raise ValueError(f"cells: no cell matches {config.cells!r}; there are {names}")
        if config.dry_run:
            _show_cells(folder, found)
            return None
        folder.use_cache()
        steady_memory()
        _run_all(folder, found, deadline)
        report = outcome.report(
            config.name, table, folder, found, config.scale, _command(config, bool(table.measured))
        )
        _write(config, folder, report)
    return report


@contextlib.contextmanager
def _folder(out: str) -> Iterator[SweepFolder]:
    folder = SweepFolder(out, LIMIT)
    try:
        yield folder
    finally:
        folder.tidy()
        folder.close()


def _run_all(folder: SweepFolder, found: list[jobs.Job], deadline: float) -> None:
    """Runs the cells that have not ended, one after the other."""
    programs, data = Programs(), dict[Any, Data]()
    for number, job in enumerate(found, 1):
        if folder.finished(job.path, bool(job.cell.epsilons)) is not None:
            folder.prune(job.path)
            if reason := jobs.outdated(job):
                print(f"{job.name}: {reason}", file=sys.stderr)
            continue
        if time.monotonic() >= deadline:
            print(f"the time is over, {len(found) - number + 1} of {len(found)} cells remain")
            return
        print(f"{number}/{len(found)} {job.name}", flush=True)
        name = job.config.dataset, job.config.examples
        if name not in data:
            data[name] = load(name[0], job.config.data_dir, examples=name[1])
        try:
            if not jobs.run(job, folder, data[name], programs, deadline):
                continue
        except FloatingPointError as error:
            folder.fail(job.path, error)
            print(f"{job.name}: {error}", file=sys.stderr)
        folder.prune(job.path)
        folder.tidy()
        if _MAPS.exists() and _MAPS.read_bytes().count(b"\n") > _MANY_MAPS:
            programs.clear()
            jax.clear_caches()


def _command(config: SweepConfig, measured: bool) -> str:
    """The command without the places, which differ from machine to machine."""
    words = [str(config.name)]
    if not measured:
        words += ["--scale", config.scale, "--seeds", str(config.seeds)]
        words += ["--precision", config.precision] if config.precision != "float32" else []
    words += ["--cells", config.cells] if config.cells else []
    return f"python -m experiments.sweep {shlex.join(words)}"


def _write(config: SweepConfig, folder: SweepFolder, report: dict[str, Any]) -> None:
    base = folder.path / "tables" / f"{config.name}-{config.scale}"
    results.write(report, base.with_suffix(".json"))
    text = sweep_report.table(report)
    replace_text(base.with_suffix(".md"), text + "\n")
    replace_text(base.with_suffix(".svg"), sweep_figure.draw(report))
    if config.results:
        results.write(report, config.results)
    markdown.show(text)
    print(f"table, report and figure: {base}.md, .json, .svg")


def _show_tables() -> None:
    lines = []
    for name, make in tables.TABLES.items():
        table = make()
        cells = "of the benchmarks" if table.measured else str(len(table.cells))
        lines.append([name, table.title, table.source, cells])
    markdown.show(markdown.table(["table", "what", "paper", "cells"], lines, text_columns=3))


def _show_cells(folder: SweepFolder, found: list[jobs.Job]) -> None:
    ended = {job.path: folder.finished(job.path, bool(job.cell.epsilons)) for job in found}
    done = [result for result in ended.values() if result and "failed" not in result]
    lines, total = [], 0.0
    for job in found:
        state, seconds = "finished", None
        if jobs.outdated(job):
            state = "finished with other settings"
        if ended[job.path] is None:
            state = "under way" if (job.path / "config.json").exists() else ""
            seconds = jobs.seconds_expected(job, done)
            total += seconds or 0.0
        took = "—" if ended[job.path] else "unknown" if seconds is None else f"{seconds:.0f}"
        lines.append([job.name, str(job.steps), state, took])
    markdown.show(markdown.table(["cell", "steps", "", "expected, s"], lines, text_columns=1))
    print(f"expected where it is known: {total / 60:.0f} minutes of training")


def cli(args: list[str] | None = None) -> None:
    """The command line; what stops it is said in one line.

    Args:
      args: None takes the process's arguments.
    """
    try:
        with stopping.RaiseSignalled():
            main(tyro.cli(SweepConfig, args=args, prog="python -m experiments.sweep"))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt as stop:
        print("stopped; the same command goes on", file=sys.stderr)
        raise SystemExit(128 + stopping.number_of(stop)) from None


if __name__ == "__main__":
    cli()
