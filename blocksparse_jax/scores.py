"""Scores: how much a weight, or a block of weights, deserves to be kept (higher = keep)."""

import math
from typing import Literal, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PyTree

from blocksparse_jax import _checks, run_once, tree
from blocksparse_jax._dtypes import common_dtype
from blocksparse_jax.kernels import kernels

Kind = Literal["magnitude", "gradient", "random"]
Criterion = Literal["l1", "l2", "bpar"]
KINDS: tuple[Kind, ...] = get_args(Kind)
CRITERIA: tuple[Criterion, ...] = get_args(Criterion)


@jax.jit
def magnitude(weights: Float[Array, "..."]) -> Float[Array, "..."]:
    """`|w|`, in float32; NaN scores 0, so that counts stay exact when a gradient overflows.

    Args:
      weights: any shape.

    Returns:
      Scores of the same shape.

    Example:
      >>> magnitude(jnp.array([-2.0, 1.0])).tolist()
      [2.0, 1.0]

    Reference: Zhu & Gupta, "To prune, or not to prune", 2017.
    """
    size = jnp.abs(weights.astype(jnp.float32))
    return jnp.where(jnp.isnan(size), 0, size)


def _magnitudes(leaves: list[Array]) -> list[Float[Array, "..."]]:
    """`magnitude` of many leaves, outside of jit in one program."""
    if run_once.is_traced(leaves) or not _lie_together(leaves):
        return [magnitude(leaf) for leaf in leaves]
    is_on_cpu = jax.default_backend() == "cpu"
    return (_all_unoptimized if is_on_cpu else _all_optimized)(leaves)


def _lie_together(leaves: list[Array]) -> bool:
    """Whether one program can read the leaves: they are not on different devices."""
    return len({frozenset(jnp.asarray(leaf).sharding.device_set) for leaf in leaves}) == 1


def _magnitude_of_each(leaves: list[Array]) -> list[Array]:
    return [magnitude(leaf) for leaf in leaves]


_all_optimized = jax.jit(_magnitude_of_each)
_all_unoptimized = jax.jit(_magnitude_of_each, compiler_options=run_once.UNOPTIMIZED)


def random(key: Array, shape: tuple[int, ...]) -> Float[Array, "..."]:
    """Uniform scores in [0, 1).

    Args:
      key: a JAX random key.
      shape: shape of the scores.

    Returns:
      float32 scores.

    Example:
      >>> random(jax.random.key(0), (2, 3)).shape
      (2, 3)

    Reference: the random baseline (RU) of Ma et al., "HRBP", CPAL 2024.
    """
    # One program serves all shapes of a size: they draw the same numbers.
    return jax.random.uniform(key, (math.prod(shape),), jnp.float32).reshape(shape)


def make(
    scores: Kind | PyTree, chosen: dict[str, Array], grads: dict[str, Array] | None, key: Array
) -> dict[str, Array]:
    """Scores of the chosen leaves, by name.

    Args:
      scores: "magnitude" (`|w|`), "gradient" (`|g|`), "random", or a tree with an array for each
        chosen leaf.
      chosen: name -> weights.
      grads: name -> gradients, for "gradient".
      key: a JAX random key, for "random"; each leaf folds in its position.

    Returns:
      Name -> scores of the leaf's shape: float32, or float64 where a tree has it.

    Raises:
      ValueError: an unknown kind, weights without values, or a tree that lacks a leaf or has it in
        another shape.

    Example:
      >>> make("magnitude", {"w": jnp.array([-3.0])}, None, jax.random.key(0))["w"].tolist()
      [3.0]
    """
    if isinstance(scores, str):
        kind = _checks.choice("scores", scores, KINDS)
        if kind == "random":
            return {
                name: random(jax.random.fold_in(key, i), leaf.shape)
                for i, (name, leaf) in enumerate(chosen.items())
            }
        if kind == "gradient" and grads is None:
            raise ValueError("scores: 'gradient' needs gradients")
        values = grads if kind == "gradient" and grads else chosen
        for name, leaf in values.items():
            if isinstance(leaf, jax.ShapeDtypeStruct):
                raise ValueError(
                    f"params[{name!r}]: its values decide the masks, got {leaf}; for the shapes of "
                    "a state call jax.eval_shape(tx.init, params)"
                )
        return dict(zip(values, _magnitudes(list(values.values())), strict=True))
    named = {tree.path_name(path): leaf for path, leaf in jax.tree.leaves_with_path(scores)}
    for name, leaf in chosen.items():
        if name not in named or jnp.shape(named[name]) != leaf.shape:
            is_there = name in named
            what = (
                f"shape {jnp.shape(named[name])}"
                if is_there
                else f"a tree with leaves {list(named)[:8]}"
            )
            raise ValueError(
                f"scores: expected an array of shape {leaf.shape} at {name!r}, got {what}"
            )
    return {name: _as_scores(named[name]) for name in chosen}


def _as_scores(scores: Array) -> Float[Array, "..."]:
    """Floats of at least 32 bits."""
    return jnp.asarray(scores, common_dtype(jnp.result_type(scores), jnp.float32))


def block_scores(
    kernel: Float[Array, "..."],
    block: int,
    criterion: Criterion = "l1",
    alpha: float = 1.0,
    mask: Bool[Array, "..."] | None = None,
) -> Float[Array, "groups cin"]:
    """Scores of 1xN blocks: N consecutive filters x one input channel x the whole kernel.

    With `l_j` the L1 norm of block j of a group and `r_j = sum_i |cos(w_i, w_j)|` (i = j included),
    BPAR is `l_j / sum_i l_i - alpha * r_j / sum_i r_i`; a zero block's normalised redundancy is set
    to 1.

    Args:
      kernel: a conv kernel, a dense kernel or stacked conv kernels; NaN counts as 0.
      block: N, a divisor of cout.
      criterion: "l1", "l2" (the norms) or "bpar" (block angular redundancy).
      alpha: weight of the redundancy in BPAR.
      mask: the blocks that BPAR's redundancy is between: the cosines are those of
        `kernel * mask`, and a masked block counts as a zero one, while its norm stays that of
        `kernel` (the authors' version 1); None = all.

    Returns:
      float32 `[cout / block, cin]`; the groups of stacked kernels follow each other.

    Raises:
      ValueError: an unknown criterion, or a leaf that holds no kernels.

    Example:
      >>> block_scores(jnp.ones((1, 1, 2, 4)), block=2).tolist()
      [[2.0, 2.0], [2.0, 2.0]]

    Reference: Xiang et al., "SUBP", NeurIPS 2023 (block scores and BPAR).
    """
    _checks.choice("criterion", criterion, CRITERIA)
    of = kernels("kernel", kernel.shape)
    mask = jnp.ones(kernel.shape, bool) if mask is None else mask
    scores = of.each(lambda one, kept: _block_scores(one, kept, block, criterion, alpha))(
        of.as_conv(kernel), of.as_conv(mask)
    )
    return scores.reshape(-1, scores.shape[-1])


def _block_scores(
    kernel: Float[Array, "kh kw cin cout"],
    mask: Bool[Array, "kh kw cin cout"],
    block: int,
    criterion: Criterion,
    alpha: float,
) -> Float[Array, "groups cin"]:
    """The scores of the blocks of one conv kernel."""
    kh, kw, cin, cout = kernel.shape

    def in_blocks(weights: Array) -> Float[Array, "groups cin n"]:
        blocks = jnp.moveaxis(weights.reshape(kh * kw, cin, cout // block, block), 2, 0)
        return jnp.swapaxes(blocks, 1, 2).reshape(cout // block, cin, -1)

    weights = jnp.where(jnp.isnan(kernel), 0, kernel).astype(jnp.float32)
    blocks = in_blocks(weights)
    l1 = jnp.abs(blocks).sum(-1)
    if criterion == "l1":
        return l1
    if criterion == "bpar":
        blocks = in_blocks(jnp.where(mask, weights, 0))
    l2 = jnp.sqrt(jnp.square(blocks).sum(-1))
    if criterion == "l2":
        return l2
    unit = blocks / jnp.where(l2 == 0, 1, l2)[..., None]
    cosine = jnp.abs(jnp.einsum("gid,gjd->gij", unit, unit, precision=jax.lax.Precision.HIGHEST))
    redundancy = _normalise(cosine.sum(1))
    return _normalise(l1) - alpha * jnp.where(l2 == 0, 1.0, redundancy)


def _normalise(rows: Float[Array, "groups cin"]) -> Float[Array, "groups cin"]:
    """Rows divided by their sums; an all-zero row stays zero."""
    total = rows.sum(-1, keepdims=True)
    return rows / jnp.where(total == 0, 1, total)
