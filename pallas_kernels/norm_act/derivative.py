"""The native operation with its gradient, whose own derivatives are those of XLA's formulation."""

import functools
from typing import Any, NamedTuple

import jax

from pallas_kernels.norm_act import cpu, xla
from pallas_kernels.norm_act.spec import NormSpec

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
      mean, variance: of the forward pass.
    """

    operands: Operands
    y: Array | None
    mean: Array
    variance: Array


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def normalise(spec: NormSpec, operands: Operands) -> tuple[Array, Array, Array]:
    """Runs the native kernels.

    Args:
      spec: the static arguments.
      operands: the arrays.

    Returns:
      `(y, mean, variance)`.
    """
    return _forward(spec, *operands)


def _normalise_fwd(spec: NormSpec, operands: Operands) -> tuple[Any, Residuals]:
    y, mean, variance = _forward(spec, *operands)
    of_sign = y if spec.relu and spec.adds_residual else None
    kept = operands._replace(residual=None)
    return (y, mean, variance), Residuals(kept, of_sign, mean, variance)


def _normalise_bwd(spec: NormSpec, kept: Residuals, cotangents: Any) -> tuple[Operands]:
    dy, dmean, dvariance = cotangents
    x, scale, bias, _ = kept.operands
    rows = (scale, bias, kept.mean, kept.variance, dmean, dvariance)
    dx, dscale, dbias, before_relu = _backward(spec, dy, x, kept.y, *rows)
    dresidual = None
    if spec.adds_residual:
        dresidual = before_relu if spec.relu else dy
    return (Operands(dx, dscale, dbias, dresidual),)


normalise.defvjp(_normalise_fwd, _normalise_bwd)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _forward(spec: NormSpec, *operands: Any) -> tuple[Array, Array, Array]:
    return cpu.forward(spec, *operands)


@_forward.defjvp
def _(spec: NormSpec, primals: Any, tangents: Any) -> Any:
    _, tangent = jax.jvp(functools.partial(xla.forward, spec), primals, tangents)
    return _forward(spec, *primals), tangent


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _backward(spec: NormSpec, *operands: Any) -> tuple[Array, Array, Array, Array | None]:
    return cpu.backward(spec, *operands)


@_backward.defjvp
def _(spec: NormSpec, primals: Any, tangents: Any) -> Any:
    _, tangent = jax.jvp(functools.partial(xla.backward, spec), primals, tangents)
    return _backward(spec, *primals), tangent
