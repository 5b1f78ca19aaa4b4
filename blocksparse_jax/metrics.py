"""Metrics: density, kept FLOPs, distances between masks, pruned weights that are not zero."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PyTree

from blocksparse_jax import tree
from blocksparse_jax.state import hard_masks, is_sparse_state


class Sad(NamedTuple):
    """Sparse architecture divergence: the fraction of the bits that differ between two masks.

    Attributes:
      total: over all masks together, float32 in [0, 1].
      layers: layer name -> the same for one mask.

    Reference: Zhou et al., ICLR 2021 (SAD).
    """

    total: Float[Array, ""]
    layers: dict[str, Float[Array, ""]]


def sad(masks_a: PyTree, masks_b: PyTree) -> Sad:
    """Sparse architecture divergence `||m_b - m_a||_1`, normalised by size.

    Args:
      masks_a: a tree of masks, as `get_masks` gives.
      masks_b: a tree of the same structure and shapes.

    Returns:
      `Sad(total, layers)`; dense leaves (the scalar True) do not count.

    Raises:
      ValueError: the trees differ.

    Example:
      >>> a, b = {"w": jnp.array([True, False])}, {"w": jnp.array([False, True])}
      >>> float(sad(a, b).total), float(sad(a, a).layers["w"])
      (1.0, 0.0)

    Reference: Zhou et al., "Learning N:M fine-grained structured sparse neural networks from
    scratch", ICLR 2021, section 3.3.
    """
    others = tree.match("masks_b", masks_b, masks_a)
    changed, sizes = {}, {}
    for (path, a), b in zip(jax.tree.leaves_with_path(masks_a), others, strict=True):
        name = tree.path_name(path)
        if jnp.shape(a) != jnp.shape(b):
            raise ValueError(
                f"masks_b: expected shape {jnp.shape(a)} at {name!r}, got {jnp.shape(b)}; made "
                f"from another model?"
            )
        if jnp.ndim(a):
            changed[name], sizes[name] = (a != b).sum(dtype=jnp.float32), a.size
    total = sum(changed.values(), jnp.float32(0)) / max(1, sum(sizes.values()))
    return Sad(total, {name: changed[name] / sizes[name] for name in changed})


def density(masks: PyTree) -> Float[Array, ""]:
    """The kept fraction over all masks of a tree; dense leaves (the scalar True) do not count.

    Args:
      masks: as `get_masks` gives.

    Returns:
      float32 scalar in [0, 1].

    Example:
      >>> float(density({"w": jnp.array([True, False]), "b": jnp.asarray(True)}))
      0.5
    """
    sparse = [m for m in jax.tree.leaves(masks) if jnp.ndim(m)]
    if not sparse:
        return jnp.float32(1)
    return sum((m.sum(dtype=jnp.float32) for m in sparse), jnp.float32(0)) / sum(
        m.size for m in sparse
    )


def kept_flops(masks: PyTree, params: PyTree, positions: Mapping[str, int]) -> float:
    """The fraction of a network's multiplications that the masks keep.

    Args:
      masks: as `get_masks` gives.
      params: the dense parameters.
      positions: layer name -> how often each of its weights is used for one image (output height
        times width; 1 for a dense layer).

    Returns:
      `sum(kept * positions) / sum(size * positions)` over the named layers, dense ones included.

    Raises:
      ValueError: a name is no parameter, or no layer is named.

    Example:
      >>> masks = {"a": jnp.array([True, False]), "b": jnp.asarray(True)}
      >>> kept_flops(masks, {"a": jnp.ones(2), "b": jnp.ones(2)}, {"a": 9, "b": 1})
      0.55

    Reference: FLOPs as counted by Evci et al., "RigL", ICML 2020.
    """
    nodes = tree.match("masks", masks, params)
    leaves = {
        tree.path_name(path): (leaf.size, int(mask.sum()) if jnp.ndim(mask) else leaf.size)
        for (path, leaf), mask in zip(jax.tree.leaves_with_path(params), nodes, strict=True)
    }
    unknown = [name for name in positions if name not in leaves]
    if unknown:
        raise ValueError(
            f"positions: {unknown[0]!r} is no parameter, expected names among {list(leaves)[:8]}"
        )
    total = sum(leaves[name][0] * n for name, n in positions.items())
    if not total:
        raise ValueError(
            f"positions: expected at least one layer that is used, got {dict(positions)}; name the "
            "layers to count, e.g. {'conv/kernel': height * width}"
        )
    return sum(leaves[name][1] * n for name, n in positions.items()) / total


def nonzero_pruned(params: PyTree, state: PyTree) -> Int[Array, ""]:
    """How many pruned weights are not zero, where the method promises zeros.

    More than none: `keep_zeros` is missing around the chain, `apply_masks` was forgotten at the
    start, or a wrapper outside of `keep_zeros` moved the weights. Methods that train pruned weights
    too (SR-STE, soft SUBP) promise no zeros.

    Args:
      params: the parameters, dense or packed.
      state: their optimizer state.

    Returns:
      int32 scalar.

    Raises:
      ValueError: there is no sparse method in the state, or it is of another tree.

    Example:
      >>> import blocksparse_jax as bsj
      >>> params = {"w": jnp.ones((3, 3, 8, 8))}
      >>> state = bsj.rigl(0.5, until=10).init(params)
      >>> masked = bsj.apply_masks(params, bsj.get_masks(state))
      >>> int(nonzero_pruned(params, state)), int(nonzero_pruned(masked, state))
      (288, 0)
    """
    return sum(nonzero_pruned_by_layer(params, state).values(), jnp.int32(0))


def nonzero_pruned_by_layer(params: PyTree, state: PyTree) -> dict[str, Int[Array, ""]]:
    """Path name -> pruned weights that are not zero, for each leaf with a hard mask."""
    leaves = jax.tree.leaves_with_path(params)
    return {
        tree.path_name(path): jnp.count_nonzero(jnp.where(mask, 0, leaf))
        for mask, (path, leaf) in zip(hard_masks(state, params), leaves, strict=True)
        if jnp.ndim(mask)
    }


def nonfinite_by_leaf(params: PyTree, state: PyTree) -> tuple[dict[str, Any], dict[str, Any]]:
    """How many values are NaN or infinite: of each weight, and of each leaf of its moments.

    Scalars of an optimizer state may be infinite on purpose (the best loss so far), so only what
    belongs to a parameter counts.
    """

    def count(name: str | None, leaf: Any) -> Array | None:
        if name is None or not jnp.issubdtype(jnp.result_type(leaf), jnp.inexact):
            return None
        return jnp.count_nonzero(~jnp.isfinite(leaf))

    weights = jax.tree.map(lambda leaf: count("", leaf), params)
    moments = tree.map_state(count, params, state, is_leaf=is_sparse_state)
    by_weight, by_moment = (
        {tree.path_name(path): number for path, number in jax.tree.leaves_with_path(counts)}
        for counts in (weights, moments)
    )
    return by_weight, by_moment
