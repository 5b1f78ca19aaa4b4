"""What the device can do at most: copies, matrix products, rows gathered from the L2 cache, float32 sums, the least time of a launch."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.gpu_check import implementations
from pallas_kernels import gpu_clock, gpu_shapes, shapes
from pallas_kernels.block_sparse_conv import ConvSpec
from pallas_kernels.gpu_clock import Sets


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

    Reference: ours.
    """
    big, side, rows, outs, near, images = (1 << 14, 64, 64, 32, 4, 32) if quick else (1 << 30, 8192, 4096 * 16, 4096 * 8, 32, 256)
    rng = np.random.default_rng(0)
    index = rng.integers(0, rows, (outs, near)).astype(np.int32)

    def gathered(seed: int) -> tuple[jax.Array, ...]:
        return *_normal((rows, images), "bfloat16")(seed), jnp.asarray(index)

    def added(seed: int) -> tuple[jax.Array, ...]:
        return *_normal((outs, images), "float32")(seed), jnp.asarray(index[:, 0] % (rows // 16))

    def product(seed: int) -> tuple[jax.Array, ...]:
        return _normal((side, side), "bfloat16")(seed) + _normal((side, side), "bfloat16")(seed + 100)

    def total(table: jax.Array, index: jax.Array) -> jax.Array:
        return jnp.sum(table.at[index].get(mode="promise_in_bounds"), axis=1, dtype=jnp.float32)

    def add(updates: jax.Array, index: jax.Array) -> jax.Array:
        return jnp.zeros((rows // 16, images), jnp.float32).at[index].add(updates, mode="promise_in_bounds")

    return {
        "launch": Ceiling(lambda a: a + 1, _normal((32,), "float32"), 1, "launches/us", "back to back in a loop, nothing to do", 1e6),
        "copy": Ceiling(lambda a: -a, _normal((big,), "bfloat16"), 4 * big, "TB/s", "read and written bytes, elementwise, beyond L2"),
        "matmul": Ceiling(jnp.matmul, product, 2 * side**3, "TFLOP/s", f"dense bfloat16, {side} cubed, random normal operands"),
        "row gather": Ceiling(
            total, gathered, 2 * outs * near * images, "TB/s",
            f"bytes of gathered rows, {near} random rows of {2 * images} bytes summed at once, out of {2 * rows * images >> 20} MiB; "
            "by XLA: a floor of what a kernel reaches",
        ),
        "reduction": Ceiling(
            lambda a: jnp.sum(a, axis=1), _normal((big >> 14, 1 << 13), "float32"), 4 * (big >> 1), "TB/s", "float32 read and summed"
        ),
        "scatter-add": Ceiling(
            add, added, 4 * outs * images, "TB/s", f"float32 rows added into {rows // 16} rows at random, by XLA; the zeros are in the time"
        ),
    }  # fmt: skip


def measure_ceiling(name: str, quick: bool) -> dict[str, Any]:
    """Measures one ceiling.

    Args:
      name: of `ceilings`.
      quick: tiny sizes, two repetitions.

    Returns:
      The rate, its unit, what was done, and milliseconds of a launch.

    Reference: ours.
    """
    own = ceilings(quick)[name]
    sets = gpu_clock.rotate(own.operands, 1 if name == "row gather" else 2)  # the table of the gather shall stay in the L2 cache
    first = gpu_clock.Program(own.function, sets, 2)
    first()
    count = gpu_clock.rounds(first(), sets, 0.5 if quick else 20.0)
    milliseconds = gpu_clock.sample({name: gpu_clock.Program(own.function, sets, count)}, 2 if quick else 9)[name]
    rate = own.amount / (1e-3 * max(milliseconds["median"], 1e-9)) / own.scale
    return {"name": name, "rate": float(f"{rate:.4g}"), "unit": own.unit, "what": own.what, "ms": milliseconds, **_about(sets)}


def _about(sets: Sets) -> dict[str, Any]:
    return {name: value for name, value in sets.about.items() if name != "l2"}


def row_gather_kernel(quick: bool) -> dict[str, Any]:
    """The gather rate of the convolution's own access: a 1x1 block-sparse convolution so thin that its gathers decide.

    One group keeps all channels and gives 16 filters: each row is read once and multiplied 16 times; all rows of the image tile lie in L2.

    Args:
      quick: XLA's implementation on a tiny shape.

    Returns:
      Bytes of gathered rows per second, by implementation.

    Reference: ours.
    """
    cin, images, groups = (16, 8, 2) if quick else (512, 16384, 32)
    spec = ConvSpec(
        cin=cin, height=1, width=1, batch=images, kernel=(1, 1), cout=16 * groups, groups=groups, kept=cin // 2, kept_taps=1, group_size=16,
        dtype="bfloat16", channel_block=8,
    )  # fmt: skip
    rates = {}
    for name, one in implementations().items():
        if isinstance(one, str) or one.supports(spec) or (name == "xla" and not quick):
            continue

        def forward(x, dy, values, *index, one=one):
            return shapes.convolve(spec, one, x, values, *index, channel_block=8)

        sets = gpu_clock.rotate(lambda seed: gpu_shapes.operands(spec, seed), 1)
        milliseconds = gpu_clock.sample({name: gpu_clock.Program(forward, sets, 2 if quick else 50)}, 2 if quick else 9)[name]
        rate = 2 * groups * spec.kept * images / (1e-3 * milliseconds["median"]) / 1e12
        rates[name] = {"rate": float(f"{rate:.4g}"), "ms": milliseconds}
    what = (
        f"bytes of gathered rows by the block-sparse kernels, {groups} groups of 16 filters over a {2 * cin * images >> 20} MiB input in L2"
    )
    return {
        "name": "row gather, kernels",
        "unit": "TB/s",
        "what": what,
        "rates": rates,
        "rate": max((r["rate"] for r in rates.values()), default=None),
    }
