"""Times the convolutions: `python -m experiments.bench_kernels --device cpu` (about 10 minutes on 2 CPU cores; `--quick` seconds).

The conv layers of VGG-19 and of ResNet-32 (width 2) on 32x32 images under HRBP's blocks, forward and forward + both gradients: every
formulation of the XLA path, every other implementation, what `implementation=None` picks, masked-dense, and dense in NHWC and CHWN, in
turn in one process. Each must first agree with the masked dense convolution. Losing rows are reported too.
"""

import dataclasses
import functools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from jax import lax
from rich.console import Console
from rich.progress import track
from rich.table import Table

from experiments.environment import commit, device, versions
from experiments.timing import median_iqr
from pallas_kernels import measure, shapes
from pallas_kernels.block_sparse_conv import ConvSpec, available_implementations, choose_implementation, tiles, xla

RESULTS = Path(__file__).parent / "results"
PLATFORMS = {"cpu": "cpu", "gpu": "cuda"}
TOLERANCE = 1e-5  # relative to the largest value
CHOSEN, MASKED, DENSE = "chosen", "masked dense", ("dense NHWC", "dense CHWN")


@dataclasses.dataclass(frozen=True)
class KernelConfig:
    """What is timed.

    Attributes:
      device: cpu or gpu.
      sparsities: fractions of the weights removed.
      batch: images.
      group_size: filters in a group.
      kept_taps: taps of nine that a group keeps.
      seconds: time per row after compilation.
      layers: a part of the layers' names; empty is all.
      out: JSON file; None is experiments/results/bench_kernels_DEVICE.json.
      quick: two small layers, a small batch and few repetitions, written nowhere unless `out` is given.
    """

    device: Literal["cpu", "gpu"] = "cpu"
    sparsities: tuple[float, ...] = (0.8, 0.9, 0.95)
    batch: int = 128
    group_size: int = 32
    kept_taps: int = 3
    seconds: float = 1.0
    layers: str = ""
    out: str | None = None
    quick: bool = False


def main(config: KernelConfig) -> dict[str, Any]:
    """Checks and times every layer, prints the table and writes the JSON file.

    Args:
      config: what is timed.

    Returns:
      The report: device, versions, commit, and a row for each layer, sparsity and mode.

    Raises:
      ValueError: no such device, or no layer of that name.
      AssertionError: an implementation does not agree with the masked dense convolution.

    Reference: ours.
    """
    jax.config.update("jax_platforms", PLATFORMS[config.device])
    if jax.default_backend() != config.device:
        raise ValueError(f"device: expected {jax.default_backend()!r}, the device that jax runs on here, got {config.device!r}")
    if config.quick:
        config = dataclasses.replace(config, sparsities=(0.9,), batch=4, seconds=0.05, layers=config.layers or "@8")
    layers = [layer for layer in shapes.VGG19 + shapes.RESNET32 if config.layers in layer.name]
    if not layers:
        raise ValueError(f"layers: no layer's name contains {config.layers!r}; e.g. {shapes.VGG19[0].name!r}")
    if config.quick:
        layers = layers[-2:]
    measure.steady_memory()
    origin = {"device": device(), "versions": versions(), "commit": commit()}
    rows = []
    cases = [(layer, sparsity) for layer in layers for sparsity in config.sparsities]
    for layer, sparsity in track(cases, "measuring", console=Console(stderr=True)):
        size = {"batch": config.batch, "group_size": config.group_size, "kept_taps": config.kept_taps}
        spec = shapes.layer_spec(layer, sparsity=sparsity, **size)
        about = {"layer": layer.name, "sparsity": sparsity, **_sizes(spec), "picked": choose_implementation(spec).details}
        rows += [about | result | origin for result in _measure(spec, config)]
        jax.clear_caches()
    report = origin | {"config": dataclasses.asdict(config), "rows": rows}
    Console(width=150).print(_table(rows))
    path = config.out or (None if config.quick else RESULTS / f"bench_kernels_{config.device}.json")
    if path:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_text(json.dumps(report, indent=1) + "\n")
    return report


def _sizes(spec: ConvSpec) -> dict[str, Any]:
    tile = {"groups": spec.groups, "group_size": spec.group_size, "kept": spec.kept, "kept_taps": spec.kept_taps}
    shape = {"input": spec.in_shape, "output": spec.out_shape, "kernel": spec.kernel, "strides": spec.strides, "dtype": spec.dtype}
    return {"shape": shape, "density": round(spec.density, 5), "tile": tile}


def _measure(spec: ConvSpec, config: KernelConfig) -> list[dict[str, Any]]:
    """One row for each mode: times, the best formulation, and what the choice loses to it."""
    x, dy, values, *index = shapes.random_operands(spec)
    x, dy, values = (jnp.round(a) for a in (x, dy, values))  # small whole numbers: their sums are exact in any order, in TF32 too
    formulations = {f"xla:{name}": f for name, f in xla.FORMULATIONS.items() if f.supports(spec) is None}
    others = [name for name, reason in available_implementations().items() if reason is None and name not in ("xla", "dense")]
    sparse = formulations | {name: name for name in others} | {CHOSEN: None}
    kernel, mask = _dense_kernel(spec, values, *index)
    nhwc = [a.transpose(3, 1, 2, 0) for a in (x, dy)]
    convs: dict[str, tuple[Callable[..., jax.Array], Sequence[jax.Array]]] = {
        name: (functools.partial(shapes.convolve, spec, implementation), (x, values, dy, *index)) for name, implementation in sparse.items()
    }
    convs[MASKED] = (lambda x, k, mask: _dense(spec, "NHWC", x, jnp.where(mask, k, 0)), (nhwc[0], kernel, nhwc[1], mask))
    convs[DENSE[0]] = (functools.partial(_dense, spec, "NHWC"), (nhwc[0], kernel, nhwc[1]))
    convs[DENSE[1]] = (functools.partial(_dense, spec, "CHWN"), (x, kernel, dy))
    programs = {name: measure.programs(conv) for name, (conv, _) in convs.items()}

    rows = []
    for mode in tiles.MODES:
        calls = {name: functools.partial(programs[name][mode], *operands) for name, (_, operands) in convs.items()}
        _check(spec, {name: calls[name]() for name in (*sparse, MASKED)}, index)
        times = measure.alternate(calls, seconds=config.seconds)
        median = {name: median_iqr(t)[0] for name, t in times.items()}
        best = min(formulations, key=median.__getitem__)
        dense = min(median[name] for name in DENSE)
        rows.append({
            "mode": mode,
            "ms": {name: dict(zip(("median", "iqr"), median_iqr(t)), repetitions=len(t)) for name, t in times.items()},
            "best": best,
            "regret": round(median[CHOSEN] / median[best] - 1, 3),
            "speed_up_over_dense": round(dense / median[CHOSEN], 3),
            "speed_up_over_masked": round(median[MASKED] / median[CHOSEN], 3),
        })  # fmt: skip
    return rows


def _dense(spec: ConvSpec, layout: str, x: jax.Array, kernel: jax.Array) -> jax.Array:
    return lax.conv_general_dilated(x, kernel, spec.strides, spec.padding, dimension_numbers=(layout, "HWIO", layout))


def _positions(spec: ConvSpec, filters: jax.Array, channels: jax.Array, taps: jax.Array) -> tuple[np.ndarray, ...]:
    """Where the packed values stand in a kernel `[kh, kw, cin, cout]`."""
    taps, channels, filters = np.asarray(taps)[:, None, :, None], np.asarray(channels)[:, :, None, None], np.asarray(filters)[:, None, None]
    return taps // spec.kernel[1], taps % spec.kernel[1], channels, filters


def _dense_kernel(spec: ConvSpec, values: jax.Array, *index: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The packed values in a dense kernel that is random elsewhere, and the mask."""
    shape, where = (*spec.kernel, spec.cin, spec.cout), _positions(spec, *index)
    kernel = np.random.default_rng(1).standard_normal(shape).astype(np.float32)
    mask = np.zeros(shape, bool)
    kernel[where], mask[where] = np.asarray(values), True
    return jnp.asarray(kernel), jnp.asarray(mask)


def _check(spec: ConvSpec, results: dict[str, tuple[jax.Array, ...]], index: list[jax.Array]) -> None:
    """Every implementation against masked dense: the output and both gradients."""
    reference = [np.asarray(a) for a in results.pop(MASKED)]
    reference[:2] = [a.transpose(3, 1, 2, 0) for a in reference[:2]]
    reference[2:] = [a[_positions(spec, *index)] for a in reference[2:]]
    for name, result in results.items():
        for what, ours, wanted in zip(("output", "input gradient", "weight gradient"), result, reference):
            error = np.abs(np.asarray(ours) - wanted).max() / np.abs(wanted).max()
            if not error <= TOLERANCE:
                raise AssertionError(f"{name}: the {what} differs from masked dense by {error:.2e} of its largest value, at {spec}")


def _table(rows: list[dict[str, Any]]) -> Table:
    table = Table(title="block-sparse convolution, median ms (times faster than the better dense)", caption=f"{rows[0]['device']}")
    for column in ("layer", "sparsity", "mode"):
        table.add_column(column)
    for column in ("dense NHWC", "dense CHWN", MASKED, CHOSEN, "best formulation", "regret"):
        table.add_column(column, justify="right")
    for row in rows:
        ms = {name: t["median"] for name, t in row["ms"].items()}
        table.add_row(
            row["layer"], f"{row['sparsity']:.0%}", row["mode"], *(f"{ms[name]:.2f}" for name in (*DENSE, MASKED)),
            f"{ms[CHOSEN]:.2f} ({row['speed_up_over_dense']:.1f}x)", f"{row['best']} {ms[row['best']]:.2f}", f"{row['regret']:+.1%}",
        )  # fmt: skip
    return table


if __name__ == "__main__":
    main(tyro.cli(KernelConfig, prog="python -m experiments.bench_kernels"))
