"""The convolution with its derivatives: the gradients do only the kept work too."""

import dataclasses
import functools
import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.block_sparse_conv import xla
from pallas_kernels.block_sparse_conv.epilogue import Epilogue, apply_epilogue
from pallas_kernels.block_sparse_conv.index import Index
from pallas_kernels.block_sparse_conv.plan import Plan
from pallas_kernels.block_sparse_conv.spec import ConvSpec, Implementation
from pallas_kernels.sharding import over_images, whole_but_images

_INDEX = ("g s", "g k", "g t")
_OPERANDS = {
    "forward": ("c h w n", "g k t s", *_INDEX, "o", "o", "o p q n"),
    "input_gradient": ("o p q n", "g k t s", *_INDEX),
    "weight_gradient": ("c h w n", "o p q n", *_INDEX),
}
"""The axes of each pass's operands; the last three are scale, bias and residual."""
_PLAN = ("g lf", "g lr", "le", "lw lu", "lb")
"""The axes of a plan's arrays, which follow a pass's operands."""
_RESULT = {"forward": "o p q n", "input_gradient": "c h w n", "weight_gradient": "g k t s"}


class Operands(NamedTuple):
    """The arrays of a convolution.

    Attributes:
      x: activations `[cin, h, w, n]`.
      values: packed weights `[groups, kept, kept_taps, group_size]`.
      places: which weights they are.
      epilogue: scale, bias and residual, each may be None.
      plan: the lists of the layout, or None.
    """

    x: Any
    values: Any
    places: Index
    epilogue: Epilogue
    plan: Plan | None = None


def whole(operands: Operands) -> Operands:
    """The operands, lying whole on every device but for the images (`whole_but_images`).

    Args:
      operands: the arrays.

    Returns:
      The same arrays.
    """
    arrays, tree = jax.tree.flatten(operands)
    names = (*operands[:2], *operands.places, *operands.epilogue)
    axes = _axes("forward", names, operands.plan)
    return jax.tree.unflatten(tree, whole_but_images(axes, arrays))


def _axes(name: str, operands: Sequence[Any], plan: Plan | None) -> tuple[str, ...]:
    """The axes of what there is of a pass's operands, and of the plan behind them."""
    is_present = (operand is not None for operand in operands)
    axes = itertools.compress(_OPERANDS[name], is_present)
    return (*axes, *(() if plan is None else _PLAN))


class Residuals(NamedTuple):
    """What the backward pass needs.

    Attributes:
      operands: of the forward pass.
      y: the output where a ReLU ends the forward pass, else None.
    """

    operands: Operands
    y: jax.Array | None


class ByMode(NamedTuple):
    """The implementations of one convolution.

    Attributes:
      forward: runs the forward pass where no gradients follow.
      training: runs all three passes where they do.
    """

    forward: Implementation
    training: Implementation


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def convolve(spec: ConvSpec, implementations: ByMode, operands: Operands) -> jax.Array:
    """Convolves, by the implementation that is chosen for calls with or without gradients.

    Args:
      spec: the static sizes.
      implementations: what runs.
      operands: the arrays.

    Returns:
      `y [cout, ho, wo, n]`.
    """
    return _forward(spec, implementations.forward, operands)


def _convolve_fwd(
    spec: ConvSpec, implementations: ByMode, operands: Operands
) -> tuple[jax.Array, Residuals]:
    training = dataclasses.replace(spec, gradients=True)
    y = _forward(training, implementations.training, operands)
    return y, Residuals(operands, y if spec.relu else None)


def _convolve_bwd(
    spec: ConvSpec, implementations: ByMode, residuals: Residuals, dy: jax.Array
) -> tuple[Operands]:
    """The gradients of all operands.

    With `d` the gradient before the ReLU and V that of the values at scale 1, the scale's gradient
    is `sum_k values V` and the values' gradient is `scale V`.
    """
    spec = dataclasses.replace(spec, gradients=True)
    implementation = implementations.training
    (x, values, places, epilogue, plan), y = residuals
    scale, bias, residual = epilogue
    d = dy if y is None else jnp.where(y > 0, dy, 0)
    scaled_values = values
    if scale is not None:
        scale_of_group = scale[places.filters][:, None, None, :]
        scaled_values = values.astype(jnp.float32) * scale_of_group
    values_of_x = scaled_values.astype(x.dtype)
    dx = _run_pass("input_gradient", spec, implementation, plan, d, values_of_x, *places)
    dvalues = _run_pass("weight_gradient", spec, implementation, plan, x, d, *places)
    dscale = dbias = None
    if scale is not None:
        rounded = values.astype(x.dtype).astype(jnp.float32)
        per_filter = (dvalues * rounded).sum((1, 2))
        dscale = jnp.zeros_like(scale).at[places.filters].set(per_filter)
        dvalues *= scale_of_group
    if bias is not None:
        dbias = d.sum((1, 2, 3), dtype=jnp.float32)
    dresidual = None if residual is None else d
    gradients = Operands(
        x=dx,
        values=dvalues.astype(values.dtype),
        places=Index(None, None, None),
        epilogue=Epilogue(dscale, dbias, dresidual),
    )
    return (gradients,)


convolve.defvjp(_convolve_fwd, _convolve_bwd)


def _forward(spec: ConvSpec, implementation: Implementation, operands: Operands) -> jax.Array:
    x, values, places, epilogue, plan = operands
    arrays = (x, values.astype(x.dtype), *places)
    if implementation.fused:
        return _run_pass("forward", spec, implementation, plan, *arrays, *epilogue)
    y = _run_pass("forward", spec, implementation, plan, *arrays)
    return apply_epilogue(y, *epilogue, relu=spec.relu)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1, 2))
def _run_pass(
    name: str,
    spec: ConvSpec,
    implementation: Implementation,
    plan: Plan | None,
    *operands: jax.Array | None,
) -> jax.Array:
    """One pass, whose own derivative is that of XLA's formulation.

    Native kernels and GPU kernels have no derivative; second derivatives use this one.
    """
    if name not in implementation.plans:
        plan = None
    arrays, tree = jax.tree.flatten((operands, plan))

    def run(*arrays: jax.Array) -> jax.Array:
        every, plan = jax.tree.unflatten(tree, arrays)
        part = dataclasses.replace(spec, batch=arrays[0].shape[3])
        return implementation.run(name, part, *every, plan=plan)

    return over_images(run, _axes(name, operands, plan), _RESULT[name])(*arrays)


@_run_pass.defjvp
def _run_pass_jvp(
    name: str, spec: ConvSpec, implementation: Implementation, primals: Any, tangents: Any
) -> tuple[jax.Array, jax.Array]:
    def xla_pass(plan: Plan | None, *operands: Any) -> jax.Array:
        if name != "forward" or not implementation.fused:
            return getattr(xla.IMPLEMENTATION, name)(spec, *operands)
        arrays, epilogue = operands[:5], Epilogue(*operands[5:])
        y = xla.IMPLEMENTATION.forward(spec, *arrays)
        return apply_epilogue(y, *epilogue, relu=spec.relu)

    _, tangent = jax.jvp(xla_pass, primals, tangents)
    return _run_pass(name, spec, implementation, *primals), tangent
