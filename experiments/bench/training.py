"""Times whole training steps: `python -m experiments.bench.training` (about 7 minutes on 2 CPU
cores; `--quick` about one).

For each network and sparsity: dense (NHWC and CHWN; the faster one is the baseline), masked, sparse
and packed execution of static HRBP, step by step in turn in one process. Dense convolutions run as
a matrix product per tap where that is faster than XLA's convolution (`pallas_kernels/dense_conv.py`).
The losses of the first step must agree before anything is timed. Slower rows are reported too.
`--device gpu` hands over to gpu_training.py, which has options of its own.
"""

import dataclasses
import functools
import gc
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from rich.console import Console
from rich.table import Table

from experiments.bench.environment import commit, device, versions
from experiments.bench.gpu import clock as gpu_clock
from experiments.bench.gpu import training as gpu_training
from experiments.bench.memory import steady_memory
from experiments.bench.timing import median_iqr, time_in_turn, timed
from experiments.training.config import TrainConfig, resolve
from experiments.training.length import Length
from experiments.training.loop import Trainer, stepper

RESULTS = Path(__file__).parents[1] / "results"
PATIENCE = 10.0  # seconds: a step that takes longer is timed once
STEP = 1  # its number: no mask update falls on it


@dataclasses.dataclass(frozen=True)
class BenchConfig:
    """What is timed.

    Attributes:
      models: of the zoo.
      sparsities: of static HRBP.
      width: of the ResNets (2 gives the GraSP networks).
      image_size: pixels; images have 3 channels.
      batch_size: images per step.
      precision: float32 or bfloat16.
      implementation: of the block-sparse conv; None picks.
      repetitions: timed steps of each execution, in turn, each after a step of its own that does
        not count.
      out: JSON file; None is experiments/results/bench_training_PLATFORM.json.
      quick: one small network and few repetitions, written nowhere unless `out` is given.
    """

    models: tuple[str, ...] = ("vgg19", "resnet32")
    sparsities: tuple[float, ...] = (0.9, 0.95)
    width: float = 2
    image_size: int = 32
    batch_size: int = 128
    precision: str = "float32"
    implementation: str | None = None
    repetitions: int = 5
    out: str | None = None
    quick: bool = False


def main(config: BenchConfig) -> dict[str, Any]:
    """Times the steps, prints a table and writes JSON.

    Args:
      config: what is timed.

    Returns:
      What the JSON holds.

    Raises:
      RuntimeError: two executions of one step disagree.
    """
    out = (
        Path(config.out) if config.out else RESULTS / f"bench_training_{jax.default_backend()}.json"
    )
    if config.quick:
        config = dataclasses.replace(
            config,
            models=("resnet20",),
            sparsities=config.sparsities[:1],
            width=2,
            batch_size=32,
            repetitions=5,
        )
    steady_memory()
    rows = [row for model in config.models for row in _bench(config, model)]
    report = {
        "rows": rows,
        "device": device(),
        "versions": versions(),
        "commit": commit(),
        "config": dataclasses.asdict(dataclasses.replace(config, out=None)),
    }
    if config.out or not config.quick:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(report, indent=2) + "\n")
    Console(width=None if Console().is_terminal else 120).print(_table(report))
    return report


def _bench(config: BenchConfig, model: str) -> list[dict[str, Any]]:
    """One network: all sparsities and executions in turn."""
    rng = np.random.default_rng(0)
    images = jnp.asarray(
        rng.normal(size=(config.batch_size, config.image_size, config.image_size, 3)), jnp.float32
    )
    labels = jnp.asarray(rng.integers(0, 10, config.batch_size), jnp.int32)
    trainer = functools.partial(_trainer, config, model, images.shape[1:])
    variants = {
        ("dense", 0.0, data_format): trainer("dense", 0.0, "masked", data_format)
        for data_format in ("NHWC", "CHWN")
    }
    for sparsity in config.sparsities:
        for execution in ("masked", "sparse", "packed"):
            data_format = "NHWC" if execution == "masked" else "CHWN"
            variants[execution, sparsity, data_format] = trainer(
                "hrbp", sparsity, execution, data_format
            )
    steppers = {name: stepper(t, t.init(), STEP, images, labels) for name, t in variants.items()}
    _check(
        {name: float(step()[1].loss) for name, step in steppers.items()},
        {"float32": 1e-3, "bfloat16": 2e-2}[config.precision],
    )
    times = time_in_turn(
        {name: timed(step) for name, step in steppers.items()},
        patience=PATIENCE,
        rounds=config.repetitions,
    )
    dense = min(median_iqr(times[name])[0] or 0.0 for name in times if name[0] == "dense")
    rows = []
    for (execution, sparsity, data_format), milliseconds in times.items():
        median, iqr = median_iqr(milliseconds)
        shown = {
            "model": model,
            "width": config.width,
            "sparsity": sparsity,
            "execution": execution,
            "data_format": data_format,
        }
        settings = {
            "batch_size": config.batch_size,
            "precision": config.precision,
            "repetitions": config.repetitions,
        }
        rows.append(
            shown
            | settings
            | {
                "step_ms_median": median,
                "step_ms_iqr": iqr,
                "speed_up_over_dense": round(dense / (median or 1.0), 3),
            }
        )
    variants.clear(), steppers.clear(), gc.collect()
    return rows


def _trainer(
    config: BenchConfig,
    model: str,
    image_shape: tuple[int, ...],
    method: str,
    sparsity: float,
    execution: str,
    data_format: str,
) -> Trainer:
    train = TrainConfig(
        dataset="cifar10",
        model=model,
        method=method,
        sparsity=sparsity,
        execution=execution,
        precision=config.precision,
        width=config.width if model.startswith("resnet") else 1,
        batch_size=config.batch_size,
        implementation=config.implementation,
    )
    return Trainer(
        resolve(train), image_shape, 10, Length(steps_per_epoch=390, total=390 * 160), data_format
    )


def _check(losses: dict[tuple[str, float, str], float], tolerance: float) -> None:
    """The executions of one sparsity must give one loss."""
    for sparsity in {name[1] for name in losses}:
        group = {name: loss for name, loss in losses.items() if name[1] == sparsity}
        low, high = min(group.values()), max(group.values())
        if not high - low <= tolerance * abs(high):
            raise RuntimeError(
                f"the executions disagree, nothing was timed: losses of the first step {group}"
            )


def _table(report: dict[str, Any]) -> Table:
    table = Table(title=f"one training step, {report['device']}")
    for column in ("model", "sparsity", "execution", "format", "step", "IQR", "over dense"):
        table.add_column(
            column, justify="left" if column in ("model", "execution", "format") else "right"
        )
    for row in report["rows"]:
        cells = (row["model"], f"{row['sparsity']:.0%}", row["execution"], row["data_format"])
        table.add_row(
            *cells,
            f"{row['step_ms_median']:.0f} ms",
            f"{row['step_ms_iqr']:.0f} ms",
            f"{row['speed_up_over_dense']:.2f}x",
        )
    return table


def cli(arguments: Sequence[str]) -> int:
    """The command: `--device gpu` is another one, `--device cpu` says what is so anyway.

    Args:
      arguments: without the program's name.

    Returns:
      The exit status.
    """
    prog = "python -m experiments.bench.training"
    if gpu_clock.asks_for_gpu(arguments):
        return gpu_training.run(tyro.cli(gpu_training.GpuTrainingConfig, prog=prog, args=arguments))
    rest = " ".join(arguments).replace("--device=cpu", "").replace("--device cpu", "").split()
    main(tyro.cli(BenchConfig, prog=prog, args=rest))
    return 0


if __name__ == "__main__":
    raise SystemExit(cli(sys.argv[1:]))
