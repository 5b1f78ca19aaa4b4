"""Times single convolutions: block-sparse against dense, masked-dense and PyTorch.

`python -m experiments.bench.kernels` takes about 10 minutes on 2 CPU cores, `--quick` seconds. It
times the conv layers of VGG-19 and of ResNet-32 (width 2) on 32x32 images under HRBP's blocks,
forward and forward with both gradients, in turn:

* every block-sparse implementation; what `implementation=None` picks is one of them;
* masked dense;
* dense in five forms: XLA's convolution in NHWC, CHWN and NCHW, and a matrix product for each tap
  in NHWC and CHWN. The fastest is the baseline. XLA's convolution in NHWC or NCHW, which most
  people have, is a second one;
* with `--torch PATH_TO_PYTHON`, PyTorch's dense convolution (see `torch_baseline/`);
* with `--formulations`, each formulation of the XLA implementation.

Nothing is timed before all of them agree. Rows that lose are reported too. `--device gpu` measures
a GPU instead and has options of its own: see `--device gpu --help`.
"""

import contextlib
import dataclasses
import sys
from collections.abc import Sequence
from typing import Any, Literal

import jax
from rich.console import Console
from rich.progress import track

from experiments.bench import command, shapes
from experiments.bench.gpu import kernels as gpu_kernels
from experiments.bench.layer_times import measure_layer
from experiments.bench.summary import summary
from experiments.bench.torch_baseline.process import torch_processes
from experiments.measuring.environment import origin
from experiments.measuring.memory import steady_memory
from experiments.reporting import markdown, results
from experiments.reporting.reports import kernels as report_tables
from pallas_kernels.block_sparse_conv import ConvSpec, choose_implementation


@dataclasses.dataclass(frozen=True)
class KernelConfig:
    """What is timed.

    Attributes:
      device: cpu.
      sparsities: fractions of the weights removed.
      batch: images.
      group_size: filters in a group.
      kept_taps: of nine taps, those that a group keeps.
      seconds: time for each row, after compilation.
      layers: a part of the layers' names; empty for all.
      formulations: also time each formulation of the XLA implementation.
      torch: path of a Python that has PyTorch, whose dense convolution is timed too.
      out: JSON file; None is experiments/results/bench_kernels_cpu.json.
      quick: two small layers, a small batch, few repetitions and all formulations; writes a file
        only if `out` is given.
    """

    device: Literal["cpu"] = "cpu"
    sparsities: tuple[float, ...] = (0.8, 0.9, 0.95)
    batch: int = 128
    group_size: int = 32
    kept_taps: int = 3
    seconds: float = 1.0
    layers: str = ""
    formulations: bool = False
    torch: str | None = None
    out: str | None = None
    quick: bool = False


def main(config: KernelConfig) -> dict[str, Any]:
    """Checks and times every layer, prints the tables and writes the JSON file.

    Args:
      config: what is timed.

    Returns:
      The report: device, versions, commit, a row for each layer, sparsity and mode, and their
      summary.

    Raises:
      ValueError: no layer of that name, an impossible size or sparsity, JAX runs on another device,
        or no PyTorch there.
      AssertionError: an implementation does not agree with the masked dense convolution.
    """
    jax.config.update("jax_platforms", config.device)
    if jax.default_backend() != config.device:
        raise ValueError(
            f"device: expected {jax.default_backend()!r}, the device that JAX runs on here, got "
            f"{config.device!r}"
        )
    if config.quick:
        config = dataclasses.replace(
            config,
            sparsities=(0.9,),
            batch=4,
            seconds=0.05,
            layers=config.layers or "@8",
            formulations=True,
        )
    layers = [layer for layer in shapes.VGG19 + shapes.RESNET32 if config.layers in layer.name]
    if not layers:
        raise ValueError(
            f"layers: no layer's name contains {config.layers!r}; e.g. {shapes.RESNET32[0].name!r}"
        )
    if config.quick:
        layers = layers[-2:]
    specs = {  # of all of them before the first is timed, since a bad size stops the command
        (layer.name, sparsity): _spec(config, layer, sparsity)
        for layer in layers
        for sparsity in config.sparsities
    }
    steady_memory()
    with contextlib.ExitStack() as stack:
        torch = torch_processes(stack, config.torch)
        about = origin()
        if torch:
            about["versions"]["torch"] = torch["active"].version
        rows = []
        cases = track(specs.items(), "measuring", len(specs), console=Console(stderr=True))
        for (name, sparsity), spec in cases:
            layer = {"layer": name, "sparsity": sparsity}
            rows += [layer | row | about for row in _layer_rows(config, spec, torch)]
            jax.clear_caches()
    report = about | {"config": results.settings(config), "summary": summary(rows), "rows": rows}
    markdown.show(report_tables.table(report))
    if config.out or not config.quick:
        results.write(report, config.out or results.RESULTS / "bench_kernels_cpu.json")
    return report


def _spec(config: KernelConfig, layer: shapes.Layer, sparsity: float) -> ConvSpec:
    return shapes.layer_spec(
        layer,
        sparsity=sparsity,
        batch=config.batch,
        group_size=config.group_size,
        kept_taps=config.kept_taps,
    )


def _layer_rows(
    config: KernelConfig, spec: ConvSpec, torch: dict[str, Any]
) -> list[dict[str, Any]]:
    choice = choose_implementation(spec)
    about = {
        **shapes.describe(spec),
        "picked": {"implementation": choice.implementation, **choice.details},
    }
    rows = measure_layer(
        spec, seconds=config.seconds, formulations=config.formulations, torch=torch
    )
    return [about | row for row in rows]


def cli(arguments: Sequence[str]) -> int:
    """Runs the command.

    Args:
      arguments: without the program's name.

    Returns:
      The exit status.
    """
    if command.asks_for_gpu(arguments):
        return gpu_kernels.cli(arguments)
    return command.run(KernelConfig, main, "experiments.bench.kernels", __doc__, arguments)


if __name__ == "__main__":
    raise SystemExit(cli(sys.argv[1:]))
