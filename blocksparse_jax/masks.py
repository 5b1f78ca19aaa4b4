"""Masks: scores -> bool arrays of kept weights. Exact counts; ties go to the lower index."""

from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PyTree

from blocksparse_jax import _checks, tree

Axis = Literal["input", "kernel"]


def ranks(scores: Float[Array, "... n"]) -> Int[Array, "... n"]:
    """Place of each score in its row, 0 = highest; ties by index, NaN last.

    Args:
      scores: any shape; rows along the last axis.

    Returns:
      int32 of the same shape.

    Example:
      >>> ranks(jnp.array([1.0, 3.0, 3.0])).tolist()
      [2, 0, 1]
    """
    order = jnp.argsort(scores, axis=-1, stable=True, descending=True)
    places = jnp.broadcast_to(jnp.arange(scores.shape[-1], dtype=jnp.int32), scores.shape)
    return jnp.put_along_axis(
        jnp.zeros(scores.shape, jnp.int32), order, places, axis=-1, inplace=False
    )


def unstructured(scores: Float[Array, "..."], count: Any) -> Bool[Array, "..."]:
    """Keeps the `count` highest scores of a layer.

    Args:
      scores: any shape.
      count: how many to keep, an int or a traced int.

    Returns:
      bool of the same shape with exactly `count` ones.

    Example:
      >>> unstructured(jnp.array([1.0, 3.0, 2.0]), 2).tolist()
      [False, True, True]

    Reference: Zhu & Gupta, "To prune, or not to prune", 2017.
    """
    return (ranks(scores.reshape(-1)) < count).reshape(scores.shape)


def top_rows(scores: Float[Array, "groups n"], count: Any) -> Bool[Array, "groups n"]:
    """Keeps the `count` highest scores of every row.

    Args:
      scores: one row for each group.
      count: how many to keep in each row, an int or a traced int.

    Returns:
      bool of the same shape with exactly `count` ones a row.

    Example:
      >>> top_rows(jnp.array([[1.0, 2.0], [4.0, 3.0]]), 1).tolist()
      [[False, True], [True, False]]

    Reference: the uniform blocks of Xiang et al., "SUBP", NeurIPS 2023.
    """
    return ranks(scores) < count


def n_of_m(scores: Float[Array, "..."], n: int, m: int, axis: Axis = "input") -> Bool[Array, "..."]:
    """Keeps the n highest of each m consecutive scores along the reduction axes.

    Args:
      scores: a conv kernel's `[kh, kw, cin, cout]` or a dense kernel's `[cin, cout]`.
      n: kept scores in a run.
      m: length of a run.
      axis: "input" runs over input channels at one tap and filter; "kernel" over (channel, y, x) of
        one filter, x fastest.

    Returns:
      bool of the same shape.

    Raises:
      ValueError: m does not divide the axis, or not 0 < n <= m.

    Example:
      >>> n_of_m(jnp.array([[1.0], [2.0], [4.0], [3.0]]), 2, 4)[:, 0].tolist()
      [False, False, True, True]

    Reference: Zhou et al., "Learning N:M fine-grained structured sparse neural networks from
    scratch", ICLR 2021.
    """
    _checks.choice("axis", axis, ("input", "kernel"))
    if not 0 < _checks.positive_int("n", n) <= _checks.positive_int("m", m):
        raise ValueError(f"n: expected at most m={m}, got {n}")
    if scores.ndim not in (2, 4):
        raise ValueError(
            f"scores: expected a kernel [kh, kw, cin, cout] or [cin, cout], got shape "
            f"{scores.shape}"
        )
    order = (0, 1, 3, 2) if axis == "input" else (3, 2, 0, 1)
    rows = jnp.transpose(scores, order) if scores.ndim == 4 else scores.T
    length = scores.shape[-2] if axis == "input" or scores.ndim == 2 else scores[..., 0].size
    if length % m:
        raise ValueError(
            f"m: {m} does not divide the {axis} axis of length {length}; exclude the layer with "
            f"`where`, or take another m"
        )
    runs = rows.reshape(-1, m)
    # Comparing all pairs of a short run is many times faster than sorting millions of them.
    ahead = (runs[:, None, :] > runs[:, :, None]) | (
        (runs[:, None, :] == runs[:, :, None]) & (jnp.arange(m)[None, :] < jnp.arange(m)[:, None])
    )
    mask = (ahead.sum(-1) < n).reshape(rows.shape)
    if scores.ndim == 2:
        return mask.T
    return jnp.transpose(mask, (0, 1, 3, 2) if axis == "input" else (2, 3, 1, 0))


def one_by_n(
    blocks: Bool[Array, "groups cin"], shape: tuple[int, int, int, int]
) -> Bool[Array, "kh kw cin cout"]:
    """The mask of kept 1xN blocks: consecutive filters x one input channel x the whole kernel.

    Args:
      blocks: which blocks are kept.
      shape: the conv kernel's shape; `groups` divides cout.

    Returns:
      bool `[kh, kw, cin, cout]`.

    Example:
      >>> one_by_n(jnp.array([[True], [False]]), (1, 1, 1, 4)).reshape(-1).tolist()
      [True, True, False, False]

    Reference: Xiang et al., "SUBP", NeurIPS 2023.
    """
    filters = jnp.repeat(blocks, shape[3] // blocks.shape[0], axis=0)
    return jnp.broadcast_to(filters.T, shape)


def apply_masks(params: PyTree, masks: PyTree) -> PyTree:
    """Sets the pruned weights to zero.

    Args:
      params: any pytree.
      masks: a tree of the same structure (`get_masks(state)`); the scalar True of a dense leaf
        keeps it all.

    Returns:
      `where(mask, param, 0)` leaf by leaf.

    Raises:
      ValueError: the masks are of another tree, or of another shape.

    Example:
      >>> apply_masks({"w": jnp.array([1.0, 2.0])}, {"w": jnp.array([True, False])})["w"].tolist()
      [1.0, 0.0]
    """
    nodes = tree.match("masks", masks, params)
    leaves = jax.tree.leaves_with_path(params)
    for (path, leaf), mask in zip(leaves, nodes, strict=True):
        if jnp.shape(mask) not in ((), jnp.shape(leaf)):
            raise ValueError(
                f"masks: expected shape {leaf.shape} (or the scalar True) at "
                f"{tree.path_name(path)!r}, got {jnp.shape(mask)}"
            )
    kept = [jnp.where(mask, leaf, 0) for (_, leaf), mask in zip(leaves, nodes, strict=True)]
    return jax.tree.unflatten(jax.tree.structure(params), kept)


@jax.custom_vjp
def straight_through(weights: Float[Array, "..."], mask: Bool[Array, "..."]) -> Float[Array, "..."]:
    """`where(mask, weights, 0)` whose gradient passes to all weights, pruned ones too.

    Args:
      weights: any shape.
      mask: bool of the same shape.

    Returns:
      The masked weights.

    Example:
      >>> jax.grad(lambda w: straight_through(w, jnp.array([True, False])).sum())(jnp.array([1.0, 2.0])).tolist()
      [1.0, 1.0]

    Reference: Bengio et al., 2013; Zhou et al., ICLR 2021, equation 4.
    """
    return jnp.where(mask, weights, 0)


straight_through.defvjp(
    lambda weights, mask: (jnp.where(mask, weights, 0), None), lambda _, g: (g, None)
)
