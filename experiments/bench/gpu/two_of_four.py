"""Checks and times 2:4 products on an NVIDIA GPU, beside XLA's dense ones.

`python -m experiments.bench.gpu.two_of_four` covers the 1x1 convolutions of ResNet-50 and its dense
layer at batch 256 (see `two_of_four_bound.py`), forward; the weights are compressed at every call,
as in training. Each shape is compared with float64 before it is timed. Where there is no
cuSPARSELt, the command says why, writes that, and ends with status 0.

Every shape is one line of the journal. `--minutes 9` stops in time with exit status 75, and the
same command continues. `--quick` is a dry run of small shapes on any device, in which XLA's dense
product stands in for cuSPARSELt.
"""

import dataclasses
import functools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from experiments.bench import command
from experiments.bench.gpu import clock
from experiments.bench.gpu import two_of_four_bound as bound
from experiments.bench.gpu.fingerprint import fingerprint
from experiments.bench.gpu.float64 import as_float64
from experiments.bench.gpu.journal import Journal, TimeUp
from experiments.measuring.environment import tuned_on
from experiments.reporting import results
from pallas_kernels.devices import this_gpu
from pallas_kernels.two_of_four import cusparselt, handler
from pallas_kernels.two_of_four.api import two_of_four_matmul

LIMITS = {"bfloat16": 4e-3, "float16": 6e-4}  # |y - float64| / |float64|: the result's rounding
COMPARED_COLUMNS = 1024  # of the activations
KEPT = 2  # of four
LAYOUTS = {"channels first": True, "channels last": False}  # whether channels come first


@dataclasses.dataclass(frozen=True)
class Config:
    """What is timed.

    Attributes:
      device: gpu.
      batch: images.
      dtype: of weights and activations.
      layers: a part of the products' names; empty for all.
      minutes: after so many no shape begins; None: no limit.
      repetitions: of each program of some milliseconds.
      journal: JSON-lines file that is continued.
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


def main(config: Config) -> dict[str, Any]:
    """Checks and times all products in both layouts, and writes the report of what was measured.

    Args:
      config: what is timed.

    Returns:
      The report; "complete" says whether everything is in it, "absent" why nothing could run.

    Raises:
      ValueError: the device is no GPU, or there is no such product.
    """
    clock.require_gpu(config.quick)
    absent = None if config.quick else cusparselt.unavailable()
    journal = Journal(config.journal, config.minutes)
    sources = fingerprint([handler.SOURCE, *handler.SOURCE.parent.glob("*.py")])
    place = f"{this_gpu()} jax {jax.__version__} {sources}"
    report: dict[str, Any] = {
        "environment": tuned_on() | {"cusparselt": cusparselt.version()},
        "absent": absent,
        "complete": True,
        "failed": {},
        "rows": [],
    }
    if absent:
        print(f"no 2:4 products: {absent}")
    for product in [] if absent else cases(config):
        for layout, channel_major in LAYOUTS.items():
            size = f"{product.k}x{product.m}x{product.n}"
            key = f"{place} {product.name} {size} {layout} {config.dtype}"
            measure = functools.partial(measure_product, config, product, channel_major)
            try:
                result = journal.run(key, measure) if report["complete"] else journal.result(key)
            except TimeUp:
                result = None
                report["complete"] = False
            jax.clear_caches()
            if error := journal.error(key):
                report["failed"][f"{product.name}, {layout}"] = error
            if result:
                report["rows"].append(_row(config, product, layout, result))
    if config.out:
        results.write(report, config.out)
    return report


def _row(
    config: Config, product: bound.Product, layout: str, result: dict[str, Any]
) -> dict[str, Any]:
    """The report's row of a measured product, which is also printed."""
    us = {name: round(1e3 * times["median"], 1) for name, times in result["ms"].items()}
    print(f"{product.name}, {layout}, us: {us}", flush=True)
    floors = {name: round(time, 2) for name, time in bound.floors(product).items()}
    return {
        **dataclasses.asdict(product),
        "layout": layout,
        "dtype": config.dtype,
        "computed_floors_us": floors,
        **result,
    }


def cases(config: Config) -> list[bound.Product]:
    """Returns the products, their outputs rounded up to what cuSPARSELt takes.

    Args:
      config: what is timed.

    Returns:
      Products.

    Raises:
      ValueError: no name contains `config.layers`.

    Example:
      >>> cases(Config())[-1].m
      1008
    """
    every = bound.products(config.batch)
    if config.quick:
        every = [bound.Product("small", 64, 32, 48), bound.Product("small wide", 32, 64, 8)]
    multiple = cusparselt.WEIGHT_MULTIPLE
    chosen = [
        dataclasses.replace(product, m=-(-product.m // multiple) * multiple)
        for product in every
        if config.layers in product.name
    ]
    if not chosen:
        raise ValueError(f"layers: no name contains {config.layers!r}; e.g. {every[0].name!r}")
    return chosen


def measure_product(config: Config, product: bound.Product, channel_major: bool) -> dict[str, Any]:
    """Checks and times one product.

    Args:
      config: dtype and repetitions; with `quick` one short round without cuSPARSELt.
      product: the sizes.
      channel_major: whether the channels come first.

    Returns:
      Errors and milliseconds by program.

    Raises:
      AssertionError: a product is wrong.
    """
    functions = programs(channel_major, config.quick)
    weights, x = operands(product, channel_major, config.dtype)
    errors = {}
    for name, function in functions.items():
        try:
            y = jax.jit(function)(weights, x)
            errors[name] = difference(y, weights, x, channel_major, config.dtype)
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from None
    del weights, x, y
    sets = clock.rotate(functools.partial(operands, product, channel_major, config.dtype))
    least_ms = max(1e-3 * bound.floors(product)[bound.WITH_COMPRESSION], 5e-3)
    count = 1 if config.quick else clock.rounds(least_ms, sets)
    repetitions = 2 if config.quick else config.repetitions
    times = clock.sample(clock.build(functions, sets, count), repetitions)
    return {"errors": errors, "ms": times, **sets.describe()}


def programs(channel_major: bool, quick: bool) -> dict[str, Callable[..., jax.Array]]:
    """Returns what is timed: functions `(weights, x) -> y` by name.

    Args:
      channel_major: whether the channels come first.
      quick: without cuSPARSELt.

    Returns:
      "dense", "2:4, first choice" (the algorithm that the library takes by itself) and
      "2:4, searched" (the fastest of its algorithms).
    """
    dense = functools.partial(
        two_of_four_matmul, channel_major=channel_major, implementation="dense"
    )
    if quick:
        return {"dense": dense, "stand-in": dense}
    product = functools.partial(cusparselt.product, channel_major=channel_major)
    return {
        "dense": dense,
        "2:4, first choice": product,
        "2:4, searched": functools.partial(product, search=True),
    }


def operands(
    product: bound.Product, channel_major: bool, dtype: str, seed: int = 0
) -> tuple[jax.Array, jax.Array]:
    """Draws weights of which the two largest of every four are kept, and activations.

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
    weights_key, x_key = jax.random.split(jax.random.key(seed))
    fours = jax.random.normal(weights_key, (product.k // 4, 4, product.m))
    rank = jnp.argsort(jnp.argsort(-jnp.abs(fours), axis=1), axis=1)
    weights = jnp.where(rank < KEPT, fours, 0).reshape(product.k, product.m)
    shape = (product.k, product.n) if channel_major else (product.n, product.k)
    return weights.astype(dtype), jax.random.normal(x_key, shape, dtype)


def difference(
    y: jax.Array, weights: jax.Array, x: jax.Array, channel_major: bool, dtype: str
) -> float:
    """Compares some columns of a product with float64.

    Args:
      y: the product.
      weights: masked.
      x: activations.
      channel_major: whether the channels come first.
      dtype: decides the limit.

    Returns:
      The relative error.

    Raises:
      AssertionError: it is above the limit.
    """
    n = y.shape[1 if channel_major else 0]
    count = min(n, COMPARED_COLUMNS)
    columns = np.sort(np.random.default_rng(0).choice(n, count, replace=False))
    x_rows, y_rows = (
        as_float64(array[:, columns].T if channel_major else array[columns]) for array in (x, y)
    )
    expected = x_rows @ as_float64(weights)
    error = float(np.linalg.norm(y_rows - expected) / np.linalg.norm(expected))
    if not error <= LIMITS[dtype]:
        raise AssertionError(f"differs from float64 by {error:.1e} (limit {LIMITS[dtype]:.0e})")
    return float(f"{error:.2e}")


def run(config: Config) -> int:
    """Runs the command and returns its exit status, see `command.exit_status`."""
    return command.exit_status(lambda: main(config))


if __name__ == "__main__":
    module = "experiments.bench.gpu.two_of_four"
    raise SystemExit(run(command.parse(Config, module, __doc__, sys.argv[1:])))
