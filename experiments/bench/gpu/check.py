"""Compares the passes of an implementation with float64, before anything is timed."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.bench.gpu import shapes
from experiments.bench.gpu.check_cases import CheckCase
from experiments.bench.gpu.float64 import as_float64, check_error, reference
from experiments.bench.gpu.implementations import variant
from experiments.bench.shapes import convolve
from experiments.measuring.row_names import PASS_NAMES
from pallas_kernels.block_sparse_conv import ConvSpec, Implementation


def check(case: CheckCase, implementation: Implementation) -> dict[str, Any]:
    """Compares the output and both gradients with float64.

    Args:
      case: what is checked.
      implementation: the record.

    Returns:
      The relative error of each pass; {"refused": why} if it cannot serve the shape.

    Raises:
      AssertionError: a pass is wrong.
    """
    spec = case.spec
    if reason := implementation.supports(spec):
        return {"refused": reason}
    implementation = variant(implementation, case.variant)
    x, dy, values, *index = shapes.operands(spec, seed=len(str(spec)))
    values = values.astype(jnp.float32)  # so that their gradient stays in float32
    epilogue = _epilogue_operands(case)

    @jax.jit
    def run(
        x: jax.Array,
        dy: jax.Array,
        values: jax.Array,
        epilogue: dict[str, jax.Array],
        *index: jax.Array,
    ) -> tuple[jax.Array, ...]:
        def conv(x: jax.Array, values: jax.Array) -> jax.Array:
            return convolve(
                spec,
                implementation,
                x,
                values,
                *index,
                **epilogue,
                relu=spec.relu,
                channel_block=spec.channel_block,
                precision=spec.precision,
            )

        y, pullback = jax.vjp(conv, x, values)
        return y, *pullback(dy)

    results = [as_float64(array) for array in run(x, dy, values, epilogue, *index)]
    expected = _expected(case, results[0], (x, dy, values), index, epilogue)
    return {
        name: check_error(name, result, exact, case.kind, spec)
        for name, result, exact in zip(PASS_NAMES, results, expected, strict=True)
    }


def _epilogue_operands(case: CheckCase) -> dict[str, jax.Array]:
    spec = case.spec
    keys = jax.random.split(jax.random.key(1), 3)
    operands = {
        "scale": jax.random.uniform(keys[0], (spec.cout,), minval=0.5, maxval=1.5),
        "bias": 5 * jax.random.normal(keys[1], (spec.cout,)),
        "residual": 5 * jax.random.normal(keys[2], spec.out_shape, spec.dtype),
    }
    return {name: operands[name] for name in case.epilogue}


def _expected(
    case: CheckCase,
    y: np.ndarray,
    operands: tuple[jax.Array, ...],
    index: list[jax.Array],
    epilogue: dict[str, jax.Array],
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The output and both gradients in float64, with the epilogue.

    The ReLU's gradient flows where the output `y` that is checked is positive.
    """
    spec = case.spec
    x, dy, values = (as_float64(array) for array in operands)
    filters, channels, taps = (np.asarray(array) for array in index)
    if spec.relu:
        dy = dy * (y > 0)
    parts = {name: as_float64(array) for name, array in epilogue.items()}
    scale = parts.get("scale", np.ones(spec.cout))
    bias = parts.get("bias", np.zeros(spec.cout))
    group_scale = scale[filters][:, None, None, :]
    exact_y, dx, dvalues = reference(spec, x, dy, values, filters, channels, taps)
    if "scale" in parts:
        _, dx, _ = reference(spec, x, dy, values * group_scale, filters, channels, taps)
    exact_y = exact_y * scale[:, None, None, None] + bias[:, None, None, None]
    exact_y = exact_y + parts.get("residual", 0)
    return np.maximum(exact_y, 0) if spec.relu else exact_y, dx, dvalues * group_scale


def check_slices(
    spec: ConvSpec, kind: str, operands: tuple[jax.Array, ...], results: dict[str, jax.Array]
) -> None:
    """Compares parts of large results with float64.

    The parts are the first and the last image of the output and of the input gradient, and one row
    of the weight gradient, which is a sum over all images.

    Args:
      spec: the static sizes.
      kind: of `KINDS`, for the limits.
      operands: of the program: `(x, dy, values, filters, channels, taps)`.
      results: of each of `PASS_NAMES`.

    Raises:
      AssertionError: a pass is wrong.
    """
    x, dy, values, *index = operands
    ends = np.array([0, spec.batch - 1])
    filters, channels, taps = (np.asarray(array) for array in index)
    y, dx, _ = reference(
        dataclasses.replace(spec, batch=2),
        as_float64(x[..., ends]),
        as_float64(dy[..., ends]),
        as_float64(values.astype(spec.dtype)),
        filters,
        channels,
        taps,
    )
    width = min(8, spec.group_size)  # of the row: the last channel of the last group
    row = dataclasses.replace(spec, cin=1, cout=width, groups=1, kept=1, group_size=width)
    _, _, dvalues = reference(
        row,
        as_float64(x[channels[-1, -1:]]),
        as_float64(dy[filters[-1, :width]]),
        np.zeros(row.packed_shape),
        np.arange(width)[None],
        np.zeros((1, 1), np.int32),
        taps[-1:],
    )
    parts = {
        "forward": (results["forward"][..., ends], y),
        "input gradient": (results["input gradient"][..., ends], dx),
        "weight gradient": (results["weight gradient"][-1:, -1:, :, :width], dvalues),
    }
    for pass_name, (result, expected) in parts.items():
        check_error(pass_name, as_float64(result), expected, kind, spec)
