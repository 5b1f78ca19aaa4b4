"""The main job: trains one small CNN on real images with six methods and prints one table.

    python -m experiments.compare

Digits (scikit-learn, 1797 real images), 90% sparsity, 2:4 for SR-STE. Digits is tiny: the table
shows that everything runs; its accuracies say little. The step times are measured afterwards, all
methods and executions in turn in one process, to be compared with each other; a run's own
result.json has the median of its training steps, with nothing between them. About two minutes on 2
CPU cores.
"""

import dataclasses
import sys
import time
from pathlib import Path
from typing import Any

import tyro
from rich import box
from rich.console import Console
from rich.table import Table

from experiments.training import stopping

if __name__ == "__main__":
    stopping.end_at_once()  # the imports below take seconds

from blocksparse_jax import _checks
from experiments.measuring.environment import origin
from experiments.measuring.memory import steady_memory
from experiments.measuring.timing import median_iqr, time_in_turn, timed
from experiments.reporting import results
from experiments.training import plots
from experiments.training.config import TrainConfig
from experiments.training.execution import to_form
from experiments.training.methods import Lottery
from experiments.training.registry import METHODS, method
from experiments.training.run import Run
from experiments.training.stepper import stepper

COMPARED = ("dense", "hrbp", "hrbp-dynamic", "subp", "sr-ste", "rigl")
# Every execution: masked, packed, and sparse at the update of the masks. Nearly all is compiling.
SMOKE = ("dense", "hrbp-dynamic")


@dataclasses.dataclass(frozen=True)
class CompareConfig:
    """What is compared.

    Attributes:
      out: folder of the run folders; None is runs/compare-DATE-TIME.
      methods: names of the registry; all is every one of them.
      dataset: digits, or a prepared one of `experiments.train`, with its usual network.
      sparsity: fraction removed (dense and sr-ste, which keeps 2 of 4, fix their own).
      epochs: of each training; lottery tickets, as in the paper, have as many in every pass.
      repetitions: timed steps of each method and execution.
      seed: of everything.
      smoke: one epoch of a narrow network and few repetitions, to see that all of it runs; without
        `--methods`, two of them.
      results: a second place for comparison.json; the README's table reads
        experiments/results/compare_digits_cpu.json.
    """

    out: str | None = None
    methods: tuple[str, ...] = COMPARED
    dataset: str = "digits"
    sparsity: float = 0.9
    epochs: int = 10
    repetitions: int = 20
    seed: int = 0
    smoke: bool = False
    results: str | None = None


def main(config: CompareConfig) -> dict[str, Any]:
    """Trains with every method, times the steps and prints the table.

    Args:
      config: what is compared.

    Returns:
      What comparison.json holds: `rows`, one for each method, device, versions and commit.

    Raises:
      ValueError: no method or an unknown one, no repetitions, or `out` holds something already.
      OSError: `out` or `results` cannot be written.
      FloatingPointError: a training diverged.
    """
    if config.smoke:
        methods = SMOKE if config.methods == COMPARED else config.methods
        config = dataclasses.replace(config, methods=methods, epochs=1, repetitions=3)
    if config.methods == ("all",):
        config = dataclasses.replace(config, methods=tuple(METHODS))
    _check(config)
    steady_memory()
    out = Path(config.out or time.strftime("runs/compare-%Y%m%d-%H%M%S"))
    width = 0.25 if config.smoke else 1
    base = TrainConfig(dataset=config.dataset, width=width, seed=config.seed, log_every=10)
    runs = {
        name: Run(
            dataclasses.replace(base, method=name, out=str(out / name), **_options(config, name))
        )
        for name in config.methods
    }
    trained = {}
    for name, run in runs.items():
        trained[name] = run.train() or {}
        print(
            f"{name}: test accuracy {trained[name]['test_accuracy']:.2%} after "
            f"{trained[name]['train_seconds']:.0f} s",
            flush=True,
        )
    times = time_in_turn(
        {name: timed(step) for name, step in _steppers(runs).items()}, rounds=config.repetitions
    )
    dense = median_iqr(times["dense", "masked"])[0] if "dense" in runs else None
    rows = []
    for name, result in trained.items():
        medians = {
            form: median_iqr(times[name, form])
            for form in ("masked", "packed")
            if (name, form) in times
        }
        row = {
            key: result[key]
            for key in (
                "method",
                "test_accuracy",
                "density",
                "kept_flops_fraction",
                "training_flops_fraction",
                "parameters",
            )
        }
        # of one dense training, whatever the rounds of lottery tickets are
        row["training_flops_fraction"] *= result["epochs"] / config.epochs
        for form in ("masked", "packed"):
            row[f"{form}_step_ms_median"], row[f"{form}_step_ms_iqr"] = medians.get(
                form, (None, None)
            )
        packed = row["packed_step_ms_median"]
        row["packed_speed_up_over_dense"] = round(dense / packed, 3) if dense and packed else None
        rows.append(row)
    report = {
        "dataset": base.dataset,
        "model": base.model,
        "sparsity": config.sparsity,
        "epochs": config.epochs,
        "seed": config.seed,
        "step_times": f"medians of {config.repetitions} steps of each, taken in turn after the "
        f"training",
        "dense_step_ms_median": dense,
        "rows": rows,
        **origin(),
    }
    results.write(report, out / "comparison.json")
    if config.results:
        results.write(report, config.results)
    plots.comparison(
        {name: run.folder.metrics() for name, run in runs.items()}, out / "learning_curves.png"
    )
    width = None if Console().is_terminal else 120
    Console(width=width).print(_table(report))
    print(f"run folders, pictures and comparison.json: {out}")
    return report


def _check(config: CompareConfig) -> None:
    """Finds before all training what would stop the command after it."""
    if not config.methods:
        raise ValueError("methods: expected names of the registry, got none; leave --methods out")
    for name in config.methods:
        method(name)
    _checks.positive_int("repetitions", config.repetitions)
    if config.out and Path(config.out).is_dir() and any(Path(config.out).iterdir()):
        raise ValueError(f"out: {config.out} is not empty; choose another --out")
    if config.results:
        path = Path(config.results)
        if path.is_dir():
            raise ValueError(f"results: {config.results} is a folder; name a file in it")
        path.parent.mkdir(parents=True, exist_ok=True)
        new = not path.exists()
        with open(path, "a"):  # it can be written, and what is there stays until the end
            pass
        if new:
            path.unlink()


def _options(config: CompareConfig, name: str) -> dict[str, Any]:
    """What differs from method to method; a smoke run has one update of the masks."""
    options = method(name).options
    fixed = options.fixed_sparsity() is not None
    epochs = config.epochs
    if isinstance(options, Lottery):
        epochs *= options.count(config.sparsity)
    if config.smoke and hasattr(options, "update_every"):
        options = dataclasses.replace(options, update_every=10)
    fields = {"options": options, "epochs": epochs}
    return fields if fixed else fields | {"sparsity": config.sparsity}


def _steppers(runs: dict[str, Run]) -> dict[tuple[str, str], Any]:
    """(method, execution) -> a function that makes one training step from the trained state."""
    steppers = {}
    for name, run in runs.items():
        images, labels = next(run.data.train_batches(0, run.config.batch_size, run.config.seed))
        has_layout = run.trainer.spec is not None and run.trainer.spec.has_layout
        for form in ("masked", "packed") if has_layout else ("masked",):
            trainer, state = run.trainer.with_execution(form), to_form(form, run.state)
            steppers[name, form] = stepper(trainer, state, run.length.total, images, labels)
    return steppers


def _table(report: dict[str, Any]) -> Table:
    title = (
        f"{report['model']} on {report['dataset']}, {report['epochs']} epochs, {report['device']}"
    )
    dense_ms = report["dense_step_ms_median"]
    dense = "" if dense_ms is None else f"dense step {dense_ms:.1f} ms; "
    caption = f"steps in ms: {report['step_times']}; {dense}speed-up: dense over packed"
    table = Table(title=title, caption=caption, box=box.SIMPLE)
    for column in (
        "method",
        "test accuracy",
        "density",
        "kept FLOPs",
        "training FLOPs",
        "masked step",
        "packed step",
        "speed-up",
    ):
        table.add_column(
            column, justify="left" if column == "method" else "right", no_wrap=column == "method"
        )

    def ms(value: float | None) -> str:
        return "—" if value is None else f"{value:.1f}"

    for row in report["rows"]:
        faster = row["packed_speed_up_over_dense"]
        table.add_row(
            row["method"],
            f"{row['test_accuracy']:.2%}",
            f"{row['density']:.4f}",
            f"{row['kept_flops_fraction']:.1%}",
            f"{row['training_flops_fraction']:.1%}",
            "—" if row["method"] == "dense" else ms(row["masked_step_ms_median"]),
            ms(row["packed_step_ms_median"]),
            "—" if faster is None else f"{faster:.2f}x",
        )
    return table


def cli(args: list[str] | None = None) -> None:
    """The command line; what stops it is said in one line, as `experiments.train` does.

    Args:
      args: None takes the process's arguments.
    """
    try:
        with stopping.RaiseSignalled():
            main(tyro.cli(CompareConfig, args=args, prog="python -m experiments.compare"))
    except (ValueError, OSError, FloatingPointError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(1 if isinstance(error, FloatingPointError) else 2) from None
    except KeyboardInterrupt as stop:
        print("stopped; a comparison starts anew, with another --out", file=sys.stderr)
        raise SystemExit(128 + stopping.number_of(stop)) from None


if __name__ == "__main__":
    cli()
