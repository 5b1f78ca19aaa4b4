"""Times what is around the convolutions: `python -m experiments.bench.parts` (5 minutes on 2 CPU
cores).

Batch norm, ReLU, the residual add and the pools of the zoo in (C, H, W, N) beside NHWC, forward and
forward + gradient, at the sizes of VGG-19 and ResNet-32 (width 2) on 32x32 images and of
ResNet-50's ends on 224x224 images, each pool where the networks have it; and the grouping of single
layers and of a whole ResNet-50, after compilation and with it.
"""

import dataclasses
import functools
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import tyro
from flax import linen as nn
from rich.console import Console
from rich.table import Table

import blocksparse_jax as bsj
from experiments.bench.environment import commit, device, versions
from experiments.bench.memory import steady_memory
from experiments.bench.timing import median_iqr, time_in_turn, timed
from experiments.models import create
from experiments.models.layers import Parts, max_pool

RESULTS = Path(__file__).parents[1] / "results"
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
LARGEST = (
    100 << 20
)  # bytes of one layer's activations: with larger ones, the allocator's page faults are what is timed
FORMATS = ("CHWN", "NHWC")


@dataclasses.dataclass(frozen=True)
class Config:
    """What is timed.

    Attributes:
      batch: images, where no array is larger than `LARGEST` then.
      seconds: for each operation, size and mode, both formats together.
      sizes: of `SIZES`, the first ones.
      grouping: whether the grouping is timed.
      out: the report, JSON.
    """

    batch: int = 128
    seconds: float = 2.0
    sizes: int = len(SIZES)
    grouping: bool = True
    out: str = str(RESULTS / "bench_parts_cpu.json")


def operations(data_format: str) -> dict[str, Callable[[jax.Array, jax.Array], jax.Array]]:
    """What a network does between its convolutions in training, as the zoo does it.

    Args:
      data_format: CHWN or NHWC.

    Returns:
      Functions of activations and a shortcut, by name.

    Example:
      >>> operations("CHWN")["ReLU"](jnp.array([-1.0, 2.0]), jnp.zeros(2)).tolist()
      [0.0, 2.0]
    """
    parts = Parts(data_format=data_format)

    class Normed(nn.Module):
        @nn.compact
        def __call__(self, x: jax.Array) -> jax.Array:
            return parts.norm(True, name="norm")(x)

    def norm(x: jax.Array) -> jax.Array:
        channels = x.shape[parts.channel_axis]
        affine, statistics = (
            {a: jnp.ones(channels), b: jnp.zeros(channels)}
            for a, b in (("scale", "bias"), ("var", "mean"))
        )
        return Normed().apply(
            {"params": {"norm": affine}, "batch_stats": {"norm": statistics}},
            x,
            mutable=["batch_stats"],
        )[0]

    return {
        "batch norm": lambda x, shortcut: norm(x),
        "ReLU": lambda x, shortcut: nn.relu(x),
        "batch norm, ReLU": lambda x, shortcut: nn.relu(norm(x)),
        "batch norm, add, ReLU": lambda x, shortcut: nn.relu(norm(x) + shortcut),
        "max pool 2x2": lambda x, shortcut: max_pool(x, 2, 2),
        "max pool 3x3/2": lambda x, shortcut: max_pool(x, 3, 2, padding=1),
        "mean over the image": lambda x, shortcut: x.mean((1, 2)),
    }


def layers(config: Config) -> list[dict[str, Any]]:
    """Times every operation in both formats.

    Args:
      config: what is timed.

    Returns:
      Rows: layer, images, operation, mode, and median and spread of each format in milliseconds.
    """
    rows = []
    for name, (channels, size, pool) in list(SIZES.items())[: config.sizes]:
        batch = min(config.batch, LARGEST // (4 * channels * size * size))
        chwn = [
            jax.random.normal(jax.random.key(seed), (channels, size, size, batch))
            for seed in range(2)
        ]
        arrays = {"CHWN": chwn, "NHWC": [a.transpose(3, 1, 2, 0).copy() for a in chwn]}
        for operation in (*EVERYWHERE, *([pool] if pool else [])):
            for mode in ("forward", "forward + gradient"):
                calls = {}
                for data_format, (x, shortcut) in arrays.items():
                    run = operations(data_format)[operation]
                    dy = jax.random.normal(
                        jax.random.key(2), jax.eval_shape(run, x, shortcut).shape
                    )
                    program = jax.jit(
                        run if mode == "forward" else functools.partial(_both, run, dy)
                    )
                    calls[data_format] = timed(functools.partial(program, x, shortcut))
                times = {
                    f: median_iqr(t) for f, t in time_in_turn(calls, seconds=config.seconds).items()
                }
                ms = {f: {"median": median, "iqr": iqr} for f, (median, iqr) in times.items()}
                ratio = (times["NHWC"][0] or 0.0) / (times["CHWN"][0] or 1.0)
                row = {
                    "layer": name,
                    "batch": batch,
                    "operation": operation,
                    "mode": mode,
                    "ms": ms,
                }
                rows.append(row | {"nhwc_over_chwn": round(ratio, 3)})
    return rows


def _both(
    run: Callable[[jax.Array, jax.Array], jax.Array],
    dy: jax.Array,
    x: jax.Array,
    shortcut: jax.Array,
) -> tuple[jax.Array, ...]:
    y, pullback = jax.vjp(run, x, shortcut)
    return y, pullback(dy)[0]


def grouping() -> list[dict[str, Any]]:
    """Times `hrbp_groups` on single layers, and `hrbp_prune(0.9).init` on a ResNet-50: with
    compilation, and again.

    Returns:
      Rows: what, seconds of the first and of the second call, and processor seconds of the second.
    """

    def timed(what: str, call: Callable[[], Any]) -> dict[str, Any]:
        wall, cpu = [], []
        for _ in range(2):
            start, start_cpu = time.perf_counter(), time.process_time()
            jax.block_until_ready(call())
            wall.append(time.perf_counter() - start), cpu.append(time.process_time() - start_cpu)
        return {
            "what": what,
            "first_s": round(wall[0], 2),
            "second_s": round(wall[1], 2),
            "second_cpu_s": round(cpu[1], 2),
        }

    rows = []
    for group_size in (8, 32):
        scores = jnp.abs(jax.random.normal(jax.random.key(1), (3, 3, 512, 512)))
        call = functools.partial(
            jax.jit(
                functools.partial(bsj.hrbp_groups, group_size=group_size, kept=154, kept_taps=3)
            ),
            scores,
        )
        rows.append(timed(f"512x512, 3x3, groups of {group_size}", call))
    shapes = jax.eval_shape(
        create("resnet50", num_classes=1000).init, jax.random.key(0), jnp.ones((1, 32, 32, 3))
    )["params"]
    params = jax.tree.map(
        lambda leaf: jax.random.normal(jax.random.key(leaf.size), leaf.shape), shapes
    )
    rows.append(
        timed("ResNet-50, hrbp_prune(0.9)", functools.partial(bsj.hrbp_prune(0.9).init, params))
    )
    return rows


def main(config: Config) -> dict[str, Any]:
    """Times, prints and writes the report.

    Args:
      config: what is timed.

    Returns:
      The report: `layers`, `grouping`, device, versions and commit.
    """
    steady_memory()
    report = {
        "device": device(),
        "versions": versions(),
        "commit": commit(),
        "batch": config.batch,
        "rows": layers(config),
    }
    report["grouping"] = grouping() if config.grouping else []
    table = Table(title="milliseconds in both formats")
    for column in ("layer", "operation", "mode", *FORMATS, "NHWC / CHWN"):
        table.add_column(column)
    for row in report["rows"]:
        ms = (f"{row['ms'][f]['median']:.2f}" for f in FORMATS)
        table.add_row(
            row["layer"], row["operation"], row["mode"], *ms, f"{row['nhwc_over_chwn']:.2f}x"
        )
    Console(width=140).print(table, *(json.dumps(row) for row in report["grouping"]), sep="\n")
    Path(config.out).write_text(json.dumps(report, indent=1) + "\n")
    return report


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
