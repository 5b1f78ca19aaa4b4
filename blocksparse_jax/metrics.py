"""Metrics: density, kept and training FLOPs, what masks explore, distances between masks, zeros."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PyTree

from blocksparse_jax import _checks, tree
from blocksparse_jax.dead_inputs import Feeds, checked_feeds, live_inputs
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


def step_flops(kept: float, dense: float, dense_gradient: bool = False) -> float:
    """The FLOPs of one training step, in those of a forward pass.

    The forward pass, the gradient of the inputs and that of the kernels take as many each; with
    `dense_gradient` the last one is that of all weights.

    Args:
      kept: FLOPs of the forward pass with the step's masks.
      dense: FLOPs of the dense forward pass.
      dense_gradient: whether the step needs the gradient of the pruned weights too
        (`Spec.dense_gradient`).

    Returns:
      `2 * kept + (dense if dense_gradient else kept)`: integers stay integers.

    Example:
      >>> step_flops(1, 10), step_flops(1, 10, dense_gradient=True)
      (3, 12)

    Reference: Evci et al., "RigL", ICML 2020, appendix on FLOPs.
    """
    return 2 * kept + (dense if dense_gradient else kept)


def training_flops(
    kept: Sequence[float], dense: float = 1.0, dense_gradient: Callable[[int], Any] | None = None
) -> float:
    """The fraction of a dense training's FLOPs that a sparse training takes.

    Args:
      kept: FLOPs of the forward pass at each step: numbers in the unit of `dense`, as fractions
        those of `kept_flops`.
      dense: FLOPs of the dense forward pass.
      dense_gradient: step -> whether it needs the gradient of the pruned weights too, such as
        `get_spec(state).dense_gradient`; None = no step does.

    Returns:
      The mean over the steps of `step_flops / (3 * dense)`: 1 for dense training.

    Raises:
      ValueError: there are no steps, or `dense` is not above 0.

    Example:
      >>> training_flops([1.0, 0.25], dense_gradient=lambda step: step == 1)
      0.75

    Reference: Evci et al., "RigL", ICML 2020, appendix on FLOPs.
    """
    if not len(kept):
        raise ValueError("kept: expected the FLOPs of at least one step, got none")
    _checks.number("dense", dense, low_open=True)
    needs = dense_gradient or (lambda step: False)
    steps = [step_flops(flops, dense, bool(needs(step))) for step, flops in enumerate(kept)]
    return sum(steps) / (3 * dense * len(steps))


def ever_active(*masks: PyTree) -> PyTree:
    """The weights that any of several masks keeps.

    Args:
      *masks: trees of one structure, as `get_masks` gives at several steps.

    Returns:
      A tree of the same structure, True where one of them is.

    Raises:
      ValueError: there are none, or the trees differ.

    Example:
      >>> a, b = {"w": jnp.array([True, False])}, {"w": jnp.array([False, False])}
      >>> ever_active(a, b)["w"].tolist()
      [True, False]
    """
    if not masks:
        raise ValueError("masks: expected at least one tree of masks, got none")
    first, *others = masks
    nodes = [tree.match(f"masks[{i}]", other, first) for i, other in enumerate(others, 1)]
    columns = zip(jax.tree.leaves(first), *nodes, strict=True)
    union = [functools.reduce(jnp.logical_or, column) for column in columns]
    return jax.tree.unflatten(jax.tree.structure(first), union)


def itop(*masks: PyTree) -> Float[Array, ""]:
    """The in-time over-parameterization rate: the fraction of the weights that were ever active.

    Args:
      *masks: trees of one structure, as `get_masks` gives at all steps of a training, or the one
        that `ever_active` has made of them step by step.

    Returns:
      float32 scalar in [0, 1]; dense leaves (the scalar True) do not count, and 1 without masks.

    Raises:
      ValueError: there are none, or the trees differ.

    Example:
      >>> a, b = {"w": jnp.arange(4) == 0}, {"w": jnp.arange(4) == 3}
      >>> float(itop(a)), float(itop(a, b))
      (0.25, 0.5)

    Reference: Liu et al., "Do we actually need dense over-parameterization?", ICML 2021 (R_s).
    """
    return density(ever_active(*masks))


class Eliminated(NamedTuple):
    """What elimination saves in one dense layer.

    Attributes:
      inputs: that come from channels whose kernel slices are all pruned.
      weights: pruned weights of these inputs.
    """

    inputs: int
    weights: int


def eliminated_inputs(masks: PyTree, feeds: Feeds) -> dict[str, Eliminated]:
    """Counts the inputs of dense layers that come from channels without kernels, and their weights.

    Args:
      masks: as `get_masks` gives.
      feeds: as `campfire` takes it: name of a dense kernel -> name or names of the conv kernels
        that it reads.

    Returns:
      Name of the dense kernel -> `Eliminated(inputs, weights)`.

    Raises:
      ValueError: a name is no sparse layer, or sizes do not fit.

    Example:
      >>> conv = jnp.ones((1, 1, 2, 4), bool).at[..., 1].set(False)
      >>> masks = {"conv": conv, "fc": jnp.ones((8, 3), bool).at[1].set(False)}
      >>> eliminated_inputs(masks, {"fc": "conv"})
      {'fc': Eliminated(inputs=2, weights=3)}

    Reference: Gamboa et al., "Campfire", 2020 (FC elimination).
    """
    sparse = {
        tree.path_name(path): mask
        for path, mask in jax.tree.leaves_with_path(masks)
        if jnp.ndim(mask)
    }
    saved = {}
    for layer, convs in checked_feeds(feeds, tree.shapes(sparse)).items():
        dead = ~live_inputs(sparse, convs, sparse[layer].shape[0])
        saved[layer] = Eliminated(int(dead.sum()), int((~sparse[layer] & dead[:, None]).sum()))
    return saved


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
