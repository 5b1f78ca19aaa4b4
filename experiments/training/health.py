"""What is wrong with the numbers of a training state: for rows of metrics, results, the console."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

import blocksparse_jax as bsj

_REMARKS = {
    "nonzero_pruned": "{} pruned weights are not zero",
    "nonfinite_values": "{} weights and moments are not finite",
    "mask_updates_left_out": "{} updates of the masks left out, not finite",
}


def health(params: Any, opt_state: Any, is_sparse: bool) -> dict[str, int]:
    """Counts what should not be there.

    Args:
      params: the parameters.
      opt_state: their optimizer state.
      is_sparse: whether a sparse method is in it.

    Returns:
      `nonzero_pruned` weights; `nonfinite_values` of weights and moments; `mask_updates_left_out`,
      since the weights or gradients that decide them were not finite.
    """
    arrays = [leaf for leaf in jax.tree.leaves((params, opt_state)) if jnp.ndim(leaf)]
    floats = [leaf for leaf in arrays if jnp.issubdtype(leaf.dtype, jnp.inexact)]
    left_out = optax.tree_utils.tree_get_all_with_path(opt_state, "nonfinite_updates")
    return {
        "nonzero_pruned": int(bsj.nonzero_pruned(params, opt_state)) if is_sparse else 0,
        "nonfinite_values": int(_count_nonfinite(floats)),
        "mask_updates_left_out": sum(int(count) for _, count in left_out),
    }


def remarks(row: Mapping[str, Any]) -> str:
    """What a row of metrics has of it, for the end of a line on the console."""
    return "".join(f", {text.format(row[name])}" for name, text in _REMARKS.items() if row[name])


@jax.jit
def _count_nonfinite(arrays: Sequence[jax.Array]) -> jax.Array:
    return sum((jnp.count_nonzero(~jnp.isfinite(a)) for a in arrays), jnp.zeros((), jnp.int32))
