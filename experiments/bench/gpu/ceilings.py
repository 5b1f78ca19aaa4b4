"""What the device can do at most: copies, matrix products, rows gathered from the L2 cache, float32
sums, the least time of a launch.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.bench.gpu import check as gpu_check
from experiments.bench.gpu import clock as gpu_clock
from experiments.bench.gpu import shapes as gpu_shapes
from experiments.bench.gpu.clock import Sets
from pallas_kernels.block_sparse_conv import ConvSpec


@dataclasses.dataclass(frozen=True)
class Ceiling:
    """One measurement.

    Attributes:
      function: of `operands`; one launch.
      operands: seed -> arrays.
      amount: bytes or FLOPs of a launch.
      unit: of `amount` per second, after division by `scale`.
      scale: 1e12 for TB/s and TFLOP/s.
      what: one line.
    """

    function: Callable[..., Any]
    operands: Callable[[int], tuple[jax.Array, ...]]
    amount: float
    unit: str
    what: str
    scale: float = 1e12


def _normal(shape: tuple[int, ...], dtype: str) -> Callable[[int], tuple[jax.Array, ...]]:
    return lambda seed: (jax.random.normal(jax.random.key(seed), shape, dtype),)


def ceilings(quick: bool) -> dict[str, Ceiling]:
    """What is measured.

    Args:
      quick: tiny sizes.

    Returns:
      By name.

    Example:
      >>> list(ceilings(True))[:2]
      ['launch', 'copy']
    """
    big, side, rows, outs, near, images = (
        (1 << 14, 64, 64, 32, 4, 32) if quick else (1 << 30, 8192, 4096 * 16, 4096 * 8, 32, 256)
    )
    rng = np.random.default_rng(0)
    index = rng.integers(0, rows, (outs, near)).astype(np.int32)

    def gathered(seed: int, table: int = rows) -> tuple[jax.Array, ...]:
        return *_normal((table, images), "bfloat16")(seed), jnp.asarray(index % table)

    def added(seed: int) -> tuple[jax.Array, ...]:
        return *_normal((outs, images), "float32")(seed), jnp.asarray(index[:, 0] % (rows // 16))

    def product(seed: int) -> tuple[jax.Array, ...]:
        return _normal((side, side), "bfloat16")(seed) + _normal((side, side), "bfloat16")(
            seed + 100
        )

    def total(table: jax.Array, index: jax.Array) -> jax.Array:
        return jnp.sum(table.at[index].get(mode="promise_in_bounds"), axis=1, dtype=jnp.float32)

    def add(updates: jax.Array, index: jax.Array) -> jax.Array:
        return (
            jnp.zeros((rows // 16, images), jnp.float32)
            .at[index]
            .add(updates, mode="promise_in_bounds")
        )

    return {
        "launch": Ceiling(
            lambda a: a + 1,
            _normal((32,), "float32"),
            1,
            "launches/us",
            "back to back in a loop, nothing to do",
            1e6,
        ),
        "copy": Ceiling(
            lambda a: -a,
            _normal((big,), "bfloat16"),
            4 * big,
            "TB/s",
            "read and written bytes, elementwise, beyond L2",
        ),
        "matmul": Ceiling(
            jnp.matmul,
            product,
            2 * side**3,
            "TFLOP/s",
            f"dense bfloat16, {side} cubed, random normal operands",
        ),
        **{
            f"row gather, {table * images >> 19} MiB": Ceiling(
                total,
                functools.partial(gathered, table=table),
                2 * outs * near * images,
                "TB/s",
                f"bytes of gathered rows, {near} rows of {2 * images} bytes at random summed at "
                f"once; by XLA: a floor for kernels",
            )
            for table in (rows, rows // 4)
        },
        "reduction": Ceiling(
            lambda a: jnp.sum(a, axis=1),
            _normal((big >> 14, 1 << 13), "float32"),
            4 * (big >> 1),
            "TB/s",
            "float32 read and summed",
        ),
        "scatter-add": Ceiling(
            add,
            added,
            4 * outs * images,
            "TB/s",
            f"float32 rows added into {rows // 16} rows at random, by XLA; the zeros are in the "
            f"time",
        ),
    }


def measure_ceiling(name: str, quick: bool) -> dict[str, Any]:
    """Measures one ceiling.

    Args:
      name: of `ceilings`.
      quick: tiny sizes, two repetitions.

    Returns:
      The rate, its unit, what was done, and milliseconds of a launch.
    """
    own = ceilings(quick)[name]
    sets = gpu_clock.rotate(
        own.operands, 1 if name.startswith("row gather") else 2
    )  # the table of the gather shall stay in the L2 cache
    first = gpu_clock.Program(own.function, sets, 2)
    first()
    count = gpu_clock.rounds(first(), sets, 0.5 if quick else 20.0)
    milliseconds = gpu_clock.sample(
        {name: gpu_clock.Program(own.function, sets, count)}, 2 if quick else 9
    )[name]
    rate = own.amount / (1e-3 * max(milliseconds["median"], 1e-9)) / own.scale
    return {
        "name": name,
        "rate": float(f"{rate:.4g}"),
        "unit": own.unit,
        "what": own.what,
        "ms": milliseconds,
        **_about(sets),
    }


def _about(sets: Sets) -> dict[str, Any]:
    return {name: value for name, value in sets.about.items() if name != "l2"}


KERNELS = {
    "row gather, kernels": "bytes of gathered rows, forward, in the block-sparse kernels",
    "float32 sums, kernels": "bytes of float32 sums into rows in memory, input gradient by "
    "scatter, in the Triton kernels",
}


def measure_kernel(name: str, quick: bool) -> dict[str, Any]:
    """A rate of the convolution's own accesses: a 1x1 block-sparse convolution so thin that they
    decide.

    A group keeps half of the channels and gives 16 filters, so that a row is read or added once for
    16 multiplications; its operands lie in L2.

    Args:
      name: of `KERNELS`.
      quick: XLA's implementation on a tiny shape.

    Returns:
      Bytes per second, by implementation.
    """
    cin, images, groups = (16, 8, 2) if quick else (512, 16384, 32)
    spec = ConvSpec(
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
    adds, rates = name.startswith("float32"), {}
    for which, one in gpu_check.implementations().items():
        if (
            isinstance(one, str)
            or one.supports(spec)
            or (which == "xla" and not quick)
            or (which == "mosaic_gpu" and adds)
        ):
            continue

        def forward(x, dy, values, *index, one=one):
            return one.forward(spec, x, values, *index)

        scattering = gpu_check.variant(one, "scatter" if which == "triton" else "")

        def input_gradient(x, dy, values, *index, one=scattering):
            return one.input_gradient(spec, dy, values, *index)

        sets = gpu_clock.rotate(lambda seed: gpu_shapes.operands(spec, seed), 1)
        programs = gpu_clock.build(
            {which: input_gradient if adds else forward}, sets, 2 if quick else 500
        )
        milliseconds = gpu_clock.sample(programs, 2 if quick else 9)[which]
        rate = (
            (4 if adds else 2)
            * groups
            * spec.kept
            * images
            / (1e-3 * milliseconds["median"])
            / 1e12
        )
        rates[which] = {"rate": float(f"{rate:.4g}"), "ms": milliseconds}
    what = f"{KERNELS[name]}: {groups} groups of 16 filters, {2 * cin * images >> 20} MiB of activations"
    rate = max((r["rate"] for r in rates.values()), default=None)
    return {"name": name, "unit": "TB/s", "what": what, "rates": rates, "rate": rate}
