"""What the device can do at most: copies, products, gathers, sums, and the time of a launch."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.bench.gpu import clock, shapes
from experiments.bench.gpu.implementations import present_implementations, variant
from pallas_kernels.block_sparse_conv import ConvSpec, Implementation

TERA = 1e12


@dataclasses.dataclass(frozen=True)
class Ceiling:
    """One measurement.

    Attributes:
      function: of `operands`; one launch.
      operands: seed -> arrays.
      amount: bytes or FLOPs of a launch.
      unit: of `amount / scale` per second.
      what: is done, in one line.
      scale: 1e12 for TB/s and TFLOP/s.
    """

    function: Callable[..., Any]
    operands: Callable[[int], tuple[jax.Array, ...]]
    amount: float
    unit: str
    what: str
    scale: float = TERA


@dataclasses.dataclass(frozen=True)
class Sizes:
    """The sizes of the operands.

    Attributes:
      copied: elements that are copied.
      side: of the matrices.
      table_rows: of the table from which rows are gathered.
      outputs: sums of gathered rows.
      summed_rows: gathered rows of a sum.
      images: elements of a row.
    """

    copied: int = 1 << 30
    side: int = 8192
    table_rows: int = 4096 * 16
    outputs: int = 4096 * 8
    summed_rows: int = 32
    images: int = 256


QUICK_SIZES = Sizes(1 << 14, 64, 64, 32, 4, 32)


def ceilings(quick: bool) -> dict[str, Ceiling]:
    """Returns what is measured, by name.

    Args:
      quick: tiny sizes.

    Example:
      >>> list(ceilings(True))[:2]
      ['launch', 'copy']
    """
    sizes = QUICK_SIZES if quick else Sizes()
    return {
        "launch": Ceiling(
            lambda a: a + 1,
            _normal((32,), "float32"),
            1,
            "launches/us",
            "one after the other in a loop, with nothing to do",
            1e6,
        ),
        "copy": Ceiling(
            lambda a: -a,
            _normal((sizes.copied,), "bfloat16"),
            4 * sizes.copied,
            "TB/s",
            "read and written bytes, elementwise, beyond L2",
        ),
        "matmul": _matmul(sizes.side),
        **{
            f"row gather, {rows * sizes.images >> 19} MiB": _row_gather(sizes, rows)
            for rows in (sizes.table_rows, sizes.table_rows // 4)
        },
        "reduction": Ceiling(
            lambda a: jnp.sum(a, axis=1),
            _normal((sizes.copied >> 14, 1 << 13), "float32"),
            4 * (sizes.copied >> 1),
            "TB/s",
            "float32 read and summed",
        ),
        "scatter-add": _scatter_add(sizes),
    }


def _normal(shape: tuple[int, ...], dtype: str) -> Callable[[int], tuple[jax.Array, ...]]:
    return lambda seed: (jax.random.normal(jax.random.key(seed), shape, dtype),)


def _matmul(side: int) -> Ceiling:
    draw = _normal((side, side), "bfloat16")
    return Ceiling(
        jnp.matmul,
        lambda seed: draw(seed) + draw(seed + 100),
        2 * side**3,
        "TFLOP/s",
        f"dense bfloat16, {side} cubed, random normal operands",
    )


def _random_rows(sizes: Sizes) -> np.ndarray:
    """The rows of each sum, `[outputs, summed_rows]`."""
    rng = np.random.default_rng(0)
    shape = (sizes.outputs, sizes.summed_rows)
    return rng.integers(0, sizes.table_rows, shape).astype(np.int32)


def _row_gather(sizes: Sizes, table_rows: int) -> Ceiling:
    index = _random_rows(sizes) % table_rows
    draw = _normal((table_rows, sizes.images), "bfloat16")

    def gather_and_sum(table: jax.Array, index: jax.Array) -> jax.Array:
        rows = table.at[index].get(mode="promise_in_bounds")
        return jnp.sum(rows, axis=1, dtype=jnp.float32)

    return Ceiling(
        gather_and_sum,
        lambda seed: (*draw(seed), jnp.asarray(index)),
        2 * index.size * sizes.images,
        "TB/s",
        f"bytes of gathered rows, {sizes.summed_rows} random rows of {2 * sizes.images} bytes "
        "summed at once; by XLA, so kernels reach at least this",
    )


def _scatter_add(sizes: Sizes) -> Ceiling:
    rows = sizes.table_rows // 16
    index = _random_rows(sizes)[:, 0] % rows
    draw = _normal((sizes.outputs, sizes.images), "float32")

    def add(updates: jax.Array, index: jax.Array) -> jax.Array:
        zeros = jnp.zeros((rows, sizes.images), jnp.float32)
        return zeros.at[index].add(updates, mode="promise_in_bounds")

    return Ceiling(
        add,
        lambda seed: (*draw(seed), jnp.asarray(index)),
        4 * sizes.outputs * sizes.images,
        "TB/s",
        f"float32 rows added into {rows} random rows, by XLA; the time includes writing zeros",
    )


def measure_ceiling(name: str, quick: bool) -> dict[str, Any]:
    """Measures one ceiling.

    Args:
      name: of `ceilings`.
      quick: tiny sizes, two repetitions.

    Returns:
      The rate, its unit, what was done, and milliseconds of a launch.
    """
    ceiling = ceilings(quick)[name]
    # The table of the gather should stay in the L2 cache.
    sets = clock.rotate(ceiling.operands, 1 if name.startswith("row gather") else 2)
    first = clock.Program(ceiling.function, sets, 2)
    first()
    count = clock.rounds(first(), sets, 0.5 if quick else 20.0)
    program = clock.Program(ceiling.function, sets, count)
    times = clock.sample({name: program}, 2 if quick else 9)[name]
    seconds = 1e-3 * max(times["median"], 1e-9)
    description = sets.describe()
    return {
        "name": name,
        "rate": float(f"{ceiling.amount / seconds / ceiling.scale:.4g}"),
        "unit": ceiling.unit,
        "what": ceiling.what,
        "ms": times,
        "sets": description["sets"],
        "megabytes": description["megabytes"],
    }


KERNEL_CEILINGS = {
    "row gather, kernels": "bytes of gathered rows, forward, in the block-sparse kernels",
    "float32 sums, kernels": "bytes of float32 sums into rows in memory, input gradient by "
    "scatter, in the Triton kernels",
}


def measure_kernel_ceiling(name: str, quick: bool) -> dict[str, Any]:
    """Measures a rate of the block-sparse kernels' own accesses to memory.

    It times a 1x1 block-sparse convolution that is so thin that these accesses decide: a group
    keeps half of the channels and gives 16 filters, so that a row is read or added once for 16
    multiplications. Its operands fit into L2.

    Args:
      name: of `KERNEL_CEILINGS`.
      quick: XLA's implementation on a tiny shape.

    Returns:
      Terabytes per second, by implementation.
    """
    spec = _thin_convolution(quick)
    sums = name.startswith("float32")
    nbytes = (4 if sums else 2) * spec.groups * spec.kept * spec.batch
    rates: dict[str, dict[str, Any]] = {}
    for which, implementation in present_implementations().items():
        left_out = (which == "xla" and not quick) or (which == "mosaic_gpu" and sums)
        if left_out or implementation.supports(spec):
            continue
        run = _sums(spec, which, implementation) if sums else _gather(spec, implementation)
        sets = clock.rotate(functools.partial(shapes.operands, spec), 1)
        programs = clock.build({which: run}, sets, 2 if quick else 500)
        times = clock.sample(programs, 2 if quick else 9)[which]
        rate = nbytes / (1e-3 * times["median"]) / TERA
        rates[which] = {"rate": float(f"{rate:.4g}"), "ms": times}
    activations = 2 * spec.cin * spec.batch >> 20
    return {
        "name": name,
        "unit": "TB/s",
        "what": f"{KERNEL_CEILINGS[name]}: {spec.groups} groups of 16 filters, "
        f"{activations} MiB of activations",
        "rates": rates,
        "rate": max((measured["rate"] for measured in rates.values()), default=None),
    }


def _thin_convolution(quick: bool) -> ConvSpec:
    cin, images, groups = (16, 8, 2) if quick else (512, 16384, 32)
    return ConvSpec(
        cin=cin,
        height=1,
        width=1,
        batch=images,
        kernel=(1, 1),
        cout=16 * groups,
        groups=groups,
        kept=cin // 2,
        kept_taps=1,
        group_size=16,
        dtype="bfloat16",
        channel_block=8,
    )


def _gather(spec: ConvSpec, implementation: Implementation) -> Callable[..., jax.Array]:
    def forward(x: jax.Array, dy: jax.Array, values: jax.Array, *index: jax.Array) -> jax.Array:
        return implementation.forward(spec, x, values, *index)

    return forward


def _sums(spec: ConvSpec, name: str, implementation: Implementation) -> Callable[..., jax.Array]:
    scattering = variant(implementation, "scatter" if name == "triton" else "")

    def input_gradient(
        x: jax.Array, dy: jax.Array, values: jax.Array, *index: jax.Array
    ) -> jax.Array:
        return scattering.input_gradient(spec, dy, values, *index)

    return input_gradient
