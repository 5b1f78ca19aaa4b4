"""Measures which implementation is the fastest on this CPU, and rewrites the table that picks it.

`python -m experiments.bench.tune` times the formulations of the XLA implementation and the native
kernels on every shape of `cases`; about 15 minutes on two quiet cores. `--kernels whole` times the
dense convolutions in CHWN instead, each pass alone; about 5 minutes. `--device gpu` times the
tiles of the GPU kernels instead and has options of its own: see `--device gpu --help`.
"""

import dataclasses
import functools
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
from rich.progress import track

from experiments.bench import command, shapes
from experiments.bench.gpu import tune as gpu_tune
from experiments.bench.programs import single_passes, training_programs
from experiments.measuring.environment import tuned_on
from experiments.measuring.memory import steady_memory
from experiments.measuring.timing import time_in_turn, timed
from pallas_kernels.block_sparse_conv import (
    PASSES,
    ConvSpec,
    cpu,
    cpu_times,
    whole_kernel,
    xla,
)

ROUNDS = 3


@dataclasses.dataclass(frozen=True)
class Config:
    """What is tuned.

    Attributes:
      device: cpu.
      kernels: packed for block-sparse convolutions, whole for dense ones.
      seconds: time for each shape and mode, after compilation.
      only: a part of the names of the shapes to measure again; the other entries of the table stay.
        Empty for all.
      table: the file to write; None: the library's.
    """

    device: Literal["cpu"] = "cpu"
    kernels: Literal["packed", "whole"] = "packed"
    seconds: float = 0.3
    only: str = ""
    table: Path | None = None


def main(config: Config) -> dict[str, Any]:
    """Measures and writes the table.

    Args:
      config: what to measure.

    Returns:
      "measured", the names of the shapes that were measured.

    Raises:
      ValueError: no shape has such a name; the table stays as it is.
    """
    is_whole = config.kernels == "whole"
    every, measure = (whole_cases(), measure_whole) if is_whole else (cases(), measure_case)
    path = config.table or (cpu_times.WHOLE if is_whole else cpu_times.TABLE)
    chosen = {name: spec for name, spec in every.items() if config.only in name}
    if not chosen:
        raise ValueError(f"only: no name contains {config.only!r}; e.g. {next(iter(every))!r}")
    steady_memory()
    entries = {}
    if config.only:
        table = json.loads(path.read_text())
        entries = {entry["name"]: entry for entry in table["entries"]}
    for name, spec in track(chosen.items(), "tuning", total=len(chosen)):
        entries[name] = {
            "name": name,
            "features": cpu_times.features(spec),
            "milliseconds": measure(spec, config.seconds),
        }
        jax.clear_caches()
    lines = ",\n".join(json.dumps(entry) for entry in entries.values())
    path.write_text(f'{{"environment": {json.dumps(tuned_on())},\n"entries": [\n{lines}\n]}}\n')
    return {"measured": list(chosen)}


def cases() -> dict[str, ConvSpec]:
    """Returns the tuned convolutions by name: the benchmark's, and others around them.

    Example:
      >>> len(cases()) > 60
      True
    """
    specs = {}

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
        packed_shape = "x".join(map(str, spec.packed_shape))
        specs[f"{layer.name} {sparsity:.0%} n{batch} {packed_shape}"] = spec

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
    for layer in shapes.INFERENCE:  # as SUBP's ResNet-50 of 1.0G multiply-adds
        for batch, group_size in ((1, 16), (1, 32), (8, 16)):
            add(layer, 0.77, batch, group_size, layer.kernel**2)
    return specs


def whole_cases() -> dict[str, ConvSpec]:
    """Returns the tuned dense convolutions by name.

    Example:
      >>> whole_cases()["vgg19 64@32 n128"].density
      1.0
    """
    layers = (*shapes.VGG19, *shapes.RESNET32, *shapes.OTHERS, *shapes.CNN_ON_DIGITS)
    specs = {}
    for layer in (layer for layer in layers if layer.kernel > 1):
        for batch in (1, 16, 128):
            spec = shapes.layer_spec(
                layer, sparsity=0, batch=batch, group_size=64, kept_taps=layer.kernel**2
            )
            specs[f"{layer.name} n{batch}"] = spec
    return specs


def measure_whole(spec: ConvSpec, seconds: float) -> dict[str, dict[str, float]]:
    """Times each pass of a dense convolution in CHWN, by each formulation in turn.

    Args:
      spec: the static sizes.
      seconds: time for each pass.

    Returns:
      Median milliseconds, `{pass: {formulation: milliseconds}}`.

    Example:
      >>> spec = ConvSpec(
      ...     cin=8, height=3, width=3, batch=1, kernel=(2, 2), cout=8, groups=1, kept=8,
      ...     kept_taps=4, group_size=8
      ... )
      >>> list(measure_whole(spec, 0.0))
      ['forward', 'input_gradient', 'weight_gradient']
    """
    x, dy, *_ = shapes.random_operands(spec)
    kernel = jax.random.normal(jax.random.key(0), spec.kernel_shape)
    calls: dict[str, dict[str, Callable[[], float]]] = {name: {} for name in PASSES}
    for name in (cpu_times.NATIVE, *whole_kernel.DENSE):
        conv = functools.partial(
            whole_kernel.whole_kernel_conv,
            implementation=whole_kernel.by_formulation(name),
            strides=spec.strides,
            padding=spec.padding,
            dilation=spec.dilation,
        )
        for pass_name, program in zip(PASSES, single_passes(conv).values(), strict=True):
            run = functools.partial(jax.jit(program), x, dy, kernel)
            calls[pass_name][name] = timed(run)
    return {pass_name: _medians(by_name, seconds) for pass_name, by_name in calls.items()}


def measure_case(spec: ConvSpec, seconds: float) -> dict[str, dict[str, float]]:
    """Times each formulation and the native kernels in turn, alone and with both gradients.

    Args:
      spec: the static sizes.
      seconds: time for each mode.

    Returns:
      Median milliseconds, `{mode: {formulation: milliseconds}}`.

    Example:
      >>> spec = ConvSpec(
      ...     cin=2, height=3, width=3, batch=1, kernel=(1, 1), cout=2, groups=1, kept=1,
      ...     kept_taps=1, group_size=2
      ... )
      >>> list(measure_case(spec, 0.0))
      ['forward', 'forward + gradients']
    """
    x, dy, values, *index = shapes.random_operands(spec)
    implementations = xla.FORMULATIONS | {cpu_times.NATIVE: cpu.IMPLEMENTATION}
    calls: dict[str, dict[str, Callable[[], float]]] = {mode: {} for mode in cpu_times.MODES}
    for name, implementation in implementations.items():
        if implementation.supports(spec) is None:
            conv = functools.partial(shapes.convolve, spec, implementation)
            for mode, program in training_programs(conv).items():
                calls[mode][name] = timed(functools.partial(program, x, values, dy, *index))
    return {mode: _medians(by_name, seconds) for mode, by_name in calls.items()}


def _medians(calls: dict[str, Callable[[], float]], seconds: float) -> dict[str, float]:
    times_ms = time_in_turn(calls, rounds=ROUNDS, seconds=seconds, patience=seconds)
    return {name: round(float(np.median(times)), 4) for name, times in times_ms.items()}


def cli(arguments: Sequence[str]) -> int:
    """Runs the command.

    Args:
      arguments: without the program's name.

    Returns:
      The exit status.
    """
    if command.asks_for_gpu(arguments):
        return gpu_tune.cli(arguments)
    return command.run(Config, main, "experiments.bench.tune", __doc__, arguments)


if __name__ == "__main__":
    raise SystemExit(cli(sys.argv[1:]))
