"""Profiles training steps on a GPU: which kernels run in a step, and how long.

`python -m experiments.bench.gpu.profile`. The dense step and the packed one in each implementation,
of the networks whose steps are timed; each is a unit of the journal. The report groups the kernels
by category.
"""

import contextlib
import dataclasses
import functools
import gc
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import jax

from experiments.bench import command
from experiments.bench.gpu import clock
from experiments.bench.gpu.fallback import Fallback
from experiments.bench.gpu.journal import Journal, TimeUp
from experiments.bench.gpu.step_setup import STEP, set_up
from experiments.bench.gpu.trace_events import gpu_kernels
from experiments.bench.gpu.training_units import (
    StepOptions,
    Unit,
    networks_named,
    training_waves,
    unit_key,
)
from experiments.measuring.environment import origin
from experiments.measuring.timing import timed
from experiments.reporting import results
from experiments.reporting.reports import gpu_profile
from experiments.training.stepper import stepper

RESERVE = 60  # seconds that must be left for a unit
UNIT_SECONDS = 480  # after which a unit hangs
WARM_UP, TIMED, TRACED = 3, 20, 3  # steps


@dataclasses.dataclass(frozen=True)
class ProfileConfig:
    """What is profiled.

    Attributes:
      device: gpu.
      models: a part of the networks' names; empty for all.
      precision: bfloat16 or float32.
      implementations: of the block-sparse conv, the most important first.
      group_size: filters in a group.
      channel_block: runs of channels.
      minutes: after so many no unit begins; None: no limit.
      journal: JSON-lines file that is continued.
      out: JSON file; None is experiments/results/bench_profile_gpu.json.
      quick: profiles nothing: without a GPU there are no kernels to see.
    """

    device: Literal["gpu"] = "gpu"
    models: str = ""
    precision: Literal["bfloat16", "float32"] = "bfloat16"
    implementations: tuple[str, ...] = ("triton", "mosaic_gpu")
    group_size: int = 64
    channel_block: int = 16
    minutes: float | None = None
    journal: Path = Path("runs/gpu/bench_profile.jsonl")
    out: Path | None = None
    quick: bool = False


def main(config: ProfileConfig) -> dict[str, Any]:
    """Profiles the steps that are not in the journal yet, and writes the report of all that are.

    Args:
      config: what is profiled.

    Returns:
      The report; "complete" says whether everything is in it.

    Raises:
      ValueError: the device is no GPU, or there is no such network.
    """
    clock.require_gpu(config.quick)
    options = StepOptions(config.precision, config.group_size, config.channel_block, 1, False)
    networks = networks_named(config.models, quick=config.quick)
    waves = [] if config.quick else training_waves(config.implementations, networks)[:2]
    units = [unit for wave in waves for unit in wave if unit.execution in ("dense", "packed")]
    keys = {unit: f"profile {unit_key(options, unit)}" for unit in units}
    journal = Journal(config.journal, config.minutes, UNIT_SECONDS)
    complete = False
    try:
        for unit, key in keys.items():
            journal.run(key, functools.partial(profile_step, options, unit), reserve=RESERVE)
            jax.clear_caches()
            gc.collect()
        complete = True
    except TimeUp as name:
        print(f"time is up before {name}; the same command continues", file=sys.stderr)
    finally:
        report = _report(config, journal, keys, complete)
        if report["rows"]:
            results.write(report, config.out or results.RESULTS / "bench_profile_gpu.json")
    if report["rows"]:
        print(f"<!-- table:bench_profile_gpu -->\n{gpu_profile.table(report)}<!-- /table -->")
    return report


def profile_step(options: StepOptions, unit: Unit) -> dict[str, Any]:
    """Profiles one training step.

    Args:
      options: of all steps.
      unit: the step.

    Returns:
      "step_ms", the time of a step without the profiler, and what `gpu_kernels` reads.

    Raises:
      ValueError: the profiler saw no GPU kernel.
    """
    with _served(unit.implementation) as implementation:
        setup = set_up(options, unit, implementation)
        step = stepper(setup.trainer, setup.state, STEP, setup.images, setup.labels)
        several = functools.partial(_last, step)
        jax.block_until_ready(several(WARM_UP))
        step_ms = timed(functools.partial(several, TIMED))() / TIMED
        with tempfile.TemporaryDirectory() as folder:
            with jax.profiler.trace(folder, create_perfetto_trace=True):
                jax.block_until_ready(several(TRACED))
            return {"step_ms": step_ms, **gpu_kernels(Path(folder), TRACED)}


@contextlib.contextmanager
def _served(implementation: str) -> Iterator[str | None]:
    """The name under which an implementation serves every layer; None for a dense step."""
    if not implementation:
        yield None
        return
    with Fallback(implementation).registered() as name:
        yield name


def _last(step: Any, steps: int) -> Any:
    for _ in range(steps):
        output = step()
    return output


def _report(
    config: ProfileConfig, journal: Journal, keys: dict[Unit, str], complete: bool
) -> dict[str, Any]:
    rows = []
    for unit, key in keys.items():
        if result := journal.result(key):
            about = {
                "model": unit.network.model,
                "batch_size": unit.network.batch_size,
                "width": unit.network.width,
                "execution": unit.execution,
                "implementation": unit.implementation,
                "sparsity": unit.sparsity,
            }
            rows.append(about | result)
    return {
        "rows": rows,
        **origin(),
        "config": results.settings(config),
        "complete": complete,
        "failed": {key: error for key in keys.values() if (error := journal.error(key))},
    }


def cli(arguments: Sequence[str]) -> int:
    """Runs the command.

    Args:
      arguments: without the program's name.

    Returns:
      The exit status, see `command.exit_status`.
    """
    clock.record_convolutions()
    config = command.parse(ProfileConfig, "experiments.bench.gpu.profile", __doc__, arguments)
    return command.exit_status(lambda: main(config))


if __name__ == "__main__":
    raise SystemExit(cli(sys.argv[1:]))
