"""Weight sharing: all weights of a layer take one of a few values, found by k-means."""

import warnings
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree

from blocksparse_jax import _checks, tree

_ROUNDS, _ITERATIONS = 20, 10  # at most their product of k-means iterations


class SharedWeights(NamedTuple):
    """A network whose weights share values.

    Attributes:
      params: the params with the shared values.
      clusters: a tree of the same structure: int32 arrays with the number of each weight's cluster,
        -1 where it is pruned; the scalar -1 for leaves that share nothing.

    Example:
      >>> SharedWeights({"bias": jnp.ones(2)}, {"bias": jnp.int32(-1)})._fields
      ('params', 'clusters')
    """

    params: PyTree
    clusters: PyTree


def share_weights(
    params: PyTree,
    masks: PyTree | None = None,
    *,
    conv_bits: int = 8,
    dense_bits: int = 5,
    where: tree.Where | None = None,
) -> SharedWeights:
    """Gives the kept weights of each kernel one of `2^bits` values, the centroids of k-means.

    The centroids start at equal distances from the smallest to the largest kept weight. It runs on
    the host; call it between two steps.

    Args:
      params: any pytree of arrays.
      masks: a tree of the same structure (`get_masks(state)`): which weights are kept; None are
        those that are not zero.
      conv_bits: of the kernels of convolutions, leaves of rank 3 and more, in 1 to 16.
      dense_bits: of the other kernels, in 1 to 16.
      where: predicate (name, leaf) of the leaves that share values, default all of rank 2 and more.

    Returns:
      The params and the clusters; give these to `set_clusters` to train the centroids.

    Raises:
      ValueError: a bad argument, a traced array, or a weight that is not finite, by name.

    Example:
      >>> params = {"w": jnp.array([[0.0, 1.0, 2.0, 7.0]])}
      >>> shared = share_weights(params, dense_bits=1)
      >>> shared.params["w"].tolist(), shared.clusters["w"].tolist()
      ([[0.0, 1.5, 1.5, 7.0]], [[-1, 0, 0, 1]])

    Reference: Han, Mao & Dally, "Deep compression", ICLR 2016, section 3: k-means with linear
    initialisation, 8 bits for convolutions and 5 for dense layers. The end of the iterations (no
    weight changes its cluster, or 200) is our choice.
    """
    for name, bits in (("conv_bits", conv_bits), ("dense_bits", dense_bits)):
        if _checks.positive_int(name, bits) > 16:
            raise ValueError(f"{name}: expected 1 to 16 bits, got {bits}")
    chosen = tree.choose(kernels if where is None else where, params)
    leaves, structure = jax.tree.flatten(params)
    names = [tree.path_name(path) for path, _ in jax.tree.leaves_with_path(params)]
    kept = [None] * len(leaves) if masks is None else tree.match("masks", masks, params)
    values, clusters = [], []
    for name, leaf, mask in zip(names, leaves, kept, strict=True):
        if name not in chosen:
            values.append(leaf)
            clusters.append(jnp.int32(-1))
            continue
        weights = _checks.concrete(name, leaf)
        is_kept = weights != 0 if mask is None else np.broadcast_to(mask, weights.shape)
        if not np.isfinite(weights[is_kept]).all():
            raise ValueError(f"params: expected finite weights at {name!r}")
        new, numbers = _share(weights, is_kept, 2 ** (conv_bits if leaf.ndim > 2 else dense_bits))
        values.append(jnp.asarray(new, leaf.dtype))
        clusters.append(jnp.asarray(numbers))
    return SharedWeights(
        jax.tree.unflatten(structure, values), jax.tree.unflatten(structure, clusters)
    )


def kernels(name: str, leaf: Array) -> bool:
    """The default choice of leaves that share values: those of rank 2 and more."""
    return leaf.ndim >= 2


def _share(weights: np.ndarray, kept: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """The weights with the values of their clusters, and the clusters' numbers."""
    clusters = np.full(weights.shape, -1, np.int32)
    shared = np.where(kept, weights, 0).astype(weights.dtype)
    if kept.any():
        centroids, labels = k_means(weights[kept].astype(np.float64), count)
        used, clusters[kept] = np.unique(labels, return_inverse=True)
        shared[kept] = centroids[used][clusters[kept]].astype(weights.dtype)
    return shared, clusters


def k_means(values: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """The k-means of numbers, from centroids at equal distances.

    Args:
      values: `[n]`, float64.
      count: of centroids; those without any value stay where they are.

    Returns:
      The centroids `[count]`, in order, and the nearest one's number for each value.
    """
    from scipy.cluster.vq import kmeans2, vq  # takes long to import

    column = values[:, None]
    centroids = np.linspace(values.min(), values.max(), count)[:, None]
    labels = vq(column, centroids)[0]
    for _ in range(_ROUNDS):
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "One of the clusters is empty")
            centroids, _ = kmeans2(column, centroids, iter=_ITERATIONS, minit="matrix")
        before, labels = labels, vq(column, centroids)[0]
        if np.array_equal(before, labels):
            break
    return centroids[:, 0], labels
