"""The convolution with its derivatives: the gradients do only the kept work too."""

import dataclasses
import functools
import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.block_sparse_conv import norm_passes, xla
from pallas_kernels.block_sparse_conv.epilogue import Epilogue, apply_epilogue
from pallas_kernels.block_sparse_conv.index import Index
from pallas_kernels.block_sparse_conv.plan import Plan
from pallas_kernels.block_sparse_conv.spec import ConvSpec, Implementation
from pallas_kernels.sharding import Results, over_images, whole_but_images

INDEX_AXES = ("g s", "g k", "g t")
"""The axes of an index."""
_OPERANDS = {
    "forward": ("c h w n", "g k t s", *INDEX_AXES, "o", "o", "o p q n"),
    "input_gradient": ("o p q n", "g k t s", *INDEX_AXES),
    "weight_gradient": ("c h w n", "o p q n", *INDEX_AXES, "c", "c"),
    "forward_with_sums": ("c h w n", "g k t s", *INDEX_AXES, "c", "c"),
    "norm_input_gradient": (
        "o p q n",
        "g k t s",
        *INDEX_AXES,
        "c h w n",
        "c",
        "c",
        *["c h w n"] * 2,
    ),
}
"""The axes of each pass's operands; the last three of "forward" are scale, bias and residual."""
PLAN_AXES = ("g lf", "g lr", "le", "lw lu", "lb")
"""The axes of a plan's arrays, which follow a pass's operands."""
_RESULT: dict[str, Results] = {
    "forward": "o p q n",
    "input_gradient": "c h w n",
    "weight_gradient": "g k t s",
    "forward_with_sums": ("o p q n", "sums o"),
    "norm_input_gradient": ("c h w n", "sums c", "c h w n"),
}


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
    return (*axes, *(() if plan is None else PLAN_AXES))


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
    dx = run_pass("input_gradient", spec, implementation, plan, d, values_of_x, *places)
    dvalues = run_pass("weight_gradient", spec, implementation, plan, x, d, *places)
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
        return run_pass("forward", spec, implementation, plan, *arrays, *epilogue)
    y = run_pass("forward", spec, implementation, plan, *arrays)
    return apply_epilogue(y, *epilogue, relu=spec.relu)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1, 2))
def run_pass(
    name: str,
    spec: ConvSpec,
    implementation: Implementation,
    plan: Plan | None,
    *operands: jax.Array | None,
) -> Any:
    """One pass, whose own derivative is that of XLA's formulation.

    Native kernels and GPU kernels have no derivative; second derivatives use this one.

    Args:
      name: one of `PASSES` or `NORM_PASSES`.
      spec: the static sizes.
      implementation: that has the pass.
      plan: the lists of the layout, or None.
      *operands: of the pass; None for what is absent.

    Returns:
      The pass's result, or results.
    """
    if name not in implementation.plans:
        plan = None
    arrays, tree = jax.tree.flatten((operands, plan))

    def run(*arrays: jax.Array) -> jax.Array:
        every, plan = jax.tree.unflatten(tree, arrays)
        part = dataclasses.replace(spec, batch=arrays[0].shape[3])
        return implementation.run(name, part, *every, plan=plan)

    result = _RESULT[name]
    if name == "norm_input_gradient" and operands[8] is None:  # not joined: no g
        result = result[:2]
    return over_images(run, _axes(name, operands, plan), result)(*arrays)


@run_pass.defjvp
def _run_pass_jvp(
    name: str, spec: ConvSpec, implementation: Implementation, primals: Any, tangents: Any
) -> tuple[Any, Any]:
    def xla_pass(plan: Plan | None, *operands: Any) -> Any:
        if name == "weight_gradient":
            operands = norm_passes.normalised(spec, *operands)
        if name == "forward_with_sums":
            return norm_passes.forward_with_sums(xla.IMPLEMENTATION.forward, spec, *operands)
        if name == "norm_input_gradient":
            plain = xla.IMPLEMENTATION.input_gradient
            return norm_passes.norm_input_gradient(plain, spec, *operands)
        if name != "forward" or not implementation.fused:
            return getattr(xla.IMPLEMENTATION, name)(spec, *operands)
        arrays, epilogue = operands[:5], Epilogue(*operands[5:])
        y = xla.IMPLEMENTATION.forward(spec, *arrays)
        return apply_epilogue(y, *epilogue, relu=spec.relu)

    _, tangent = jax.jvp(xla_pass, primals, tangents)
    return run_pass(name, spec, implementation, *primals), tangent
