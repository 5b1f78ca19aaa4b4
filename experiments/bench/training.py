"""Times whole training steps: block-sparse against dense, masked-dense and PyTorch.

`python -m experiments.bench.training` takes about 20 minutes on 2 CPU cores, `--quick` about two.
For each network and sparsity it times the masked, the sparse and the packed execution of static
HRBP in turn with the dense step, in one process. Dense steps run in NHWC and in CHWN (the faster
one is the baseline), each convolution as a matrix product for each tap where that is faster than
XLA's convolution (`pallas_kernels/dense_conv.py`). With `--torch PATH_TO_PYTHON`, PyTorch's dense
step is timed as well: the same network from the same weights on the same batch, channels_last, in a
process of its own (see `torch_baseline/`).

The losses of the first step must agree before anything is timed. Steps that lose are reported too.
`--device gpu` measures a GPU instead and has options of its own: see `--device gpu --help`.
"""

import contextlib
import dataclasses
import gc
import sys
from collections.abc import Sequence
from typing import Any, Literal

from blocksparse_jax import _checks
from experiments.bench import command
from experiments.bench.gpu import training as gpu_training
from experiments.bench.torch_baseline.process import TorchProcess, torch_processes
from experiments.bench.training_steps import (
    Problem,
    Step,
    Variant,
    check_losses,
    torch_steps,
    variants,
    xla_step,
)
from experiments.measuring.environment import origin
from experiments.measuring.memory import steady_memory
from experiments.measuring.row_names import TORCH
from experiments.measuring.timing import median_iqr, time_in_turn
from experiments.reporting import markdown, results
from experiments.reporting.reports import training as report_tables

PATIENCE = 10.0  # seconds: a step that takes longer is timed once


@dataclasses.dataclass(frozen=True)
class BenchConfig:
    """What is timed.

    Attributes:
      device: cpu.
      models: of the zoo; with `torch` vgg19 and the CIFAR ResNets.
      sparsities: of static HRBP.
      width: of the ResNets (2 gives the GraSP networks).
      image_size: pixels; images have 3 channels.
      batch_size: images in a step.
      precision: float32 or bfloat16.
      implementation: of the block-sparse conv; None picks.
      repetitions: timed steps of each execution, in turn, each after a step that does not count.
      torch: path of a Python that has PyTorch, whose dense step is timed too.
      out: JSON file; None is experiments/results/bench_training_cpu.json.
      quick: one small network and a small batch; writes a file only if `out` is given.
    """

    device: Literal["cpu"] = "cpu"
    models: tuple[str, ...] = ("vgg19", "resnet32")
    sparsities: tuple[float, ...] = (0.5, 0.8, 0.9, 0.95)
    width: float = 2
    image_size: int = 32
    batch_size: int = 128
    precision: Literal["float32", "bfloat16"] = "float32"
    implementation: str | None = None
    repetitions: int = 5
    torch: str | None = None
    out: str | None = None
    quick: bool = False


def main(config: BenchConfig) -> dict[str, Any]:
    """Times the steps, prints the table and writes the JSON file.

    Args:
      config: what is timed.

    Returns:
      The report: a row for each network, execution and sparsity, device, versions and commit.

    Raises:
      ValueError: a sparsity outside of [0, 1), no PyTorch there, or a network or precision that its
        baseline does not have.
      AssertionError: two executions of one step disagree.
    """
    if config.torch and (config.precision != "float32" or not _torch_has(config.models)):
        raise ValueError(
            "torch: the baseline trains vgg19, resnet20, resnet32 and resnet56 in float32; got "
            f"models {config.models} in {config.precision}"
        )
    for sparsity in config.sparsities:
        _checks.fraction("sparsities", sparsity)
    if config.quick:
        config = dataclasses.replace(
            config, models=("resnet20",), sparsities=config.sparsities[-1:], batch_size=32
        )
    steady_memory()
    with contextlib.ExitStack() as stack:
        torch = torch_processes(stack, config.torch)
        report = origin()
        if torch:
            report["versions"]["torch"] = torch["active"].version
        report["config"] = results.settings(config)
        report["rows"] = []
        for model in config.models:
            report["rows"] += _network_rows(config, model, torch)
            gc.collect()
    markdown.show(report_tables.table(report))
    if config.out or not config.quick:
        results.write(report, config.out or results.RESULTS / "bench_training_cpu.json")
    return report


def _torch_has(models: tuple[str, ...]) -> bool:
    return set(models) <= {"vgg19", "resnet20", "resnet32", "resnet56"}


def _network_rows(
    config: BenchConfig, model: str, torch: dict[str, TorchProcess]
) -> list[dict[str, Any]]:
    """Times one network: all sparsities and executions in turn."""
    problem = Problem(
        model=model,
        width=config.width if model.startswith("resnet") else 1,
        image_size=config.image_size,
        batch_size=config.batch_size,
        precision=config.precision,
        implementation=config.implementation,
    )
    steps: dict[Variant, Step] = {
        variant: xla_step(problem, variant) for variant in variants(config.sparsities)
    }
    steps |= torch_steps(problem, torch)
    check_losses({variant: step.first_loss for variant, step in steps.items()}, config.precision)
    times_ms = time_in_turn(
        {variant: step.call for variant, step in steps.items()},
        rounds=config.repetitions,
        patience=PATIENCE,
    )
    median_ms = {variant: median_iqr(times)[0] or 0.0 for variant, times in times_ms.items()}
    baselines = {
        "speed_up_over_dense": _fastest(median_ms, "dense"),
        "speed_up_over_torch": _fastest(median_ms, TORCH),
    }
    about = {name: getattr(problem, name) for name in ("model", "width", "batch_size", "precision")}
    rows = []
    for variant, times in times_ms.items():
        median, iqr = median_iqr(times)
        row = about | variant.describe() | {"repetitions": len(times)}
        row |= {"step_ms_median": median, "step_ms_iqr": iqr}
        for key, baseline_ms in baselines.items():
            if baseline_ms is not None:
                row[key] = round(baseline_ms / median_ms[variant], 3)
        rows.append(row)
    return rows


def _fastest(median_ms: dict[Variant, float], execution: str) -> float | None:
    times = [ms for variant, ms in median_ms.items() if variant.execution == execution]
    return min(times, default=None)


def cli(arguments: Sequence[str]) -> int:
    """Runs the command.

    Args:
      arguments: without the program's name.

    Returns:
      The exit status.
    """
    if command.asks_for_gpu(arguments):
        return gpu_training.cli(arguments)
    return command.run(BenchConfig, main, "experiments.bench.training", __doc__, arguments)


if __name__ == "__main__":
    raise SystemExit(cli(sys.argv[1:]))
