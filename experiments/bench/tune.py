"""`python -m experiments.bench.tune`: measures the XLA formulations and the native kernels here,
and rewrites the table that picks.

`--device gpu` times the tiles of the GPU kernels instead (tune_gpu.py; its options: `--device gpu
--help`).
"""

import dataclasses
import functools
import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import jax
import tyro
from rich.progress import track

from experiments.bench import shapes
from experiments.bench.environment import tuned_on
from experiments.bench.gpu import clock as gpu_clock
from experiments.bench.gpu import tune as tune_gpu
from experiments.bench.gpu.journal import exit_status
from experiments.bench.memory import steady_memory
from experiments.bench.programs import training_programs
from experiments.bench.timing import time_in_turn, timed
from pallas_kernels.block_sparse_conv import ConvSpec
from pallas_kernels.block_sparse_conv.cpu import launch as cpu
from pallas_kernels.block_sparse_conv.xla import kernels as xla
from pallas_kernels.block_sparse_conv.xla import tiles


@dataclasses.dataclass(frozen=True)
class Config:
    """About 15 minutes on two quiet cores at 0.3 seconds.

    Attributes:
      seconds: time per shape and mode, after compilation.
      only: a part of the name of the layers to measure again; the other entries of the table stay.
        Empty: all.
      table: the file to write.
      device: cpu; for gpu see tune_gpu.py.
    """

    seconds: float = 0.8
    only: str = ""
    table: Path = tiles.TABLE
    device: Literal["cpu"] = "cpu"


def cases() -> dict[str, ConvSpec]:
    """The tuned convolutions by name: the benchmark's, and others around them.

    Returns:
      Static sizes by name.

    Example:
      >>> len(cases()) > 60
      True
    """
    found = {}

    def add(
        layer: shapes.Layer,
        sparsity: float,
        batch: int,
        group_size: int = 32,
        kept_taps: int | None = None,
    ) -> None:
        spec = shapes.layer_spec(
            layer, sparsity=sparsity, batch=batch, group_size=group_size, kept_taps=kept_taps
        )
        found[f"{layer.name} {sparsity:.0%} n{batch} {'x'.join(map(str, spec.packed_shape))}"] = (
            spec
        )

    for sparsity in (0.8, 0.9, 0.95):
        for layer in shapes.VGG19 + shapes.RESNET32:
            add(layer, sparsity, 128)
    for layer in shapes.OTHERS:
        for sparsity in (0.5, 0.9) if layer.kernel == 1 else (0.8, 0.9):
            add(layer, sparsity, 64 if layer.name.startswith("digits") else 16)
    for layer in (shapes.VGG19[2], shapes.VGG19[4], shapes.VGG19[6], shapes.RESNET32[2]):
        add(layer, 0.5, 128)
        add(layer, 0.9, 16)
        add(layer, 0.9, 1)
        add(layer, 0.9, 64, 16, 9)
        add(layer, 0.9, 64, 64, 9)
        add(layer, 0.7, 64, 16)
    for layer in shapes.INFERENCE:
        for batch, group_size in ((1, 16), (1, 32), (8, 16)):
            add(
                layer, 0.77, batch, group_size, layer.kernel**2
            )  # as SUBP's ResNet-50 of 1.0G multiply-adds
    return found


def measure_case(spec: ConvSpec, seconds: float) -> dict[str, dict[str, float]]:
    """The median time of each formulation and of the native kernels, alone and with both gradients,
    in alternation.

    Args:
      spec: the static sizes.
      seconds: time per mode, about.

    Returns:
      `{mode: {formulation: milliseconds}}`.

    Example:
      >>> spec = ConvSpec(cin=2, height=3, width=3, batch=1, kernel=(1, 1), cout=2, groups=1, kept=1, kept_taps=1, group_size=2)
      >>> list(measure_case(spec, 0.0))
      ['forward', 'forward + gradients']
    """
    x, dy, values, *index = shapes.random_operands(spec)
    calls: dict[str, dict[str, Callable]] = {mode: {} for mode in tiles.MODES}
    for name, formulation in (xla.FORMULATIONS | {tiles.NATIVE: cpu.IMPLEMENTATION}).items():
        if formulation.supports(spec) is None:
            for mode, program in training_programs(
                functools.partial(shapes.convolve, spec, formulation)
            ).items():
                calls[mode][name] = functools.partial(program, x, values, dy, *index)
    times = {
        mode: time_in_turn(
            {name: timed(call) for name, call in by_name.items()},
            rounds=3,
            seconds=seconds,
            patience=seconds,
        )
        for mode, by_name in calls.items()
    }
    return {
        mode: {name: round(statistics.median(t), 4) for name, t in by_name.items()}
        for mode, by_name in times.items()
    }


def main(config: Config) -> None:
    """Measures and writes the table.

    Args:
      config: what to measure.
    """
    steady_memory()
    old = (
        {entry["name"]: entry for entry in json.loads(config.table.read_text())["entries"]}
        if config.only
        else {}
    )
    todo = {name: spec for name, spec in cases().items() if config.only in name}
    for name, spec in track(todo.items(), "tuning", total=len(todo)):
        old[name] = {
            "name": name,
            "features": tiles.features(spec),
            "milliseconds": measure_case(spec, config.seconds),
        }
        jax.clear_caches()
    rows = ",\n".join(json.dumps(entry) for entry in old.values())
    config.table.write_text(
        f'{{"environment": {json.dumps(tuned_on())},\n"entries": [\n{rows}\n]}}\n'
    )


if __name__ == "__main__":
    if not gpu_clock.asks_for_gpu(sys.argv[1:]):
        main(tyro.cli(Config))
    else:
        options = tyro.cli(tune_gpu.Config)
        raise SystemExit(exit_status(lambda: {"complete": tune_gpu.main(options), "failed": []}))
