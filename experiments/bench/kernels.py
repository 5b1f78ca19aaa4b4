"""Times the convolutions: `python -m experiments.bench.kernels --device cpu` (about 10 minutes on 2
CPU cores; `--quick` seconds).

The conv layers of VGG-19 and of ResNet-32 (width 2) on 32x32 images under HRBP's blocks, forward
and forward + both gradients: every implementation (what `implementation=None` picks is one of
them), masked-dense, and dense in five forms (XLA's convolution in NHWC, CHWN and NCHW; a matrix
product per tap in NHWC and CHWN), in turn. The fastest dense one is the baseline; XLA's convolution
in NHWC or NCHW, what a user would have, is summed up too. `--torch PATH_TO_PYTHON` adds PyTorch's
dense convolution (see torch_baseline.py), `--formulations` each formulation of the XLA path. Each
must first agree with the masked dense convolution, the dense ones with each other. Losing rows are
reported too. `--device gpu` hands over to bench_gpu.py, which has options of its own (`--device gpu
--help`).
"""

import contextlib
import dataclasses
import functools
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from rich.console import Console
from rich.progress import track
from rich.table import Table

from experiments.bench import shapes
from experiments.bench.environment import commit, device, versions
from experiments.bench.gpu import clock as gpu_clock
from experiments.bench.gpu import kernels as bench_gpu
from experiments.bench.memory import steady_memory
from experiments.bench.programs import training_programs
from experiments.bench.summary import summary
from experiments.bench.timing import median_iqr, time_in_turn, time_record, timed
from experiments.bench.torch_process import POLICIES, TorchProcess
from pallas_kernels.block_sparse_conv import (
    ConvSpec,
    available_implementations,
    choose_implementation,
    xla,
)
from pallas_kernels.block_sparse_conv import cpu_times as tiles
from pallas_kernels.dense_conv import choose_formulation, dense_conv

RESULTS = Path(__file__).parents[1] / "results"
TOLERANCE = 1e-5  # relative to the largest value
CHOSEN, MASKED = "chosen", "masked dense"
TORCH = {f"PyTorch dense, {policy}": policy for policy in POLICIES}
DENSE = {f"dense {layout}": layout for layout in ("NHWC", "CHWN", "NCHW")} | {
    f"dense taps {layout}": layout for layout in ("NHWC", "CHWN")
}
CONVOLUTIONS = (
    "dense NHWC",
    "dense NCHW",
)  # the layouts that people use; the faster one is a baseline of its own
FROM_NHWC = {"NHWC": (0, 1, 2, 3), "CHWN": (3, 1, 2, 0), "NCHW": (0, 3, 1, 2)}
TO_NHWC = {"NHWC": (0, 1, 2, 3), "CHWN": (3, 1, 2, 0), "NCHW": (0, 2, 3, 1)}


@dataclasses.dataclass(frozen=True)
class KernelConfig:
    """What is timed.

    Attributes:
      device: cpu; or gpu, for which bench_gpu.py takes over `sparsities`, `layers`, `out` and
        `quick`.
      sparsities: fractions of the weights removed.
      batch: images.
      group_size: filters in a group.
      kept_taps: taps of nine that a group keeps.
      seconds: time per row after compilation.
      layers: a part of the layers' names; empty is all.
      formulations: also each formulation of the XLA path.
      torch: path of a Python that has PyTorch, whose dense convolution is timed too (cpu only).
      out: JSON file; None is experiments/results/bench_kernels_DEVICE.json.
      quick: two small layers, a small batch, few repetitions and all formulations, written nowhere
        unless `out` is given.
    """

    device: Literal["cpu", "gpu"] = "cpu"
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
    """Checks and times every layer, prints the table and writes the JSON file.

    Args:
      config: what is timed.

    Returns:
      The report: device, versions, commit, a row for each layer, sparsity and mode, and their
      summary.

    Raises:
      ValueError: no such device, no layer of that name, or no PyTorch there.
      AssertionError: an implementation does not agree with the masked dense convolution.
    """
    if config.device == "gpu":
        if config.torch:
            raise ValueError(
                f"torch: PyTorch is timed on the CPU only, expected device 'cpu' beside it, got "
                f"{config.device!r}"
            )
        out = Path(config.out) if config.out else None
        size = {
            "sparsities": config.sparsities,
            "layers": config.layers,
            "out": out,
            "quick": config.quick,
        }
        return bench_gpu.main(bench_gpu.GpuConfig(**size))
    jax.config.update("jax_platforms", config.device)
    if jax.default_backend() != config.device:
        raise ValueError(
            f"device: expected {jax.default_backend()!r}, the device that jax runs on here, got "
            f"{config.device!r}"
        )
    if config.quick:
        layers = config.layers or "@8"
        config = dataclasses.replace(
            config, sparsities=(0.9,), batch=4, seconds=0.05, layers=layers, formulations=True
        )
    layers = [layer for layer in shapes.VGG19 + shapes.RESNET32 if config.layers in layer.name]
    if not layers:
        raise ValueError(
            f"layers: no layer's name contains {config.layers!r}; e.g. {shapes.VGG19[0].name!r}"
        )
    if config.quick:
        layers = layers[-2:]
    steady_memory()
    origin = {"device": device(), "versions": versions(), "commit": commit()}
    cases, rows = [(layer, sparsity) for layer in layers for sparsity in config.sparsities], []
    with contextlib.ExitStack() as stack:
        torch = {
            name: stack.enter_context(TorchProcess(config.torch, policy))
            for name, policy in TORCH.items()
            if config.torch
        }
        if torch:
            origin["versions"]["torch"] = next(iter(torch.values())).version
        for layer, sparsity in track(cases, "measuring", console=Console(stderr=True)):
            size = {
                "batch": config.batch,
                "group_size": config.group_size,
                "kept_taps": config.kept_taps,
            }
            spec = shapes.layer_spec(layer, sparsity=sparsity, **size)
            choice = choose_implementation(spec)
            about = {
                "layer": layer.name,
                "sparsity": sparsity,
                **_sizes(spec),
                "picked": {"implementation": choice.implementation},
            }
            about["picked"] |= choice.details
            rows += [about | result | origin for result in _measure(spec, config, torch)]
            jax.clear_caches()
    told = {
        name: value
        for name, value in dataclasses.asdict(config).items()
        if name not in ("torch", "out")
    }  # no machine's paths
    report = origin | {"config": told, "summary": summary(rows), "rows": rows}
    for table in (_table(rows), _summary_table(report["summary"])):
        Console(width=170).print(table)
    path = config.out or (None if config.quick else RESULTS / f"bench_kernels_{config.device}.json")
    if path:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_text(json.dumps(report, indent=1) + "\n")
    return report


def _sizes(spec: ConvSpec) -> dict[str, Any]:
    tile = {
        "groups": spec.groups,
        "group_size": spec.group_size,
        "kept": spec.kept,
        "kept_taps": spec.kept_taps,
    }
    shape = {
        "input": spec.in_shape,
        "output": spec.out_shape,
        "kernel": spec.kernel,
        "strides": spec.strides,
        "dtype": spec.dtype,
    }
    return {"shape": shape, "density": round(spec.density, 5), "tile": tile}


def _measure(
    spec: ConvSpec, config: KernelConfig, torch: dict[str, TorchProcess]
) -> list[dict[str, Any]]:
    """One row for each mode: times, the best implementation, and what the choice loses to it."""
    x, dy, values, *index = shapes.random_operands(spec)
    x, dy, values = (
        jnp.round(a) for a in (x, dy, values)
    )  # small whole numbers: their sums are exact in any order, in TF32 too
    sparse = {
        name: name
        for name, reason in available_implementations().items()
        if reason is None and name != "dense"
    }
    sparse = {
        name: wanted for name, wanted in sparse.items() if _serves(spec, wanted, x, values, *index)
    }
    if config.formulations:
        sparse |= {
            f"xla:{name}": f for name, f in xla.FORMULATIONS.items() if f.supports(spec) is None
        }
    kernel, mask = _dense_kernel(spec, values, *index)
    images = {
        layout: [a.transpose(TO_NHWC["CHWN"]).transpose(order) for a in (x, dy)]
        for layout, order in FROM_NHWC.items()
    }
    convs: dict[str, tuple[Callable[..., jax.Array], Sequence[jax.Array]]] = {
        name: (functools.partial(shapes.convolve, spec, wanted), (x, values, dy, *index))
        for name, wanted in sparse.items()
    }
    for name, layout in DENSE.items():
        convs[name] = (
            functools.partial(_dense, spec, name),
            (images[layout][0], kernel, images[layout][1]),
        )
    fast = (
        "dense taps NHWC"
        if choose_formulation(kernel.shape, spec.out_height * spec.out_width, "NHWC") == "taps"
        else "dense NHWC"
    )
    nhwc = images["NHWC"]
    convs[MASKED] = (
        lambda x, k, mask: _dense(spec, fast, x, jnp.where(mask, k, 0)),
        (nhwc[0], kernel, nhwc[1], mask),
    )
    programs = {name: training_programs(conv) for name, (conv, _) in convs.items()}
    arrays = {
        name: np.asarray(a) for name, a in (("x", nhwc[0]), ("dy", nhwc[1]), ("kernel", kernel))
    }
    theirs = {
        name: process.load("conv", arrays, strides=spec.strides, padding=spec.padding)
        for name, process in torch.items()
    }

    rows = []
    for mode in tiles.MODES:
        calls = {
            name: functools.partial(programs[name][mode], *operands)
            for name, (_, operands) in convs.items()
        }
        results = {name: [np.asarray(a) for a in call()] for name, call in calls.items()}
        results |= {name: process.results(mode) for name, process in torch.items()}
        _check(spec, results, index)
        clocks = {name: timed(call) for name, call in calls.items()} | {
            name: theirs[name][mode] for name in torch
        }
        times = time_in_turn(clocks, seconds=config.seconds, patience=config.seconds)
        times[CHOSEN] = times[
            choose_implementation(
                dataclasses.replace(spec, gradients=tiles.MODES[mode])
            ).implementation
        ]
        median = {name: median_iqr(t)[0] or 0.0 for name, t in times.items()}
        best, dense = min(sparse, key=median.__getitem__), min(DENSE, key=median.__getitem__)
        row = {
            "mode": mode,
            "ms": {name: time_record(t) for name, t in times.items()},
            "best": best,
            "regret": round(median[CHOSEN] / median[best] - 1, 3),
            "best_dense": dense,
            "speed_up_over_dense": round(median[dense] / median[CHOSEN], 3),
            "speed_up_over_convolution": round(
                min(median[name] for name in CONVOLUTIONS) / median[CHOSEN], 3
            ),
            "speed_up_over_masked": round(median[MASKED] / median[CHOSEN], 3),
        }
        rows.append(
            row
            | (
                {
                    "speed_up_over_torch": round(
                        min(median[name] for name in torch) / median[CHOSEN], 3
                    )
                }
                if torch
                else {}
            )
        )
    return rows


def _serves(spec: ConvSpec, name: str, *operands: jax.Array) -> bool:
    """Whether an implementation takes the convolution; one that does not is left out of its rows."""
    try:
        jax.eval_shape(functools.partial(shapes.convolve, spec, name), *operands)
    except NotImplementedError:
        return False
    return True


def _dense(spec: ConvSpec, name: str, x: jax.Array, kernel: jax.Array) -> jax.Array:
    formulation = "taps" if "taps" in name else "xla"
    return dense_conv(
        x,
        kernel,
        strides=spec.strides,
        padding=spec.padding,
        data_format=DENSE[name],
        formulation=formulation,
    )


def _positions(
    spec: ConvSpec, filters: jax.Array, channels: jax.Array, taps: jax.Array
) -> tuple[np.ndarray, ...]:
    """Where the packed values stand in a kernel `[kh, kw, cin, cout]`."""
    taps, channels, filters = (
        np.asarray(taps)[:, None, :, None],
        np.asarray(channels)[:, :, None, None],
        np.asarray(filters)[:, None, None],
    )
    return taps // spec.kernel[1], taps % spec.kernel[1], channels, filters


def _dense_kernel(
    spec: ConvSpec, values: jax.Array, *index: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """The packed values in a dense kernel that is random elsewhere, and the mask."""
    shape, where = (*spec.kernel, spec.cin, spec.cout), _positions(spec, *index)
    kernel = np.round(np.random.default_rng(1).standard_normal(shape)).astype(np.float32)
    mask = np.zeros(shape, bool)
    kernel[where], mask[where] = np.asarray(values), True
    return jnp.asarray(kernel), jnp.asarray(mask)


def _check(spec: ConvSpec, results: dict[str, list[np.ndarray]], index: list[jax.Array]) -> None:
    """The output and both gradients: every sparse implementation against masked dense, every dense
    one against dense NHWC.
    """
    positions = _positions(spec, *index)
    for name, result in results.items():
        kept = name not in (MASKED, *TORCH, *DENSE)
        reference = MASKED if kept else "dense NHWC"
        if name in (MASKED, reference):
            continue
        layout = "CHWN" if kept else DENSE.get(name, "NHWC")
        for i, what in enumerate(("output", "input gradient", "weight gradient")[: len(result)]):
            ours = result[i] if i == 2 else result[i].transpose(TO_NHWC[layout])
            wanted = results[reference][i][positions] if kept and i == 2 else results[reference][i]
            error = np.abs(ours - wanted).max() / np.abs(wanted).max()
            if not error <= TOLERANCE:
                raise AssertionError(
                    f"{name}: the {what} differs from {reference} by {error:.2e} of its largest "
                    f"value, at {spec}"
                )


def _table(rows: list[dict[str, Any]]) -> Table:
    table = Table(
        title="block-sparse convolution, median ms (times faster than the fastest dense)",
        caption=f"{rows[0]['device']}",
    )
    for column in ("layer", "sparsity", "mode"):
        table.add_column(column)
    for column in ("fastest dense", "PyTorch dense", MASKED, CHOSEN, "best", "regret"):
        table.add_column(column, justify="right")
    for row in rows:
        ms = {name: f"{t['median']:.2f}" for name, t in row["ms"].items()}
        dense = f"{row['best_dense'].removeprefix('dense ')} {ms[row['best_dense']]}"
        torch = min((ms[name] for name in TORCH if name in ms), key=float, default="-")
        chosen = f"{ms[CHOSEN]} ({row['speed_up_over_dense']:.1f}x)"
        best = f"{row['best']} {ms[row['best']]}"
        about = (row["layer"], f"{row['sparsity']:.0%}", row["mode"])
        table.add_row(*about, dense, torch, ms[MASKED], chosen, best, f"{row['regret']:+.1%}")
    return table


def _summary_table(lines: list[dict[str, Any]]) -> Table:
    table = Table(title="over all shapes")
    for column in ("against", "sparsity", "mode", "geometric mean", "worst", "best", "slower"):
        table.add_column(column)
    for line in lines:
        ends = [f"{line[end]['speed_up']:.2f}x {line[end]['layer']}" for end in ("worst", "best")]
        slower = f"{len(line['slower'])} of {line['shapes']}"
        table.add_row(
            line["against"],
            f"{line['sparsity']:.0%}",
            line["mode"],
            f"{line['geometric_mean']:.2f}x",
            *ends,
            slower,
        )
    return table


def cli(arguments: Sequence[str]) -> int:
    """The command.

    Args:
      arguments: without the program's name.

    Returns:
      The exit status.
    """
    if gpu_clock.asks_for_gpu(arguments):
        return bench_gpu.run(
            tyro.cli(
                bench_gpu.GpuConfig, prog="python -m experiments.bench.kernels", args=arguments
            )
        )
    try:
        main(tyro.cli(KernelConfig, prog="python -m experiments.bench.kernels", args=arguments))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(cli(sys.argv[1:]))
