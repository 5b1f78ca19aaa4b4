"""Times what is around the convolutions, in (C, H, W, N) beside NHWC, and the grouping.

`python -m experiments.bench.parts` takes about 5 minutes on 2 CPU cores. It times batch norm, ReLU,
the residual add and the pools of the zoo, forward and with their gradient, at the sizes of VGG-19
and ResNet-32 (width 2) on 32x32 images and of both ends of ResNet-50 on 224x224 images, each pool
where a network has it; and the grouping of single layers and of a whole ResNet-50, with compilation
and without.
"""

import dataclasses
import functools
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn

import blocksparse_jax as bsj
from experiments.bench import command
from experiments.measuring.environment import origin
from experiments.measuring.memory import steady_memory
from experiments.measuring.timing import call_and_time, time_in_turn, time_record, timed
from experiments.models import create
from experiments.models.layers import Parts
from experiments.models.pools import max_pool
from experiments.reporting import markdown, results
from experiments.reporting.reports import parts as report_tables

EVERYWHERE = ("batch norm", "ReLU", "batch norm, ReLU", "batch norm, add, ReLU")
SIZES = {  # channels, pixels of a side, and the pool that the network has there
    "vgg19 64@32": (64, 32, "max pool 2x2"),
    "vgg19 256@8": (256, 8, "max pool 2x2"),
    "vgg19 512@4": (512, 4, "max pool 2x2"),
    "vgg19 512@2": (512, 2, "mean over the image"),
    "resnet32x2 32@32": (32, 32, None),
    "resnet32x2 128@8": (128, 8, "mean over the image"),
    "resnet50 64@112": (64, 112, "max pool 3x3/2"),
    "resnet50 2048@7": (2048, 7, "mean over the image"),
}
# Bytes of one layer's activations. Larger ones would time the allocator's page faults.
LARGEST = 100 << 20
FORMATS = ("CHWN", "NHWC")
FUSED = "norm_act"
"""The name of `bsj.norm_act` in CHWN, beside the formats in which flax's operations run."""

Operation = Callable[[jax.Array, jax.Array], jax.Array]


@dataclasses.dataclass(frozen=True)
class Config:
    """What is timed.

    Attributes:
      batch: images, fewer where an array would be larger than 100 MiB.
      seconds: time for each operation, size and mode, both formats together.
      sizes: how many of the eight sizes are timed.
      grouping: whether the grouping is timed.
      out: JSON file; None is experiments/results/bench_parts_cpu.json.
      quick: one size, a small batch, few repetitions and no grouping; writes a file only if `out`
        is given.
    """

    batch: int = 128
    seconds: float = 2.0
    sizes: int = len(SIZES)
    grouping: bool = True
    out: str | None = None
    quick: bool = False


def main(config: Config) -> dict[str, Any]:
    """Times the operations and the grouping, prints the tables and writes the JSON file.

    Args:
      config: what is timed.

    Returns:
      The report: "rows", "grouping", device, versions and commit.
    """
    if config.quick:
        config = dataclasses.replace(config, batch=4, seconds=0.01, sizes=1, grouping=False)
    steady_memory()
    report = origin() | {"config": results.settings(config), "rows": time_operations(config)}
    report["grouping"] = time_grouping() if config.grouping else []
    markdown.show(report_tables.table(report))
    if config.out or not config.quick:
        results.write(report, config.out or results.RESULTS / "bench_parts_cpu.json")
    return report


def operations(data_format: str) -> dict[str, Operation]:
    """Returns what a network of the zoo does between its convolutions in training.

    Args:
      data_format: CHWN or NHWC.

    Returns:
      Functions of activations and a shortcut, by name.

    Example:
      >>> operations("CHWN")["ReLU"](jnp.array([-1.0, 2.0]), jnp.zeros(2)).tolist()
      [0.0, 2.0]
    """
    axis = Parts(data_format=data_format).channel_axis

    def norm(x: jax.Array) -> jax.Array:
        ones, zeros = jnp.ones(x.shape[axis]), jnp.zeros(x.shape[axis])
        variables = {
            "params": {"scale": ones, "bias": zeros},
            "batch_stats": {"var": ones, "mean": zeros},
        }
        y, _ = nn.BatchNorm(False, axis=axis).apply(variables, x, mutable=["batch_stats"])
        return y

    return {
        "batch norm": lambda x, shortcut: norm(x),
        "ReLU": lambda x, shortcut: nn.relu(x),
        "batch norm, ReLU": lambda x, shortcut: nn.relu(norm(x)),
        "batch norm, add, ReLU": lambda x, shortcut: nn.relu(norm(x) + shortcut),
        "max pool 2x2": lambda x, shortcut: max_pool(x, 2, 2),
        "max pool 3x3/2": lambda x, shortcut: max_pool(x, 3, 2, padding=1),
        "mean over the image": lambda x, shortcut: x.mean((1, 2)),
    }


def fused_operations() -> dict[str, Operation]:
    """Returns the operations that `bsj.norm_act` does in one, by the same names.

    Example:
      >>> fused_operations()["batch norm, ReLU"](jnp.array([[1.0, 3.0]]), None).round(2).tolist()
      [[0.0, 1.0]]
    """

    def fused(x: jax.Array, residual: jax.Array | None) -> jax.Array:
        ones, zeros = jnp.ones(len(x)), jnp.zeros(len(x))
        return bsj.norm_act(x, ones, zeros, residual=residual)[0]

    return {
        "batch norm, ReLU": lambda x, shortcut: fused(x, None),
        "batch norm, add, ReLU": fused,
    }


def time_operations(config: Config) -> list[dict[str, Any]]:
    """Times every operation in both formats.

    Args:
      config: what is timed.

    Returns:
      Rows: layer, images, operation, mode, and the times in each format, with those of
      `bsj.norm_act` where it does the operation.
    """
    rows = []
    for name, (channels, size, pool) in list(SIZES.items())[: config.sizes]:
        batch = min(config.batch, LARGEST // (4 * channels * size * size))
        shape = (channels, size, size, batch)
        pair = [jax.random.normal(jax.random.key(seed), shape) for seed in range(2)]
        arrays = {"CHWN": pair, "NHWC": [array.transpose(3, 1, 2, 0).copy() for array in pair]}
        for operation in (*EVERYWHERE, *([pool] if pool else [])):
            adds = "add" in operation
            for mode in ("forward", "forward + gradient"):
                calls = {
                    data_format: timed(
                        _program(operations(data_format)[operation], mode, adds, x, shortcut)
                    )
                    for data_format, (x, shortcut) in arrays.items()
                }
                if operation in fused_operations():
                    fused = _program(fused_operations()[operation], mode, adds, *arrays["CHWN"])
                    calls[FUSED] = timed(fused)
                times_ms = time_in_turn(calls, seconds=config.seconds)
                ms = {data_format: time_record(times) for data_format, times in times_ms.items()}
                chwn = ms["CHWN"]["median"]
                row = {
                    "layer": name,
                    "batch": batch,
                    "operation": operation,
                    "mode": mode,
                    "ms": ms,
                    "nhwc_over_chwn": round(ms["NHWC"]["median"] / (chwn or 1.0), 3),
                }
                if FUSED in ms:
                    row["chwn_over_norm_act"] = round(chwn / (ms[FUSED]["median"] or 1.0), 3)
                rows.append(row)
    return rows


def _program(
    run: Operation, mode: str, adds: bool, x: jax.Array, shortcut: jax.Array
) -> Callable[[], Any]:
    """A compiled call of an operation, alone or with the gradients of what it reads."""
    if mode == "forward":
        return functools.partial(jax.jit(run), x, shortcut)
    dy = jax.random.normal(jax.random.key(2), jax.eval_shape(run, x, shortcut).shape)

    def with_gradient(x: jax.Array, shortcut: jax.Array, dy: jax.Array) -> Any:
        y, pullback = jax.vjp(run, x, shortcut)
        dx, dshortcut = pullback(dy)
        return (y, dx, dshortcut) if adds else (y, dx)

    return functools.partial(jax.jit(with_gradient), x, shortcut, dy)


def time_grouping() -> list[dict[str, Any]]:
    """Times `hrbp_groups` on single layers, and first calls of methods on a ResNet-50, twice each.

    These are `init`, and the jitted `update` of methods that change masks in training.

    Returns:
      Rows: what, and the seconds and processor seconds of the first call (with compilation) and of
      the second.
    """
    rows = []
    for group_size in (8, 32):
        scores = jnp.abs(jax.random.normal(jax.random.key(1), (3, 3, 512, 512)))
        group = jax.jit(
            functools.partial(bsj.hrbp_groups, group_size=group_size, kept=154, kept_taps=3)
        )
        call = functools.partial(group, scores)
        rows.append(_time_twice(f"512x512, 3x3, groups of {group_size}", call))
    model = create("resnet50", num_classes=1000)
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.ones((1, 32, 32, 3)))["params"]
    params = jax.tree.map(
        lambda leaf: jax.random.normal(jax.random.key(leaf.size), leaf.shape), shapes
    )
    for name, method in methods().items():
        rows.append(_time_twice(f"ResNet-50, {name}", functools.partial(method.init, params)))
        if name != "hrbp_prune(0.9)":
            tx = bsj.sparse(method, optax.sgd(0.1, momentum=0.9))
            call = functools.partial(jax.jit(tx.update), params, tx.init(params), params)
            rows.append(_time_twice(f"ResNet-50, {name}, update", call))
    return rows


def methods() -> dict[str, optax.GradientTransformation]:
    """Returns the methods whose first calls are timed, by name.

    Example:
      >>> "hrbp_prune(0.9)" in methods()
      True
    """
    era = bsj.between(0, 100, every=10)
    return {
        "hrbp_prune(0.9)": bsj.hrbp_prune(0.9),
        "rigl(0.9)": bsj.rigl(0.9, schedule=bsj.every(100, until=1000)),
        "subp(0.9)": bsj.subp(0.9, schedule=era),
        "gradual(0.9)": bsj.gradual(0.9, schedule=era),
    }


def _time_twice(what: str, call: Callable[[], Any]) -> dict[str, Any]:
    """The first call, which compiles, and the second, each once: they take many seconds."""
    jax.clear_caches()  # what other calls compiled
    seconds, cpu_seconds = [], []
    for _ in range(2):
        start = time.process_time()
        _, elapsed_ms = call_and_time(call)
        cpu_seconds.append(round(time.process_time() - start, 2))
        seconds.append(round(elapsed_ms / 1e3, 2))
    return {
        "what": what,
        "first_s": seconds[0],
        "first_cpu_s": cpu_seconds[0],
        "second_s": seconds[1],
        "second_cpu_s": cpu_seconds[1],
    }


def cli(arguments: Sequence[str]) -> int:
    """Runs the command.

    Args:
      arguments: without the program's name.

    Returns:
      The exit status.
    """
    return command.run(Config, main, "experiments.bench.parts", __doc__, arguments)


if __name__ == "__main__":
    raise SystemExit(cli(sys.argv[1:]))
