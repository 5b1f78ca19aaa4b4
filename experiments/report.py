"""Fills the tables and draws the figures of README.md and docs/, or shows training runs.

    python -m experiments.report
    python -m experiments.report --check
    python -m experiments.report runs/a runs/b

The first rewrites from experiments/results/*.json what is stale, the second writes nothing and
fails instead. A table stands between `<!-- table:NAME -->` and `<!-- /table -->`;
`experiments/reporting/tables.py` says which names there are. The third renders the run folders as
one HTML file that needs no other: results and settings side by side, curves, the layers and their
masks. Runs that have not ended are shown as far as they are.
"""

import dataclasses
import os
import sys
from pathlib import Path

import tyro

from experiments.bench import run_layers
from experiments.measuring.environment import device
from experiments.reporting.html.page import Measured, page
from experiments.reporting.html.runs import ReportedRun, folders_of, labels_of, printable, read
from experiments.reporting.tables import TablesConfig
from experiments.reporting.tables import main as fill_tables
from experiments.training.files import naming


@dataclasses.dataclass(frozen=True)
class ReportConfig(TablesConfig):
    """What is reported.

    Attributes:
      runs: run folders, or folders that hold some, as that of a comparison does; without any, the
        tables are filled.
      out: of the HTML file; None is report.html in the run folder, or in the folder that holds
        all of several.
      measure: also time each layer here, dense and as the run has it: about 2 seconds a layer.
    """

    runs: tyro.conf.Positional[tuple[str, ...]] = ()
    out: str | None = None
    measure: bool = False


def main(config: ReportConfig) -> list[str]:
    """Fills the tables, or renders runs.

    Args:
      config: which.

    Returns:
      An error of one line for each run folder that could not be read.

    Raises:
      ValueError: a table is stale or unknown, no folder is a run's, or flags do not fit together.
      OSError: the file cannot be written.
    """
    if not config.runs:
        if config.out or config.measure:
            raise ValueError("runs: --out and --measure are of run folders; name at least one")
        fill_tables(config)
        return []
    if config.check:
        raise ValueError("check: expected no run folders beside --check, which looks at the tables")
    folders = folders_of(config.runs)
    runs: list[ReportedRun] = []
    errors = []
    for folder, label in zip(folders, labels_of(folders), strict=True):
        try:
            runs.append(read(folder, label))
        except (ValueError, OSError) as error:
            errors.append(f"{printable(str(folder))}: {' '.join(printable(str(error)).split())}")
    if not runs:
        raise ValueError("\nerror: ".join(errors))
    measured = {run.label: _measured(run) for run in runs if config.measure and run.network}
    out = Path(config.out) if config.out else _beside(folders) / "report.html"
    with naming(out):
        out.write_text(page(runs, measured), encoding="utf-8")
    print(f"{len(runs)} run{'s' if len(runs) > 1 else ''}: {printable(str(out))}")
    return errors


def _beside(folders: list[Path]) -> Path:
    """The folder of one run, or the one that holds all of several."""
    if len(folders) == 1:
        return folders[0]
    return Path(os.path.commonpath([folder.absolute().parent for folder in folders]))


def _measured(run: ReportedRun) -> Measured:
    network, config = run.network, run.config
    assert network is not None
    times = run_layers.measure(network.trainer, network.state, network.image_shape)
    named = network.trainer.config.implementation or "the kernels that are picked here"
    how = (
        f"medians of {run_layers.ROUNDS} and interquartile ranges on {device()}, forward pass and "
        f"both gradients of {config.batch_size} images in {config.precision}; block-sparse in "
        f"{named}, dense in the faster format, NHWC or CHWN"
    )
    return Measured(how, times)


def cli(arguments: list[str] | None = None) -> None:
    """Runs the command line.

    What is stale or unknown ends it with one line and exit code 1, a run folder that cannot be
    read with a line and exit code 2, after the others were rendered.

    Args:
      arguments: without the program's name; None takes those of the process.
    """
    config = tyro.cli(
        ReportConfig, args=arguments, prog="python -m experiments.report", description=__doc__
    )
    try:
        errors = main(config)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2 if config.runs else 1) from None
    for line in errors:
        print(f"error: {line}", file=sys.stderr)
    if errors:
        raise SystemExit(2)


if __name__ == "__main__":
    cli()
