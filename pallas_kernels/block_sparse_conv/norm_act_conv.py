"""Convolutions between batch norms, in the passes of an implementation that has them.

`norm_act_conv` reads a raw output z with its sums, normalises it (`pallas_kernels.batch_norm`) and
convolves; its own output leaves raw, with its sums. The forward pass emits the sums. The input
gradient masks, scales and sums what it is about to write, so that batch norm and ReLU cost no pass
of their own on the way back but the one that adds the gradient of the sums.
"""

import dataclasses
import functools
import itertools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from pallas_kernels import batch_norm
from pallas_kernels.batch_norm import Affine, Norm, NormSpec
from pallas_kernels.block_sparse_conv.checks import checked_spec
from pallas_kernels.block_sparse_conv.choice import fuses_norms, resolve
from pallas_kernels.block_sparse_conv.derivative import INDEX_AXES, PLAN_AXES, run_pass
from pallas_kernels.block_sparse_conv.index import Index
from pallas_kernels.block_sparse_conv.plan import Plan, check_plan
from pallas_kernels.block_sparse_conv.spec import ConvSpec, Implementation
from pallas_kernels.reverse_mode import reverse_mode_only
from pallas_kernels.sharding import whole_but_images
from pallas_kernels.varying import vary_alike


class NormConv(NamedTuple):
    """What a convolution between batch norms gives.

    Attributes:
      x: the activations that it read, `relu(norm(z) + shortcut)`; None where nobody else does.
      y: its raw output.
      sums: `[2, cout]`, the sums of y and of its squares over each channel.
    """

    x: jax.Array | None
    y: jax.Array
    sums: jax.Array


class _Call(NamedTuple):
    """The static arguments.

    Attributes:
      spec: the static sizes.
      implementation: has the passes between batch norms.
      norm_spec: of the input's norm.
    """

    spec: ConvSpec
    implementation: Implementation
    norm_spec: NormSpec


class _Operands(NamedTuple):
    """The arrays.

    Attributes:
      z: the input: raw where there is a norm.
      norm: of the input, or None.
      shortcut: added to the normalised input, or None.
      values: packed weights.
      places: which weights they are.
      plan: the lists of the layout, or None.
    """

    z: Any
    norm: Norm | None
    shortcut: Any
    values: Any
    places: Index
    plan: Plan | None


_AXES: tuple[tuple[str, ...], ...] = (
    *(("c h w n",), ("sums c", "c", "c"), ("c h w n",), ("g k t s",)),
    *(INDEX_AXES, PLAN_AXES),
)
"""The axes of the arrays of each operand."""


def norm_act_conv(
    z: Float[Array, "cin h w n"],
    norm: Norm | None,
    shortcut: Float[Array, "cin h w n"] | None,
    values: Float[Array, "groups kept kept_taps group_size"],
    filters: Int[Array, "groups group_size"],
    channels: Int[Array, "groups kept"],
    taps: Int[Array, "groups kept_taps"],
    *,
    norm_spec: NormSpec,
    implementation: str | Implementation,
    with_input: bool = False,
    **options: Any,
) -> NormConv:
    """Normalises, convolves with packed values, and sums.

    Args:
      z: the input: raw with a norm, else activations.
      norm: of the input, or None.
      shortcut: added to the normalised input before its ReLU, or None.
      values, filters, channels, taps: as in `block_sparse_conv`.
      norm_spec: of the norm.
      implementation: one that `fuses_norms` (`norm_implementation`), or its name.
      with_input: whether the caller reads x too.
      **options: `kernel_shape`, `strides`, `padding`, `dilation`, `channel_block`, `precision` and
        `plan` of `block_sparse_conv`.

    Returns:
      The output and its sums; and the input, where it is wanted.

    Raises:
      ValueError: an argument does not fit the others; the message names it.
      NotImplementedError: the implementation cannot run this convolution; the message says why.
    """
    plan = options.pop("plan", None)
    index = Index(filters, channels, taps)
    spec = checked_spec(z, values, index, relu=False, **options)
    if plan is not None:
        check_plan(plan, spec.kernel_shape, spec.packed_shape, spec.channel_block)
    spec = dataclasses.replace(spec, gradients=True)
    record = resolve(spec, implementation)
    index = Index(*(jnp.asarray(array, jnp.int32) for array in index))
    z, norm, shortcut, values = reverse_mode_only((z, norm, shortcut, values))
    operands = vary_alike(_whole(_Operands(z, norm, shortcut, values, index, plan)))
    x, y, sums = _norm_act_conv(_Call(spec, record, norm_spec), with_input, operands)
    return NormConv(x, y, sums)


def norm_implementation(
    implementation: str | None, x: Any, values: Any, index: Index, **options: Any
) -> Implementation | None:
    """What runs a convolution in the passes between batch norms.

    Args:
      implementation: a name, or None to choose.
      x: the input `[cin, h, w, n]`, or anything with its shape and dtype.
      values: packed weights, likewise.
      index: filters, channels and taps.
      **options: as in `norm_act_conv`, without the plan.

    Returns:
      The implementation; None where it has no such passes.

    Raises:
      ValueError: an argument does not fit the others; the message names it.
      NotImplementedError: the named implementation cannot run this convolution.
    """
    if not fuses_norms(implementation):
        return None
    spec = checked_spec(x, values, index, relu=False, **options)
    record = resolve(dataclasses.replace(spec, gradients=True), implementation)
    return record if record.fuses_norms else None


def _whole(operands: _Operands) -> _Operands:
    """The operands, lying whole on every device but for the images (`whole_but_images`)."""
    arrays, tree = jax.tree.flatten(operands)
    present = (axes for axes, part in zip(_AXES, operands) if part is not None)
    return jax.tree.unflatten(tree, whole_but_images([*itertools.chain(*present)], arrays))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _norm_act_conv(
    call: _Call, with_input: bool, operands: _Operands
) -> tuple[jax.Array | None, jax.Array, jax.Array]:
    return _forward(call, with_input, operands)[0]


def _forward(call: _Call, with_input: bool, operands: _Operands) -> tuple[Any, Any]:
    """The results, and what the backward pass needs.

    That is: the operands, the input (None where the kernels normalise while they load it), the
    output, and again the input where a shortcut was added.
    """
    x = operands.z
    if _loads_raw(call, operands, with_input):
        y, sums = run_pass(
            "forward_with_sums",
            dataclasses.replace(call.spec, relu=call.norm_spec.relu),
            call.implementation,
            operands.plan,
            x,
            operands.values.astype(x.dtype),
            *operands.places,
            *_affine(call, operands),
        )
        return (None, y, sums), (operands, None, y, None)
    if operands.norm is not None:
        scales = _affine(call, operands)
        x = batch_norm.apply(call.norm_spec, scales, operands.z, operands.shortcut)
        # The kernels read x from memory, and so should whoever else reads it: XLA would compute it
        # again from z and the shortcut.
        x = lax.optimization_barrier(x)
    y, sums = run_pass(
        "forward_with_sums",
        call.spec,
        call.implementation,
        operands.plan,
        x,
        operands.values.astype(x.dtype),
        *operands.places,
    )
    joined = None if operands.shortcut is None else x
    saved = operands._replace(shortcut=None), x, y, joined
    return (x if with_input else None, y, sums), saved


def _loads_raw(call: _Call, operands: _Operands, with_input: bool) -> bool:
    """Whether the kernels normalise the input while they load it, and nobody stores it."""
    if operands.norm is None or operands.shortcut is not None or with_input:
        return False
    normalises = call.implementation.normalises
    return normalises is not None and normalises(call.spec)


def _affine(call: _Call, operands: _Operands) -> Affine:
    assert operands.norm is not None
    return batch_norm.affine(call.norm_spec, operands.norm, batch_norm.count(operands.z))


def _norm_act_conv_fwd(call: _Call, with_input: bool, operands: _Operands) -> tuple[Any, Any]:
    return _forward(call, with_input, operands)


def _norm_act_conv_bwd(
    call: _Call, with_input: bool, saved: Any, gradients: Any
) -> tuple[_Operands]:
    (operands, x, y, joined), (more, dy, dsums) = saved, gradients
    spec, implementation, plan = call.spec, call.implementation, operands.plan
    dy = batch_norm.add_gradient_of_sums(dy, dsums, y)
    normed = dataclasses.replace(spec, relu=call.norm_spec.relu)
    if x is None:
        raw = (operands.z, dy, *operands.places, *_affine(call, operands))
        dvalues = run_pass("weight_gradient", normed, implementation, plan, *raw)
    else:
        dvalues = run_pass("weight_gradient", spec, implementation, plan, x, dy, *operands.places)
    backward = dy, operands.values.astype(dy.dtype), *operands.places
    dnorm, g = None, ()
    if operands.norm is None:
        dz = run_pass("input_gradient", spec, implementation, plan, *backward)
    else:
        dz, sums, *g = run_pass(
            "norm_input_gradient",
            normed,
            implementation,
            plan,
            *backward,
            operands.z,
            *_affine(call, operands),
            joined,
            more,
        )
        values = batch_norm.count(operands.z)
        dnorm = batch_norm.norm_gradient(call.norm_spec, operands.norm, values, sums)
    dvalues = dvalues.astype(operands.values.dtype)
    none = Index(None, None, None)
    return (_Operands(dz, dnorm, g[0] if g else None, dvalues, none, None),)


_norm_act_conv.defvjp(_norm_act_conv_fwd, _norm_act_conv_bwd)
