"""`python -m experiments.bench.gpu.two_of_four`: 2:4 products on an NVIDIA GPU, checked against
float64 and timed beside XLA's dense ones.

The 1x1 convolutions of ResNet-50 and its dense layer at batch 256 (see bound.py), forward, weights
compressed at every call as in training. Each shape is compared with float64 before it is timed.
Where cuSPARSELt is not there it says why, writes that, and ends with status 0. Each finished shape
is a line in the journal at once; `--minutes 9` stops in time with exit status 75, and the same
command goes on. `--quick`: a dry run of small shapes on any device, in which XLA's dense product
stands in for cuSPARSELt.
"""

import dataclasses
import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from experiments.bench.environment import tuned_on
from experiments.bench.gpu import clock as gpu_clock
from experiments.bench.gpu import two_of_four_bound as bound
from experiments.bench.gpu.journal import Journal, TimeUp, exit_status, fingerprint
from pallas_kernels.two_of_four import cusparselt, handler
from pallas_kernels.two_of_four.api import two_of_four_matmul

LIMITS = {"bfloat16": 4e-3, "float16": 6e-4}  # |ours - float64| / |float64|: rounding of the result
COLUMNS = 1024  # of the activations, compared with float64
KEPT = 2  # of four


@dataclasses.dataclass(frozen=True)
class Config:
    """What is timed.

    Attributes:
      device: gpu.
      batch: images.
      dtype: of weights and activations.
      layers: a part of the products' names; empty is all.
      minutes: no shape begins after them; None: no limit.
      repetitions: of each program of some milliseconds.
      journal: JSON-lines file that is gone on with.
      out: JSON file; None writes none.
      quick: a dry run of small shapes on any device.
    """

    device: Literal["gpu"] = "gpu"
    batch: int = 256
    dtype: Literal["bfloat16", "float16"] = "bfloat16"
    layers: str = ""
    minutes: float | None = None
    repetitions: int = 9
    journal: Path = Path("runs/gpu/two_of_four.jsonl")
    out: Path | None = None
    quick: bool = False


def operands(
    product: bound.Product, channel_major: bool, dtype: str, seed: int = 0
) -> tuple[jax.Array, jax.Array]:
    """Random weights with the two largest of each four kept, and activations.

    Args:
      product: the sizes.
      channel_major: whether the channels come first.
      dtype: of both.
      seed: of the random numbers.

    Returns:
      `(weights [k, m], x)`.

    Example:
      >>> from pallas_kernels.two_of_four import is_two_of_four
      >>> bool(is_two_of_four(operands(bound.Product("a", 16, 16, 8), True, "bfloat16")[0]))
      True
    """
    keys = jax.random.split(jax.random.key(seed))
    runs = jax.random.normal(keys[0], (product.k // 4, 4, product.m))
    rank = jnp.argsort(jnp.argsort(-jnp.abs(runs), axis=1), axis=1)
    weights = jnp.where(rank < KEPT, runs, 0).reshape(product.k, product.m)
    x = jax.random.normal(
        keys[1], (product.k, product.n) if channel_major else (product.n, product.k), dtype
    )
    return weights.astype(dtype), x


def difference(
    y: jax.Array, weights: jax.Array, x: jax.Array, channel_major: bool, dtype: str
) -> float:
    """Compares some columns of a product with float64.

    Args:
      y: the product.
      weights: masked.
      x: activations.
      channel_major: whether the channels come first.
      dtype: whose limit holds.

    Returns:
      The relative error.

    Raises:
      AssertionError: it is past the limit.
    """
    n = y.shape[1 if channel_major else 0]
    some = np.sort(np.random.default_rng(0).choice(n, min(n, COLUMNS), replace=False))
    columns, ours = (
        np.asarray((a[:, some].T if channel_major else a[some]).astype(jnp.float32), np.float64)
        for a in (x, y)
    )
    wanted = columns @ np.asarray(weights.astype(jnp.float32), np.float64)
    error = float(np.linalg.norm(ours - wanted) / np.linalg.norm(wanted))
    if not error <= LIMITS[dtype]:
        raise AssertionError(f"differs from float64 by {error:.1e} (limit {LIMITS[dtype]:.0e})")
    return float(f"{error:.2e}")


def programs(channel_major: bool, quick: bool) -> dict[str, Callable[..., jax.Array]]:
    """What is timed: functions `(weights, x) -> y`.

    Args:
      channel_major: whether the channels come first.
      quick: without cuSPARSELt.

    Returns:
      By name; "searched" is the fastest of the library's algorithms, "first choice" the one that it
      takes unasked.
    """
    dense = functools.partial(
        two_of_four_matmul, channel_major=channel_major, implementation="dense"
    )
    if quick:
        return {"dense": dense, "stand-in": dense}
    return {
        "dense": dense,
        "2:4, first choice": functools.partial(cusparselt.product, channel_major=channel_major),
        "2:4, searched": functools.partial(
            cusparselt.product, channel_major=channel_major, search=True
        ),
    }


def run_shape(
    product: bound.Product, channel_major: bool, dtype: str, repetitions: int, quick: bool
) -> dict[str, Any]:
    """Checks and times one product.

    Args:
      product: the sizes.
      channel_major: whether the channels come first.
      dtype: of weights and activations.
      repetitions: of each program.
      quick: without cuSPARSELt, one short round.

    Returns:
      Errors and milliseconds by program.

    Raises:
      AssertionError: a product is wrong.
    """
    functions = programs(channel_major, quick)
    weights, x = operands(product, channel_major, dtype)
    errors = {}
    for name, function in functions.items():
        try:
            errors[name] = difference(
                jax.jit(function)(weights, x), weights, x, channel_major, dtype
            )
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from None
    del weights, x
    sets = gpu_clock.rotate(lambda seed: operands(product, channel_major, dtype, seed))
    guess = max(1e-3 * bound.floors(product)["2:4 + compress"], 5e-3)  # milliseconds
    count = 1 if quick else gpu_clock.rounds(guess, sets)
    times = gpu_clock.sample(gpu_clock.build(functions, sets, count), 2 if quick else repetitions)
    return {"errors": errors, "ms": times, **sets.about}


def cases(config: Config) -> list[bound.Product]:
    """The products, their outputs rounded up to what cuSPARSELt takes.

    Args:
      config: what is timed.

    Returns:
      Products.

    Raises:
      ValueError: no name contains the wanted part.

    Example:
      >>> cases(Config())[-1].m
      1008
    """
    every = (
        [bound.Product("small", 64, 32, 48), bound.Product("small wide", 32, 64, 8)]
        if config.quick
        else bound.products(config.batch)
    )
    found = [
        dataclasses.replace(p, m=-(-p.m // cusparselt.WEIGHT_MULTIPLE) * cusparselt.WEIGHT_MULTIPLE)
        for p in every
        if config.layers in p.name
    ]
    if not found:
        raise ValueError(f"layers: no name contains {config.layers!r}; e.g. {every[0].name!r}")
    return found


def main(config: Config) -> dict[str, Any]:
    """Checks and times all products, in both layouts of the activations, and writes the report of
    what is there.

    Args:
      config: what is timed.

    Returns:
      The report; "complete" says whether everything is in it, "absent" why nothing could be run.

    Raises:
      ValueError: the device is no GPU, or no such product.
    """
    gpu_clock.require_gpu(config.quick)
    absent = None if config.quick else cusparselt.unavailable()
    journal = Journal(config.journal, config.minutes)
    where = f"{gpu_clock.gpu()} jax {jax.__version__} {fingerprint([handler.SOURCE, *handler.SOURCE.parent.glob('*.py')])}"
    rows, failed, complete = [], {}, True
    for product in [] if absent else cases(config):
        for layout in ("channels first", "channels last"):
            key = f"{where} {product.name} {product.k}x{product.m}x{product.n} {layout} {config.dtype}"
            task = functools.partial(
                run_shape,
                product,
                layout == "channels first",
                config.dtype,
                config.repetitions,
                config.quick,
            )
            try:
                result = journal.run(key, task) if complete else journal.result(key)
            except TimeUp:
                result, complete = None, False
            jax.clear_caches()
            if error := journal.error(key):
                failed[f"{product.name}, {layout}"] = error
            if result:
                floors = {name: round(us, 2) for name, us in bound.floors(product).items()}
                rows.append(
                    {
                        **dataclasses.asdict(product),
                        "layout": layout,
                        "dtype": config.dtype,
                        "computed_floors_us": floors,
                        **result,
                    }
                )
                print(
                    f"{product.name}, {layout}, us: "
                    f"{ {name: round(1e3 * t['median'], 1) for name, t in result['ms'].items()} }",
                    flush=True,
                )
    environment = tuned_on() | {"cusparselt": cusparselt.version()}
    report = {
        "environment": environment,
        "absent": absent,
        "complete": complete,
        "failed": failed,
        "rows": rows,
    }
    if absent:
        print(f"no 2:4 products: {absent}")
    if config.out:
        config.out.parent.mkdir(parents=True, exist_ok=True)
        config.out.write_text(json.dumps(report, indent=1) + "\n")
    return report


def run(config: Config) -> int:
    """The command.

    Args:
      config: what is timed.

    Returns:
      The exit status: 0, 1 when a product failed, 2 for a wrong argument, 70 when the device is
      lost, 75 when time was up.
    """
    return exit_status(lambda: main(config))


if __name__ == "__main__":
    raise SystemExit(run(tyro.cli(Config, prog="python -m experiments.bench.gpu.two_of_four")))
