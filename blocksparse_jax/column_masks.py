"""Masks of the baselines whose blocks take arbitrary columns, for whole parameter trees."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from blocksparse_jax import _checks, tree
from blocksparse_jax.grouping.column_blocks import dsb_groups, rumi_groups
from blocksparse_jax.masks import per_leaf


def rumi_masks(
    masks: PyTree,
    *,
    clusters: int = 8,
    min_rows: int = 17,
    max_rows: int = 32,
    t1: float = 1.5,
) -> PyTree:
    """Regroups unstructured masks into dense blocks of filters x columns: see `rumi_groups`.

    The density changes: a block keeps its whole rectangle, and weights outside of the blocks go. A
    layer without any cluster of `min_rows` filters keeps its mask.

    Args:
      masks: a tree of bool masks, e.g. from `random_masks`, `masks_from_scores` or `get_masks`; the
        scalar True of a dense leaf stays. On the host: call it outside of jit.
      clusters: as in `rumi_groups`.
      min_rows: as in `rumi_groups`.
      max_rows: as in `rumi_groups`.
      t1: as in `rumi_groups`.

    Returns:
      Masks for `fixed_masks`.

    Raises:
      ValueError: a mask is traced, not bool, or no mask of a conv kernel; a number is out of range.

    Example:
      >>> import numpy as np
      >>> mask = np.zeros((1, 1, 4, 40), bool)
      >>> mask[0, 0, 1, ::2] = mask[0, 0, 2, 1::2] = True
      >>> mask[0, 0, 3, 0] = True  # a column that one filter alone takes
      >>> masks = rumi_masks({"w": mask, "b": np.asarray(True)}, clusters=2)
      >>> int(masks["w"].sum()), bool(masks["b"])
      (60, True)

    Reference: Rumi et al., "Accelerating sparse CNN inference on GPUs with performance-aware weight
    pruning", 2020, in the variant of its public re-implementation. Our choice: complete-linkage
    clusters by Jaccard distance instead of a hypergraph partition, as in `rumi_groups`.
    """

    def regroup(mask: Any) -> Array:
        _checks.boolean("masks", jnp.result_type(mask))
        if not jnp.ndim(mask):
            return jnp.asarray(mask)
        blocks = rumi_groups(mask, clusters=clusters, min_rows=min_rows, max_rows=max_rows, t1=t1)
        return jnp.asarray(blocks.mask() if blocks.blocks else mask)

    return jax.tree.map(regroup, masks)


def dsb_masks(
    params: PyTree, sparsity: float, *, block: int = 16, where: tree.Where | None = None
) -> PyTree:
    """Keeps the heaviest squares after a shuffle of rows and columns: see `dsb_groups`.

    Args:
      params: any pytree, of weights or scores, on the host: call it outside of jit.
      sparsity: fraction of every chosen leaf to remove, in [0, 1).
      block: side of a square.
      where: predicate (name, leaf) of the sparse leaves, default conv kernels except the stem.

    Returns:
      Masks for `fixed_masks`.

    Raises:
      ValueError: a bad argument, or a chosen leaf that is traced or no conv kernel.

    Example:
      >>> import numpy as np
      >>> weights = np.ones((1, 1, 8, 8))
      >>> weights[0, 0, 1::2, ::2] = weights[0, 0, ::2, 1::2] = 3
      >>> masks = dsb_masks({"w": jnp.asarray(weights)}, 0.5, block=4)
      >>> bool((masks["w"] == (weights > 1)).all())
      True

    Reference: DSB (shuffled block sparsity), 2022, and its authors' code. Our choice: the smallest
    clusters first, and ties to the lower index, as in `dsb_groups`.
    """
    chosen = tree.choose(where, params)
    kept = {
        name: jnp.asarray(dsb_groups(leaf, sparsity=sparsity, block=block).mask())
        for name, leaf in chosen.items()
    }
    return per_leaf(params, kept, jnp.asarray(True))
