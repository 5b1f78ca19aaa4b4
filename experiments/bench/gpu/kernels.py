"""Checks and times the block-sparse convolutions on a GPU.

`python -m experiments.bench.kernels --device gpu`; with `--quick` a dry run of tiny shapes on any
device. Stages, in this order:

* gate: the GPU kernels against float64, in the arithmetic that is timed;
* headline: the layers that the project's goals name, at 90%;
* check: every implementation, dtype and pass against float64;
* ceilings: what the device can do at most;
* layers: all conv layers of ResNet-50, VGG-19 and ResNet-32 (width 2) at each sparsity, three
  passes, against cuDNN.

Every finished unit is one line of the journal. `--minutes 9` stops in time with exit status 75, and
the same command continues. A unit is measured again when its sources or its tuned tiles have
changed. However a call ends, it writes the report of what was measured so far.
"""

import dataclasses
import sys
from collections.abc import Sequence
from typing import Any

from experiments.bench import command
from experiments.bench.gpu import clock
from experiments.bench.gpu.journal import TimeUp
from experiments.bench.gpu.kernels_config import STAGES, GpuConfig
from experiments.bench.gpu.kernels_run import KernelsRun
from experiments.reporting import results
from experiments.reporting.reports import gpu_kernels


def main(config: GpuConfig) -> dict[str, Any]:
    """Runs the stages and writes the report of what was measured.

    Args:
      config: what is timed.

    Returns:
      The report; "complete" says whether everything is in it.

    Raises:
      ValueError: the device is no GPU, or there is no such stage or layer.
      AssertionError: an implementation is wrong; nothing is timed without `keep_going`.
    """
    clock.require_gpu(config.quick)
    if unknown := set(config.stages) - set(STAGES):
        raise ValueError(
            f"stages: expected some of {', '.join(STAGES)}, got {', '.join(sorted(unknown))}"
        )
    if config.quick:
        config = dataclasses.replace(config, sparsities=config.sparsities[:1], repetitions=2)
    run = KernelsRun(config)
    complete = False
    try:
        for stage in STAGES:
            if stage in config.stages:
                getattr(run, stage)()
        complete = True
    except TimeUp as unit:
        print(f"time is up before {unit}; the same command continues", file=sys.stderr)
    finally:
        report = run.report(complete)
        measured = report["rows"] or report["checks"] or report["ceilings"]
        if measured and (config.out or not config.quick):
            results.write(report, config.out or results.RESULTS / "bench_kernels_gpu.json")
    if report["rows"]:
        print(f"<!-- table:bench_kernels_gpu -->\n{gpu_kernels.table(report)}<!-- /table -->")
    return report


def run(config: GpuConfig) -> int:
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
    return run(command.parse(GpuConfig, "experiments.bench.kernels", __doc__, arguments))
