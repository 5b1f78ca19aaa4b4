"""The native operation with its gradient, whose own derivatives are those of XLA's formulation."""

import functools
from typing import Any, NamedTuple

import jax
import numpy as np

from pallas_kernels.batch_norm import cpu, xla
from pallas_kernels.batch_norm.spec import NormSpec

Array = jax.Array


class Operands(NamedTuple):
    """The arrays of the operation.

    Attributes:
      x: activations `[channels, ...]`.
      scale, bias: one float32 number for each channel.
      residual: as x, or None.
    """

    x: Any
    scale: Any
    bias: Any
    residual: Any


class Residuals(NamedTuple):
    """What the backward pass reads.

    Attributes:
      operands: of the forward pass, without the residual.
      y: the output, where its sign depends on a residual; else None.
      signs: a bit for each element of y, or None.
      mean, variance: of the forward pass.
    """

    operands: Operands
    y: Array | None
    signs: Array | None
    mean: Array
    variance: Array


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def normalise(spec: NormSpec, operands: Operands) -> tuple[tuple[Array, ...], Array, Array]:
    """Runs the native kernels.

    Args:
      spec: the static arguments.
      operands: the arrays.

    Returns:
      `(ys, mean, variance)`, y twice where the spec says so.
    """
    y, mean, variance, _ = _forward(spec, False, *operands)
    return (y,) * spec.outputs, mean, variance


def _normalise_fwd(spec: NormSpec, operands: Operands) -> tuple[Any, Residuals]:
    keeps_signs = spec.relu and spec.adds_residual
    y, mean, variance, signs = _forward(spec, keeps_signs, *operands)
    of_y = y if keeps_signs else None
    residuals = Residuals(operands._replace(residual=None), of_y, signs, mean, variance)
    return ((y,) * spec.outputs, mean, variance), residuals


def _normalise_bwd(spec: NormSpec, residuals: Residuals, cotangents: Any) -> tuple[Operands]:
    (dy, *more), dmean, dvariance = cotangents
    if more and spec.adds_residual and not spec.relu:
        dy, more = dy + more[0], []
    (x, scale, bias, _), y, signs, mean, variance = residuals
    rows = (scale, bias, mean, variance, dmean, dvariance)
    dx, dscale, dbias, before_relu = _backward(
        spec, dy, more[0] if more else None, x, y, *rows, signs
    )
    dresidual = None
    if spec.adds_residual:
        dresidual = before_relu if spec.relu else dy
    return (Operands(dx, dscale, dbias, dresidual),)


normalise.defvjp(_normalise_fwd, _normalise_bwd)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _forward(
    spec: NormSpec, keeps_signs: bool, *operands: Any
) -> tuple[Array, Array, Array, Array | None]:
    return cpu.forward(spec, keeps_signs, *operands)


@_forward.defjvp
def _(spec: NormSpec, keeps_signs: bool, primals: Any, tangents: Any) -> Any:
    _, tangent = jax.jvp(functools.partial(xla.forward, spec), primals, tangents)
    *values, signs = _forward(spec, keeps_signs, *primals)
    no_tangent = None if signs is None else np.zeros(signs.shape, jax.dtypes.float0)
    return (*values, signs), (*tangent, no_tangent)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _backward(spec: NormSpec, *operands: Any) -> tuple[Array, Array, Array, Array | None]:
    """The last operand, the signs of y, has no tangent and takes the place of y."""
    dy, more, x, _, *rows, signs = operands
    return cpu.backward(spec, dy, more, x, signs, *rows)


@_backward.defjvp
def _(spec: NormSpec, primals: Any, tangents: Any) -> Any:
    backward = functools.partial(xla.backward, spec)
    _, tangent = jax.jvp(backward, primals[:-1], tangents[:-1])
    return _backward(spec, *primals), tangent
