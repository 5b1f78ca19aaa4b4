"""Packing: the kept weights of a conv kernel as one array, and back."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from blocksparse_jax.layout import BlockLayout, block_index
from blocksparse_jax.origins import note, noted


def pack(
    kernel: Float[Array, "..."], layout: BlockLayout
) -> Float[Array, "... groups kept kept_taps group_size"]:
    """Gathers the kept weights of a conv kernel.

    `values[g, k, t, i] = kernel[tap taps[g, t], channels[g, k], filters[g, i]]`.

    Args:
      kernel: a conv kernel, a dense kernel, or stacked kernels.
      layout: its layout, stacked alike.

    Returns:
      Packed values `[groups, kept, kept_taps, group_size]` behind the leading axes of a stack, of
      the kernel's dtype.

    Raises:
      ValueError: the layout is of another kernel.

    Example:
      >>> import blocksparse_jax as bsj
      >>> layout = bsj.mask_to_layout(jnp.ones((1, 1, 2, 2), bool))
      >>> pack(jnp.arange(4.0).reshape(1, 1, 2, 2), layout).shape
      (1, 2, 1, 2)
    """
    if jnp.shape(kernel) != layout.full_shape:
        raise ValueError(
            f"kernel: expected shape {layout.full_shape} of the layout, got {jnp.shape(kernel)}; "
            f"was the layout made for another layer?"
        )
    values = _gathered(jnp.asarray(kernel), layout)
    note(values, layout=_arrays(layout))
    return values


def unpack(
    values: Float[Array, "... groups kept kept_taps group_size"], layout: BlockLayout
) -> Float[Array, "..."]:
    """Scatters packed values into a conv kernel that is zero elsewhere.

    `unpack(pack(w)) == where(mask, w, 0)`.

    Args:
      values: packed values, or a stack.
      layout: their layout, stacked alike.

    Returns:
      A conv kernel `[kh, kw, cin, cout]`, or what the layout is of, in the values' dtype.

    Raises:
      ValueError: the layout is of other values, as far as that is known.

    Example:
      >>> import blocksparse_jax as bsj
      >>> layout = bsj.mask_to_layout(jnp.ones((1, 1, 2, 2), bool))
      >>> unpack(jnp.ones((1, 2, 1, 2)), layout).shape
      (1, 1, 2, 2)
    """
    if jnp.shape(values) != layout.full_packed_shape:
        raise ValueError(
            f"values: expected packed shape (groups, kept, kept_taps, group_size) = "
            f"{layout.full_packed_shape} of the layout, got {jnp.shape(values)}"
        )
    refuse_foreign_values("values", values, layout)
    return _scattered(jnp.asarray(values), layout)


def refuse_foreign_values(name: str, values: Array, layout: BlockLayout) -> None:
    """ValueError where packed values are known to be of another layout of equal shapes.

    That is known of the very arrays that `pack` and `pack_tree` return outside of jit.
    """
    own = noted(values, "layout")
    if own is not None and not all(map(equal_as_known, own, _arrays(layout))):
        raise ValueError(
            f"{name}: these packed values are not of this layout, but of one of another seed, "
            "model or step; use the layouts that they were packed with"
        )


def _arrays(layout: BlockLayout) -> tuple[Array, Array, Array]:
    return layout.filters, layout.channels, layout.taps


# One program each outside of jit, rather than one for every operation.
@functools.partial(jax.jit, inline=True)
def _gathered(kernel: Array, layout: BlockLayout) -> Array:
    kh, kw, cin, cout = layout.kernels.conv_shape

    def gather(kernel: Array, layout: BlockLayout) -> Array:
        return (
            kernel.reshape(kh * kw, cin, cout)
            .at[block_index(layout)]
            .get(mode="promise_in_bounds", unique_indices=True)
        )

    return layout.kernels.each(gather)(kernel, layout)


@functools.partial(jax.jit, inline=True)
def _scattered(values: Array, layout: BlockLayout) -> Array:
    kh, kw, cin, cout = layout.kernels.conv_shape

    def scatter(values: Array, layout: BlockLayout) -> Array:
        flat = jnp.zeros((kh * kw, cin, cout), values.dtype)
        index = block_index(layout)
        return flat.at[index].set(values, mode="promise_in_bounds", unique_indices=True)

    return layout.kernels.each(scatter)(values, layout).reshape(layout.full_shape)


def equal_as_known(a: Array, b: Array) -> bool:
    """Whether two arrays are equal, compared on the host; True where their values are unknown."""
    if jnp.shape(a) != jnp.shape(b):
        return False
    return a is b or not (_is_known(a) and _is_known(b)) or np.array_equal(a, b)


def _is_known(array: Array) -> bool:
    """Whether an array is neither traced, nor donated, nor on the devices of other processes."""
    if isinstance(array, jax.core.Tracer):
        return False
    return not isinstance(array, jax.Array) or (
        not array.is_deleted() and array.is_fully_addressable
    )
