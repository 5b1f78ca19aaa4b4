"""Times whole networks at inference: block-sparse against dense in XLA and in PyTorch.

`python -m experiments.bench.inference` takes about 8 minutes on 2 CPU cores, `--seconds 4` half as
long, `--quick` one minute.

SUBP's claim is speed on CPUs. This times ResNets for ImageNet (224x224) under its 1x16 and 1x32
patterns at the paper's FLOPs, packed, in turn with the dense network in XLA (NHWC, CHWN, and NHWC
with a matrix product for each tap at 7x7 pixels) and, with `--torch PATH_TO_PYTHON`, in PyTorch
(eager and frozen, see `torch_baseline/`); at batch 1 and 8, on 1 and 2 threads. The weights are
random, since only the speed counts, but the logits must agree before anything is timed. Batch norm,
shortcut and ReLU run inside the block-sparse kernels; XLA fuses them, and PyTorch's frozen form
folds what it can.
"""

import contextlib
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax

from experiments.bench import command
from experiments.bench.inference_times import PATTERNS, measure_network
from experiments.bench.torch_baseline.process import torch_processes
from experiments.measuring.environment import device, origin
from experiments.measuring.memory import steady_memory
from experiments.reporting import markdown, results
from experiments.reporting.reports import inference as report_tables


@dataclasses.dataclass(frozen=True)
class InferenceConfig:
    """What is timed.

    Attributes:
      models: resnet18, resnet34, resnet50_v1_5.
      blocks: N of the 1xN patterns.
      batches: images at once.
      threads: cores to run on; each number has a process of its own.
      implementation: of the block-sparse conv; None picks.
      image_size: pixels.
      width: of the networks.
      seconds: time for each network and batch, after compilation.
      torch: path of a Python that has PyTorch.
      out: JSON file; None is experiments/results/bench_inference_cpu.json.
      quick: one narrow network on small images and few repetitions; writes a file only if `out` is
        given.
    """

    models: tuple[str, ...] = ("resnet18", "resnet50_v1_5")
    blocks: tuple[int, ...] = (16, 32)
    batches: tuple[int, ...] = (1, 8)
    threads: tuple[int, ...] = (1, 2)
    implementation: str | None = None
    image_size: int = 224
    width: float = 1
    seconds: float = 10.0
    torch: str | None = None
    out: str | None = None
    quick: bool = False


def main(config: InferenceConfig) -> dict[str, Any]:
    """Times the networks, prints a table and writes the JSON file.

    Args:
      config: what is timed.

    Returns:
      The report.

    Raises:
      ValueError: an unknown network, more threads than cores, or no PyTorch there.
      AssertionError: two executions of one network disagree.

    Reference: Xiang et al., "SUBP", NeurIPS 2023 (patterns and FLOPs).
    """
    jax.config.update("jax_platforms", "cpu")
    available = len(os.sched_getaffinity(0))
    if unknown := set(config.models) - set(PATTERNS):
        raise ValueError(
            f"models: expected some of {', '.join(PATTERNS)}, got {', '.join(sorted(unknown))}"
        )
    if config.quick:
        config = dataclasses.replace(
            config,
            models=config.models[:1],
            blocks=config.blocks[:1],
            batches=config.batches[:1],
            threads=(available,),
            image_size=64,
            width=0.25,
            seconds=0.1,
        )
    if not 1 <= min(config.threads) <= max(config.threads) <= available:
        raise ValueError(
            f"threads: expected 1 to {available}, the cores that this process may use, got "
            f"{config.threads}"
        )
    if config.threads == (available,):
        report = _report(config)
    else:
        reports = [_report_on(count, config) for count in config.threads]
        rows = [row for report in reports for row in report["rows"]]
        report = reports[0] | {
            "device": device(),
            "config": results.settings(config),
            "rows": rows,
        }
    markdown.show(report_tables.table(report))
    if config.out or not config.quick:
        results.write(report, config.out or results.RESULTS / "bench_inference_cpu.json")
    return report


def _report_on(count: int, config: InferenceConfig) -> dict[str, Any]:
    """Measures in a process that may use only `count` cores.

    XLA sizes its thread pool once, at the start, by the cores that it may use.
    """
    flags = []
    fields = dataclasses.asdict(dataclasses.replace(config, threads=(count,), out=None))
    for name, value in fields.items():
        if value is not None and name != "quick":
            values = value if isinstance(value, tuple) else (value,)
            flags += [f"--{name.replace('_', '-')}", *map(str, values)]
    with tempfile.TemporaryDirectory() as folder, cores(count):
        out = Path(folder) / "report.json"
        program = [sys.executable, "-m", "experiments.bench.inference"]
        subprocess.run([*program, *flags, "--out", str(out)], check=True, stdout=subprocess.DEVNULL)
        return json.loads(out.read_text())


@contextlib.contextmanager
def cores(count: int) -> Iterator[None]:
    """Lets this thread, and the processes that it starts, use only so many cores for a while.

    Args:
      count: of the cores that it may use now.

    Reference: sched_setaffinity(2).
    """
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, sorted(before)[:count])
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def _report(config: InferenceConfig) -> dict[str, Any]:
    """Measures everything on the cores of this process."""
    steady_memory()
    with contextlib.ExitStack() as stack:
        torch = torch_processes(stack, config.torch)
        report = origin()
        if torch:
            report["versions"]["torch"] = torch["active"].version
        report["config"] = results.settings(config)
        report["rows"] = []
        for name in config.models:
            rows = measure_network(
                name,
                width=config.width,
                image_size=config.image_size,
                batches=config.batches,
                blocks=config.blocks,
                implementation=config.implementation,
                seconds=config.seconds,
                torch=torch,
            )
            report["rows"] += [row | {"threads": config.threads[0]} for row in rows]
    return report


def cli(arguments: Sequence[str]) -> int:
    """Runs the command.

    Args:
      arguments: without the program's name.

    Returns:
      The exit status.
    """
    return command.run(InferenceConfig, main, "experiments.bench.inference", __doc__, arguments)


if __name__ == "__main__":
    raise SystemExit(cli(sys.argv[1:]))
