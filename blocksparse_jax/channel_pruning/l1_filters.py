"""Filters of the smallest L1 norm."""

import jax
import numpy as np
from jaxtyping import Bool, PyTree

from blocksparse_jax import _checks, tree
from blocksparse_jax.channel_pruning.spaces import (
    Counts,
    check_counts,
    highest,
    kernel_shapes,
    space_sizes,
    writers,
)
from blocksparse_jax.grouping.channel_spaces import Spaces


def l1_filters(params: PyTree, spaces: Spaces, counts: Counts) -> dict[str, Bool[np.ndarray, " c"]]:
    """Keeps the filters with the largest sums of `|w|` in every channel space.

    Args:
      params: the parameters of a trained network.
      spaces: `{space: [(leaf name, axis), ...]}`, as in `fold_channel_orders`.
      counts: `{space: channels to keep}`, as from `channel_counts`; spaces left out keep all.

    Returns:
      `{space: bool vector of its channels}`, True = kept, for the spaces of `counts`; equal norms
      go to the lower number.

    Raises:
      ValueError: spaces or counts that do not fit the params, or a space that no kernel writes.

    Example:
      >>> import jax.numpy as jnp
      >>> params = {"a": jnp.array([[1.0, -3.0, 2.0]]), "b": jnp.ones((3, 1))}
      >>> l1_filters(params, {"s": [("a", 1), ("b", 0)]}, {"s": 2})["s"].tolist()
      [False, True, True]

    Reference: Li et al., "Pruning filters for efficient convnets", ICLR 2017. Where several kernels
    write a space (a residual stream), the sum over all of them is our choice; the paper follows the
    shortcut's.
    """
    shapes = kernel_shapes(params, spaces)
    counts = check_counts(counts, space_sizes(shapes, spaces))
    weights = {tree.path_name(path): leaf for path, leaf in jax.tree.leaves_with_path(params)}
    kept = {}
    for space, count in counts.items():
        names = writers(shapes, spaces, space)
        if not names:
            raise ValueError(
                f"spaces[{space!r}]: no kernel has its filters there, so none can be scored; leave "
                "it out of counts"
            )
        norms = [_norms(_checks.concrete(f"params[{name!r}]", weights[name])) for name in names]
        kept[space] = highest(np.sum(norms, axis=0), count)
    return kept


def _norms(kernel: np.ndarray) -> np.ndarray:
    """The L1 norm of each filter; NaN counts as 0."""
    sizes = np.nan_to_num(np.abs(kernel.astype(np.float64)), nan=0.0)
    return sizes.reshape(-1, kernel.shape[-1]).sum(0)
