"""Times whole training steps on a GPU: dense NHWC beside masked, packed and sparse.

`python -m experiments.bench.training --device gpu`; with `--quick` a dry run on any device. The
sparse and packed steps run once for each implementation, in each layer that it serves; the other
layers fall back to triton, then to dense, and the row says so. Before anything is timed, each
convolution of the step must agree with float64, and the first step as a whole with the masked one.
Steps are dispatched ahead as in training, with one wait after many. XLA records convolutions into
its CUDA graphs here, which it does not by default: a dense step gains by it. With `--torch
PATH_TO_PYTHON` PyTorch's dense step stands beside: channels_last, bfloat16 autocast, a CUDA graph.

With a compilation cache (JAX_COMPILATION_CACHE_DIR) many processes compile the steps before they
are timed.

Every step is a unit of the journal. `--minutes 9` stops in time with exit status 75, and the same
command continues.
"""

import dataclasses
import functools
import gc
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import jax

from experiments.bench import command
from experiments.bench.gpu import clock
from experiments.bench.gpu.ahead import compile_ahead
from experiments.bench.gpu.fingerprint import implementation_key
from experiments.bench.gpu.journal import Journal, TimeUp
from experiments.bench.gpu.step_times import measure_steps
from experiments.bench.gpu.torch_steps import measure_torch_steps
from experiments.bench.gpu.training_units import (
    StepOptions,
    Unit,
    networks_named,
    training_waves,
    unit_key,
)
from experiments.measuring.environment import origin
from experiments.measuring.row_names import TORCH
from experiments.reporting import results
from experiments.reporting.reports import gpu_training

RESERVE = 90  # seconds that must be left for a unit
UNIT_SECONDS = 480  # after which a unit hangs
AHEAD_SECONDS = 300  # of compiling ahead; what is still missing then is compiled when it is timed


@dataclasses.dataclass(frozen=True)
class GpuTrainingConfig:
    """What is timed.

    Attributes:
      device: gpu.
      models: a part of the networks' names; empty for all.
      precision: bfloat16 or float32.
      implementations: of the block-sparse conv, the most important first.
      group_size: filters in a group.
      channel_block: runs of channels.
      repetitions: bursts of steps.
      torch: path of a Python that has PyTorch, whose dense step is timed too.
      processes: how many compile steps ahead.
      minutes: after so many no unit begins; None: no limit.
      journal: JSON-lines file that is continued.
      out: JSON file; None is experiments/results/bench_training_gpu.json.
      quick: one tiny network on any device; writes a file only if `out` is given.
    """

    device: Literal["gpu"] = "gpu"
    models: str = ""
    precision: Literal["bfloat16", "float32"] = "bfloat16"
    implementations: tuple[str, ...] = ("triton", "mosaic_gpu")
    group_size: int = 64
    channel_block: int = 16
    repetitions: int = 7
    torch: str | None = None
    processes: int = min(16, os.cpu_count() or 1)
    minutes: float | None = None
    journal: Path = Path("runs/gpu/bench_training.jsonl")
    out: Path | None = None
    quick: bool = False


def main(config: GpuTrainingConfig) -> dict[str, Any]:
    """Times the steps that are not in the journal yet, and writes the report of all that are.

    Args:
      config: what is timed.

    Returns:
      The report; "complete" says whether everything is in it.

    Raises:
      ValueError: the device is no GPU, or there is no such network.
    """
    clock.require_gpu(config.quick)
    if config.quick:
        config = dataclasses.replace(
            config, repetitions=2, group_size=8, channel_block=1, implementations=("xla",)
        )
    chosen = networks_named(config.models, quick=config.quick)
    options = StepOptions(
        config.precision, config.group_size, config.channel_block, config.repetitions, config.quick
    )
    journal = Journal(config.journal, config.minutes, UNIT_SECONDS)
    waves = training_waves(config.implementations, chosen, bool(config.torch))
    keys = {unit: unit_key(options, unit) for wave in waves for unit in wave}
    complete = False
    try:
        for wave in waves:
            missing = [unit for unit in wave if not journal.has(keys[unit])]
            seconds = min(AHEAD_SECONDS, journal.seconds_left() - RESERVE)
            compile_ahead(options, missing, journal, config.processes, seconds)
            for unit in missing:
                _run(config, options, journal, keys, unit)
        complete = True
    except TimeUp as name:
        print(f"time is up before {name}; the same command continues", file=sys.stderr)
    finally:
        report = _report(config, journal, keys, complete)
        if report["rows"] and (config.out or not config.quick):
            results.write(report, config.out or results.RESULTS / "bench_training_gpu.json")
    if report["rows"]:
        print(f"<!-- table:bench_training_gpu -->\n{gpu_training.table(report)}<!-- /table -->")
    return report


def _run(
    config: GpuTrainingConfig,
    options: StepOptions,
    journal: Journal,
    keys: dict[Unit, str],
    unit: Unit,
) -> None:
    """Times one step and prints its row."""
    if unit.execution == TORCH:
        assert config.torch
        dense = journal.result(keys[Unit(unit.network, "dense")])
        measure = functools.partial(measure_torch_steps, options, unit, config.torch, dense)
    else:
        execution = "masked" if unit.sparsity else "dense"
        masked_key = keys.get(dataclasses.replace(unit, execution=execution, implementation=""))
        masked = journal.result(masked_key) if masked_key else None
        masked_updates = masked["sketch"] if masked else None
        measure = functools.partial(measure_steps, options, unit, masked_updates, journal)
    group = ""
    if unit.implementation:
        group = f"{unit.implementation} {implementation_key(unit.implementation)}"
    result = journal.run(keys[unit], measure, reserve=0 if options.quick else RESERVE, group=group)
    if result:
        what = f"{unit.network.model} n{unit.network.batch_size} {unit.sparsity:.0%}"
        name = f"{unit.execution} {unit.implementation}".strip()
        print(f"{what} {name}: {result['step_ms_median']:.3f} ms", flush=True)
    jax.clear_caches()
    gc.collect()


def _report(
    config: GpuTrainingConfig, journal: Journal, keys: dict[Unit, str], complete: bool
) -> dict[str, Any]:
    rows = []
    for unit, key in keys.items():
        result = journal.result(key)
        if not result:
            continue
        network = dataclasses.asdict(unit.network)
        del network["sparsities"]
        dense = journal.result(keys[Unit(unit.network, "dense")])
        speed_up = dense["step_ms_median"] / result["step_ms_median"] if dense else None
        row = network | {
            "sparsity": unit.sparsity,
            "execution": unit.execution,
            "implementation": unit.implementation,
            "precision": config.precision,
            "data_format": _data_format(unit),
            "speed_up_over_dense": round(speed_up, 3) if speed_up else None,
        }
        rows.append(row | {name: value for name, value in result.items() if name != "sketch"})
    return {
        "rows": rows,
        **origin(),
        "config": results.settings(config),
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
        "complete": complete,
        "failed": {key: error for key in keys.values() if (error := journal.error(key))},
        "tiles": {name: implementation_key(name) for name in ("mosaic_gpu", "triton")},
    }


def _data_format(unit: Unit) -> str:
    if unit.execution == TORCH:
        return "channels_last"
    return "CHWN" if unit.implementation else "NHWC"


def run(config: GpuTrainingConfig) -> int:
    """Runs the command and returns its exit status, see `command.exit_status`."""
    return command.exit_status(lambda: main(config))


def cli(arguments: Sequence[str]) -> int:
    """Runs the command.

    Args:
      arguments: without the program's name.

    Returns:
      The exit status.
    """
    clock.record_convolutions()
    return run(command.parse(GpuTrainingConfig, "experiments.bench.training", __doc__, arguments))
