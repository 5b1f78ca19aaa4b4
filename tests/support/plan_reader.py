"""An implementation that reads plans and runs anywhere: XLA's operations on what the lists say."""

import jax
import jax.numpy as jnp

from pallas_kernels.block_sparse_conv import (
    PASSES,
    ConvSpec,
    Implementation,
    Index,
    Plan,
    choice,
    xla,
)
from pallas_kernels.block_sparse_conv.plan import plan_sizes
from pallas_kernels.dense_conv import dense_conv
from pallas_kernels.varying import vary_alike

NAME = "plan reader"


def _index(spec: ConvSpec, plan: Plan) -> Index:
    """The index arrays that a plan's lists were made from."""
    entries = plan.forward[:, : spec.kept * spec.kept_taps]
    entries = entries.reshape(spec.groups, spec.kept, spec.kept_taps)
    taps = (entries >> 4 & 15) * spec.kernel[1] + (entries & 15)
    return Index(plan.rows[:, : spec.group_size], entries[:, :, 0] >> 8, taps[:, 0])


def _kernel(spec: ConvSpec, values: jax.Array, plan: Plan) -> jax.Array:
    """The dense conv kernel as a plan's table has it: every stage adds its weights."""
    sizes = plan_sizes(spec.kernel_shape, spec.packed_shape, spec.channel_block)
    segment = jnp.searchsorted(plan.bounds, jnp.arange(sizes.stages + 1), side="right") - 1
    m, k = jnp.arange(sizes.block), jnp.arange(sizes.depth)
    channel = (segment // 4 * sizes.block)[:, None] + m  # [stage, m]
    place = plan.weights[:, m // sizes.run]
    row = place // sizes.parts + m % sizes.run * spec.kept_taps
    first = row * spec.group_size + place % sizes.parts * sizes.depth
    entry = plan.entries.reshape(-1, 1, sizes.depth)
    is_kept = (place >= 0)[:, :, None] & (entry >= 0)
    weight = values.reshape(-1).at[first[:, :, None] + k].get(mode="fill", fill_value=0)
    kernel = jnp.zeros(spec.kernel_shape, values.dtype)
    where = (entry >> 4 & 15, entry & 15, channel[:, :, None], entry >> 8)
    return kernel.at[where].add(jnp.where(is_kept, weight, 0), mode="drop")


def _forward(spec, x, values, *_, plan):
    return xla.IMPLEMENTATION.forward(spec, x, values, *_index(spec, plan))


def _weight_gradient(spec, x, dy, *_, plan):
    return xla.IMPLEMENTATION.weight_gradient(spec, x, dy, *_index(spec, plan))


def _input_gradient(spec, dy, values, *_, plan):
    geometry = {name: getattr(spec, name) for name in ("strides", "padding", "dilation")}
    kernel = _kernel(spec, values, plan)
    x, _ = vary_alike((jnp.zeros(spec.in_shape, dy.dtype), dy))  # else a sum over devices
    _, pullback = jax.vjp(lambda x: dense_conv(x, kernel, **geometry, data_format="CHWN"), x)
    return pullback(dy)[0]


IMPLEMENTATION = Implementation(
    NAME, lambda spec: None, _forward, _input_gradient, _weight_gradient, plans=PASSES
)
"""Without a plan its passes are a TypeError."""


def register() -> None:
    """Makes it known under `NAME`, for as long as the process runs."""
    choice.IMPLEMENTATIONS[NAME] = IMPLEMENTATION
