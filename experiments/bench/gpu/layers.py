"""Times conv layers on a GPU, one pass at a time.

Dense is cuDNN through XLA in NHWC and NCHW. The loops of `clock.py` keep operands in the layout
that the compiler prefers, so a dense convolution transposes its activations once in a program of
hundreds of launches.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from experiments.bench.dense_forms import COMMON_DENSE, DENSE, axes, run_dense
from experiments.bench.gpu import clock, shapes, tiles
from experiments.bench.gpu.check import check_slices
from experiments.bench.gpu.estimate import least_milliseconds
from experiments.bench.programs import single_passes
from experiments.bench.shapes import convolve
from experiments.measuring.row_names import MASKED
from pallas_kernels.block_sparse_conv import ConvSpec, Implementation


def measure_dense(spec: ConvSpec, repetitions: int) -> dict[str, Any]:
    """Times the dense convolution and the masked one.

    Args:
      spec: the static sizes; of the blocks only the density matters.
      repetitions: of each.

    Returns:
      "ms", the times by name and pass, and the size of the sets of operands.
    """

    def unmasked(name: str, x: jax.Array, kernel: jax.Array, mask: jax.Array) -> jax.Array:
        return run_dense(spec, name, x, kernel)

    def masked(x: jax.Array, kernel: jax.Array, mask: jax.Array) -> jax.Array:
        return run_dense(spec, "dense NHWC", x, jnp.where(mask, kernel, 0))

    all_taps = spec.kernel[0] * spec.kernel[1]
    dense = dataclasses.replace(spec, kept=spec.cin, kept_taps=all_taps)
    ms: dict[str, dict[str, Any]] = {}
    for dense_name in COMMON_DENSE:
        sets = clock.rotate(functools.partial(_dense_operands, spec, DENSE[dense_name]))
        runs = single_passes(functools.partial(unmasked, dense_name))
        passes = {(dense_name, pass_name): run for pass_name, run in runs.items()}
        if dense_name == "dense NHWC":
            runs = single_passes(masked)
            passes |= {(MASKED, pass_name): run for pass_name, run in runs.items()}
        # One after another: XLA times cuDNN's algorithms while it compiles.
        programs = clock.build(passes, sets, clock.rounds(least_milliseconds(dense), sets))
        for (name, pass_name), times in clock.sample(programs, repetitions).items():
            ms.setdefault(name, {})[pass_name] = times
    return {"ms": ms, **sets.describe()}


def _dense_operands(spec: ConvSpec, layout: str, seed: int) -> tuple[jax.Array, ...]:
    """`(x, dy, kernel, mask)`."""
    keys = jax.random.split(jax.random.key(seed), 4)
    x_shape, dy_shape = (
        tuple(shape[axis] for axis in axes("CHWN", layout))
        for shape in (spec.in_shape, spec.out_shape)
    )
    kernel_shape = (*spec.kernel, spec.cin, spec.cout)
    x, dy, kernel = (
        jax.random.normal(key, shape, spec.dtype)
        for key, shape in zip(keys[:3], (x_shape, dy_shape, kernel_shape), strict=True)
    )
    return x, dy, kernel, jax.random.bernoulli(keys[3], spec.density, kernel_shape)


def measure_sparse(
    spec: ConvSpec,
    name: str,
    implementation: Implementation,
    kind: str,
    repetitions: int,
    threads: int,
) -> dict[str, Any]:
    """Checks and times one implementation of the block-sparse convolution.

    Args:
      spec: the static sizes.
      name: of the implementation.
      implementation: the record.
      kind: of `float64.KINDS`, for the limits of the error.
      repetitions: of each pass.
      threads: how many compile at once.

    Returns:
      "ms", the times by pass, "tiles" by pass, and the size of the sets of operands; {"refused":
      why} if it cannot serve the shape.

    Raises:
      AssertionError: what was about to be timed is wrong.
    """
    if reason := implementation.supports(spec):
        return {"refused": reason}
    sets = clock.rotate(functools.partial(sparse_operands, spec))
    programs = clock.build(
        sparse_passes(spec, implementation),
        sets,
        clock.rounds(least_milliseconds(spec), sets),
        1 if name in ("xla", "dense") else threads,
    )
    results = {pass_name: program.output() for pass_name, program in programs.items()}
    check_slices(spec, kind, sets.operands[0], results)
    return {
        "ms": clock.sample(programs, repetitions),
        "tiles": tiles.chosen_tiles(name, spec),
        **sets.describe(),
    }


def sparse_operands(spec: ConvSpec, seed: int = 0) -> tuple[jax.Array, ...]:
    """Draws `(x, dy, values, filters, channels, taps)`, the values in float32.

    Parameters are in float32; the time includes their conversion to the activations' dtype.
    """
    x, dy, values, *index = shapes.operands(spec, seed)
    return x, dy, values.astype(jnp.float32), *index


def sparse_passes(spec: ConvSpec, implementation: Implementation) -> dict[str, Any]:
    """Returns the three passes of the block-sparse convolution, each alone, by name."""

    def conv(x: jax.Array, values: jax.Array, *index: jax.Array) -> jax.Array:
        return convolve(
            spec,
            implementation,
            x,
            values,
            *index,
            channel_block=spec.channel_block,
            precision=spec.precision,
        )

    return single_passes(conv)
