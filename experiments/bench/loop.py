"""Times the loop of a run beside its bare training step, and the evaluation.

`python -m experiments.bench.loop` takes about four minutes on 2 CPU cores. Windows of the loop, as
`experiments.train` runs it, take turns with as many calls of the compiled step on a batch that is
on the device already: what the loop adds is making the batches, dispatching, and a row of metrics
for each window. The data have the shape of CIFAR-10; the narrow CNN is the hardest case.
"""

import dataclasses
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from experiments.bench import command
from experiments.data.prepare import prepare
from experiments.measuring.environment import origin
from experiments.measuring.memory import steady_memory
from experiments.measuring.timing import call_and_time, median_iqr
from experiments.reporting import markdown, results
from experiments.reporting.reports import loop as report_tables
from experiments.training.config import TrainConfig
from experiments.training.execution import copied
from experiments.training.run import Run

DATASET, SHAPE, CLASSES = "cifar10", (32, 32, 3), 10


class Case(NamedTuple):
    """What is trained.

    Attributes:
      model: of the zoo.
      width: factor on its channels.
      method: of `experiments.train`; its masks stay in the timed steps.
      batch_size: images in a step.
      window: steps of a turn, and between two rows of metrics.
      turns: of the loop and of the bare step.
    """

    model: str
    width: float
    method: str
    batch_size: int
    window: int
    turns: int


CASES = (
    Case("cnn", 0.25, "dense", 128, 50, 25),
    Case("cnn", 0.25, "hrbp", 128, 50, 25),
    Case("resnet20", 1, "dense", 128, 10, 9),
    Case("resnet20", 1, "hrbp", 128, 10, 9),
)
QUICK_CASES = (Case("cnn", 0.125, "hrbp", 8, 6, 2),)


@dataclasses.dataclass(frozen=True)
class Config:
    """What is timed.

    Attributes:
      test_images: in one evaluation.
      precision: float32 or bfloat16, of the activations.
      steps_per_dispatch: as in `experiments.train`.
      out: JSON file; None is experiments/results/bench_loop_BACKEND.json.
      quick: one narrow network, few steps; writes a file only if `out` is given.
    """

    test_images: int = 10_000
    precision: str = "float32"
    steps_per_dispatch: int | None = None
    out: str | None = None
    quick: bool = False


class TimedRun(Run):
    """A run that lets its bare step have a turn after each window; for one epoch at most.

    Attributes:
      turns: milliseconds of a step in the loop and of a bare step.
    """

    def prepare(self) -> None:
        """Compiles the bare step."""
        where = 0, self.config.batch_size, self.config.seed
        batch = next(self.data.train_batches(*where))
        state = copied(self.state)
        layouts = self.trainer.planned(state.layouts)
        state = dataclasses.replace(state, layouts={})
        step, key = self.trainer.lower(self.state, self.step, *batch).compile(), self.trainer.key

        def bare() -> Any:
            nonlocal state
            for _ in range(self.config.log_every):
                state, metrics = step(state, layouts, *batch, key)
            return metrics

        self.turns: list[tuple[float, float]] = []
        self._bare, self._window_start = bare, None

    def _log_window(self, epoch: int) -> dict[str, float]:
        means = super()._log_window(epoch)
        now, started = time.perf_counter(), self._window_start
        _, bare_ms = call_and_time(self._bare)
        if started is not None:  # the first window compiles
            steps = self.config.log_every
            self.turns.append((1e3 * (now - started) / steps, bare_ms / steps))
        self._window_start = time.perf_counter()
        return means


def main(config: Config) -> dict[str, Any]:
    """Times the loops, prints the table and writes the JSON file.

    Args:
      config: what is timed.

    Returns:
      The report: a row for each case, device, versions and commit.
    """
    if config.quick:
        config = dataclasses.replace(config, test_images=50)
    cases = QUICK_CASES if config.quick else CASES
    steady_memory()
    report = origin() | {"config": results.settings(config)}
    with tempfile.TemporaryDirectory() as folder:
        images = max(_steps(case) * case.batch_size for case in cases)
        _write_data(Path(folder), images, config.test_images)
        report["rows"] = [_time(case, config, Path(folder)) for case in cases]
    markdown.show(report_tables.table(report))
    if config.out or not config.quick:
        name = f"bench_loop_{jax.default_backend()}.json"
        results.write(report, config.out or results.RESULTS / name)
    return report


def _steps(case: Case) -> int:
    return case.window * (1 + case.turns)


def _write_data(folder: Path, train: int, test: int) -> None:
    """Random images in the layout that runs read."""
    rng = np.random.default_rng(0)
    arrays = {
        f"{kind}_{split}": values
        for split, count in (("train", train), ("test", test))
        for kind, values in (
            ("x", rng.integers(0, 256, (count, *SHAPE), np.uint8)),
            ("y", rng.integers(0, CLASSES, count)),
        )
    }
    np.savez(folder / "arrays.npz", **arrays)
    prepare(DATASET, folder, source=folder / "arrays.npz")


def _time(case: Case, config: Config, folder: Path) -> dict[str, Any]:
    run = TimedRun(
        TrainConfig(
            dataset=DATASET,
            model=case.model,
            width=case.width,
            method=case.method,
            batch_size=case.batch_size,
            log_every=case.window,
            epochs=2,
            precision=config.precision,
            steps_per_dispatch=config.steps_per_dispatch,
            data_dir=str(folder),
            out=str(folder / "-".join(map(str, case))),
        )
    )
    run.prepare()
    run.train(stop_after=_steps(case))
    loop_ms, bare_ms = zip(*run.turns, strict=True)
    overheads = [100 * (loop / bare - 1) for loop, bare in run.turns]

    def evaluate() -> float:
        return run.trainer.evaluate(run.state, run.data.test_batches(case.batch_size))

    evaluate()
    seconds = [1e-3 * call_and_time(evaluate)[1] for _ in range(3)]
    overhead, spread = median_iqr(overheads, 2)
    return case._asdict() | {
        "execution": run.config.execution,
        "steps_per_dispatch": run.config.steps_per_dispatch,
        "bare_step_ms": median_iqr(bare_ms)[0],
        "loop_step_ms": median_iqr(loop_ms)[0],
        "overhead_percent": overhead,
        "overhead_percent_iqr": spread,
        "test_images_per_second": round(config.test_images / float(np.median(seconds))),
    }


def cli(arguments: Sequence[str]) -> int:
    """Runs the command.

    Args:
      arguments: without the program's name.

    Returns:
      The exit status.
    """
    return command.run(Config, main, "experiments.bench.loop", __doc__, arguments)


if __name__ == "__main__":
    raise SystemExit(cli(sys.argv[1:]))
