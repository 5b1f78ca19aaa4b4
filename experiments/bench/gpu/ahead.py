"""Compiles training steps ahead, many at once, each in a process of its own.

What a process compiles it leaves in JAX's persistent compilation cache, where the process that
times the steps finds it. Tracing and compiling take most of a benchmark's time and one core for
each step; the timing needs the GPU alone. A process also compares the convolutions of its step with
float64, so that this is done before anything is timed.

Dense convolutions are left to the process that times: XLA picks their algorithms by timing them,
which wants a quiet GPU.
"""

import dataclasses
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import jax

from experiments.bench.gpu.fallback import Fallback
from experiments.bench.gpu.journal import Journal
from experiments.bench.gpu.step_check import sketch
from experiments.bench.gpu.step_setup import STEP, set_up
from experiments.bench.gpu.step_times import check_layers
from experiments.bench.gpu.training_units import Network, StepOptions, Unit
from experiments.measuring.environment import ROOT
from experiments.training.execution import masks_of, to_form

CRASHED = 128  # exit statuses of signals, as a shell counts them
LOOK_SECONDS = 0.2


def compile_ahead(
    options: StepOptions,
    units: list[Unit],
    journal: Journal,
    processes: int,
    seconds: float,
) -> None:
    """Compiles block-sparse steps into the compilation cache and checks their convolutions.

    A process that fails costs nothing but time: the step is compiled when it is timed, and fails
    there.

    Args:
      options: of all steps.
      units: the steps; those without an implementation are left out.
      journal: takes over the checks.
      processes: how many run at once; 0 compiles nothing ahead.
      seconds: after which the processes are ended.
    """
    waiting = [unit for unit in units if unit.implementation]
    if not processes or not waiting or seconds <= 0 or jax.config.jax_compilation_cache_dir is None:
        return
    print(f"compiling {len(waiting)} steps ahead, {processes} at once", flush=True)
    end = time.monotonic() + seconds
    running: list[tuple[subprocess.Popen[bytes], Path]] = []
    started = 0
    try:
        while (waiting or running) and time.monotonic() < end:
            while waiting and len(running) < processes:
                path = journal.path.with_suffix(f".ahead{started}.jsonl")
                path.unlink(missing_ok=True)
                running.append((_start(options, waiting.pop(0), path), path))
                started += 1
            for process, path in list(running):
                if process.poll() is not None:
                    running.remove((process, path))
                    _take_over(journal, path, process.returncode)
            time.sleep(LOOK_SECONDS)
    finally:
        for process, path in running:
            process.kill()
            process.wait()
            _take_over(journal, path, 0)


def _start(options: StepOptions, unit: Unit, path: Path) -> subprocess.Popen[bytes]:
    job = {"options": dataclasses.asdict(options), "unit": dataclasses.asdict(unit)}
    environment = os.environ | {
        "JAX_COMPILATION_CACHE_DIR": str(jax.config.jax_compilation_cache_dir),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "OPENBLAS_NUM_THREADS": "2",
        "PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH")))),
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
    }
    command = [sys.executable, "-m", "experiments.bench.gpu.ahead", str(path), json.dumps(job)]
    return subprocess.Popen(command, env=environment)


def _take_over(journal: Journal, path: Path, status: int) -> None:
    """Takes over what a process has checked; a check in which it crashed has failed."""
    if path.exists():
        other = Journal(path)
        if status < 0 or status >= CRASHED:
            other.mark_crashed()
        journal.adopt(other)
        path.unlink()


def compile_step(options: StepOptions, unit: Unit, journal: Journal) -> None:
    """Compiles one step, and whatever else its timing will run, and checks its convolutions.

    Args:
      options: of all steps.
      unit: the step.
      journal: keeps the checks.

    Raises:
      AssertionError: a convolution is wrong.
    """
    fallback = Fallback(unit.implementation)
    with fallback.registered() as name:
        trainer, state, images, labels = set_up(options, unit, name)
        trainer.lower(state, STEP, images, labels).compile()
        params = to_form("masked", state).params
        sketch(params, params, masks_of(state))
        check_layers(fallback, journal, f"{unit.execution}, {unit.implementation}")


def main(path: str, job: str) -> None:
    """What a process does.

    Args:
      path: of its journal.
      job: the options and the unit as JSON.
    """
    fields = json.loads(job)
    network = fields["unit"].pop("network")
    network["sparsities"] = tuple(network["sparsities"])
    unit = Unit(Network(**network), **fields["unit"])
    compile_step(StepOptions(**fields["options"]), unit, Journal(path))


if __name__ == "__main__":
    main(*sys.argv[1:])
