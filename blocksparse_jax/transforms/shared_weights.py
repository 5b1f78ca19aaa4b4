"""Trained centroids: weights of one cluster share their gradient, and stay equal."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, PyTree

from blocksparse_jax import _checks, tree
from blocksparse_jax.compression.share import kernels
from blocksparse_jax.state import stands_for_params


class SharedWeightsState(NamedTuple):
    """Optax state of `shared_weights`.

    Attributes:
      clusters: the params' structure: int32 arrays of the leaf's shape with the number of each
        weight's cluster, -1 for none; the scalar -1 for leaves that share nothing.
      inner: the optimizer's state.
    """

    clusters: PyTree
    inner: PyTree


def shared_weights(
    inner: optax.GradientTransformation, *, bits: int = 8, where: tree.Where | None = None
) -> optax.GradientTransformationExtraArgs:
    """Trains the centroids of shared weights with an optimizer.

    The gradients of all weights of a cluster are summed: that is the gradient of its centroid. Its
    weights then move by the mean of their updates, so that they stay equal to the last bit. Until
    `set_clusters` no weights share anything, and the optimizer runs as it is.

    Args:
      inner: the optimizer, e.g. `optax.sgd(1e-3)`.
      bits: at most `2^bits` clusters in a leaf, in 1 to 16.
      where: as in `share_weights`.

    Returns:
      An optax transformation; with a sparse method, `sparse(method, shared_weights(optimizer))`.

    Raises:
      ValueError: a bad argument.

    Example:
      >>> import blocksparse_jax as bsj
      >>> shared = bsj.share_weights({"w": jnp.array([[1.0, 1.2, 3.0]])}, dense_bits=1)
      >>> tx = shared_weights(optax.sgd(1.0))
      >>> state = bsj.set_clusters(tx.init(shared.params), shared.clusters)
      >>> updates, state = tx.update({"w": jnp.array([[1.0, 2.0, 4.0]])}, state, shared.params)
      >>> updates["w"].tolist()
      [[-3.0, -3.0, -4.0]]

    Reference: Han, Mao & Dally, "Deep compression", ICLR 2016, section 3.3. The mean of the
    updates, which equals each of them unless the optimizer's state tells the weights apart, is our
    choice.
    """
    if not callable(getattr(inner, "update", None)):
        raise ValueError(
            f"inner: expected an optax transformation such as optax.sgd(1e-3), got {inner!r}"
        )
    if _checks.positive_int("bits", bits) > 16:
        raise ValueError(f"bits: expected 1 to 16 bits, got {bits}")
    most = 2**bits
    choice = kernels if where is None else where
    inner = optax.with_extra_args_support(inner)

    def init(params: PyTree) -> SharedWeightsState:
        if stands_for_params(params):
            return SharedWeightsState(0, inner.init(params))
        chosen = tree.choose(choice, params)
        alone = {name: jnp.full(leaf.shape, -1, jnp.int32) for name, leaf in chosen.items()}
        clusters = [
            alone.get(tree.path_name(path), jnp.int32(-1))
            for path, _ in jax.tree.leaves_with_path(params)
        ]
        clusters = jax.tree.unflatten(jax.tree.structure(params), clusters)
        return SharedWeightsState(clusters, inner.init(params))

    def update(
        updates: PyTree, state: SharedWeightsState, params: PyTree | None = None, **extra: Any
    ) -> tuple[PyTree, SharedWeightsState]:
        clusters = tree.match("state", state.clusters, updates)

        def combined(values: PyTree, *, mean: bool) -> PyTree:
            leaves, structure = jax.tree.flatten(values)
            pairs = zip(leaves, clusters, strict=True)
            return jax.tree.unflatten(
                structure, [_combine(leaf, numbers, most, mean) for leaf, numbers in pairs]
            )

        moved, inner_state = inner.update(
            combined(updates, mean=False), state.inner, params, **extra
        )
        return combined(moved, mean=True), state._replace(inner=inner_state)

    return optax.GradientTransformationExtraArgs(init, update)


def set_clusters(state: PyTree, clusters: PyTree) -> PyTree:
    """Tells `shared_weights` which weights share their values.

    Args:
      state: the optimizer state that holds that of one `shared_weights`, under any wrappers.
      clusters: from `share_weights(params, ...)`, whose params train on.

    Returns:
      The state with these clusters.

    Raises:
      ValueError: there is no `shared_weights` in the state, clusters are of another tree or shape,
        or a leaf has more than `shared_weights` was made for.

    Example:
      >>> import blocksparse_jax as bsj
      >>> tx = bsj.shared_weights(optax.sgd(0.1))
      >>> shared = bsj.share_weights({"w": jnp.eye(2)})
      >>> set_clusters(tx.init(shared.params), shared.clusters).clusters["w"].tolist()
      [[0, -1], [-1, 0]]
    """
    found = False

    def is_shared(node: Any) -> bool:
        return isinstance(node, SharedWeightsState)

    def replaced(node: Any) -> Any:
        nonlocal found
        if not is_shared(node):
            return node
        found = True
        new = tree.match("clusters", clusters, node.clusters)
        old = jax.tree.leaves_with_path(node.clusters)
        for (path, before), after in zip(old, new, strict=True):
            if jnp.shape(before) != jnp.shape(after):
                raise ValueError(
                    f"clusters: expected shape {jnp.shape(before)} at {tree.path_name(path)!r}, "
                    f"got {jnp.shape(after)}; give share_weights and shared_weights the same where="
                )
        arrays = [jnp.array(numbers, jnp.int32) for numbers in new]
        return node._replace(clusters=jax.tree.unflatten(jax.tree.structure(node.clusters), arrays))

    new_state = jax.tree.map(replaced, state, is_leaf=is_shared)
    if not found:
        raise ValueError("state: expected the state of shared_weights(optimizer), found none")
    return new_state


def _combine(values: Array, clusters: Array, most: int, mean: bool) -> Array:
    """The sum (or mean) over each cluster at all its weights; other values as they are."""
    if not jnp.ndim(clusters):
        return values
    numbers = clusters.reshape(-1)
    flat = values.reshape(-1).astype(jnp.float32)
    at = jnp.where(numbers < 0, most, numbers)  # beyond the last: dropped
    sums = jax.ops.segment_sum(flat, at, most)
    if mean:
        sums = sums / jnp.maximum(jax.ops.segment_sum(jnp.ones_like(flat), at, most), 1)
    shared = sums.at[at].get(mode="clip").reshape(values.shape).astype(values.dtype)
    return jnp.where(clusters < 0, values, shared)
