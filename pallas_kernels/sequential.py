"""`jax.vmap` of calls that have no batched form: the examples run one after another."""

from collections.abc import Callable, Sequence

import jax

from pallas_kernels.varying import vary_over, varying_axes


def one_at_a_time(
    call: Callable[..., jax.Array], operands: Sequence[jax.Array | None]
) -> jax.Array:
    """Calls a function that `jax.vmap` runs once for each example.

    Inside `jax.shard_map` the result is marked as varying over the mesh axes of the operands.

    Args:
      call: takes the operands and returns one array.
      operands: arrays, or None for those that the caller does not have.

    Returns:
      `call(*operands)`.

    Example:
      >>> import jax.numpy as jnp
      >>> call = lambda x, bias: 2 * x if bias is None else x + bias
      >>> one_at_a_time(call, [jnp.ones(2), None]).tolist()
      [2.0, 2.0]
    """
    present = [operand is not None for operand in operands]

    @jax.custom_batching.sequential_vmap
    def one_example(*arrays: jax.Array) -> jax.Array:
        remaining = iter(arrays)
        every = [next(remaining) if is_present else None for is_present in present]
        return vary_over(call(*every), varying_axes(arrays))

    return one_example(*(operand for operand in operands if operand is not None))
