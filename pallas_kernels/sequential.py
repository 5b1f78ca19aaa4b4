"""`jax.vmap` of calls that have no batched form: the examples run one after another."""

from collections.abc import Callable, Sequence
from typing import Any

import jax

from pallas_kernels.varying import vary_over, varying_axes


def one_at_a_time(call: Callable[..., Any], operands: Sequence[Any]) -> Any:
    """Calls a function that `jax.vmap` runs once for each example.

    Inside `jax.shard_map` the result is marked as varying over the mesh axes of the operands.

    Args:
      call: takes the operands and returns an array or a pytree of arrays.
      operands: pytrees of arrays; None for those that the caller does not have.

    Returns:
      `call(*operands)`.

    Example:
      >>> import jax.numpy as jnp
      >>> call = lambda x, bias: 2 * x if bias is None else x + bias
      >>> one_at_a_time(call, [jnp.ones(2), None]).tolist()
      [2.0, 2.0]
    """
    leaves, tree = jax.tree.flatten(tuple(operands))

    @jax.custom_batching.sequential_vmap
    def one_example(*arrays: jax.Array) -> Any:
        axes = varying_axes(arrays)
        results = call(*jax.tree.unflatten(tree, arrays))
        return jax.tree.map(lambda result: vary_over(result, axes), results)

    return one_example(*leaves)
