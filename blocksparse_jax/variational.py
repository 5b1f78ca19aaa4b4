"""Sparse variational dropout: a variance for each weight, its divergence, and the masks.

The weights of a layer are Gaussian, `w ~ N(kernel, sigma^2)`, and `alpha = sigma^2 / kernel^2` is
the dropout rate of each: where it is large, the weight is noise and is pruned. The variances lie in
the params as `log_sigma2` beside `kernel`; layers of `linen` and `nnx` draw the noise.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from blocksparse_jax import _checks, tree
from blocksparse_jax.masks import draw, per_leaf
from blocksparse_jax.patterns import unstructured

THRESHOLD = 3.0
"""Weights of a log alpha above it are pruned: their dropout rate exceeds 0.95."""
LARGEST_LOG_ALPHA = 8.0
"""Log alpha is clipped to plus and minus this."""
INITIAL_LOG_SIGMA2 = -10.0
_TINY = 1e-8  # beside squares, whose logarithm or root is taken
_K1, _K2, _K3 = 0.63576, 1.87320, 1.48695


def log_alpha(kernel: Float[Array, "..."], log_sigma2: Float[Array, "..."]) -> Float[Array, "..."]:
    """The logarithm of the dropout rates: `log_sigma2 - log(kernel^2 + 1e-8)`.

    Args:
      kernel: means of the weights.
      log_sigma2: logarithms of their variances, of the same shape.

    Returns:
      An array of the same shape, clipped to [-8, 8]; beyond, its gradient is 0.

    Example:
      >>> log_alpha(jnp.array([1.0, 1.0, 0.0]), jnp.array([-2.0, 3.0, 0.0])).tolist()
      [-2.0, 3.0, 8.0]

    Reference: Molchanov, Ashukha & Vetrov, "Variational dropout sparsifies deep neural networks",
    ICML 2017, with the constants of the authors' code.
    """
    return jnp.clip(_log_alpha(kernel, log_sigma2), -LARGEST_LOG_ALPHA, LARGEST_LOG_ALPHA)


def variances(kernel: Float[Array, "..."], log_sigma2: Float[Array, "..."]) -> Float[Array, "..."]:
    """The variances of the weights, `alpha * kernel^2` with the clipped alpha."""
    return jnp.exp(log_alpha(kernel, log_sigma2)) * jnp.square(kernel)


def with_noise(
    mean: Float[Array, "..."], variance: Float[Array, "..."], key: Array
) -> Float[Array, "..."]:
    """A draw of a layer's outputs, of which mean and variance are known."""
    noise = jax.random.normal(key, mean.shape, mean.dtype)
    return mean + jnp.sqrt(variance + _TINY).astype(mean.dtype) * noise


def variational_dropout_kl(params: PyTree) -> Float[Array, ""]:
    """The divergence of all noisy weights from the prior: a term of the loss.

    `KL = sum 0.63576 (1 - sigmoid(1.87320 + 1.48695 log alpha)) + 0.5 log(1 + 1 / alpha)`, which is
    within 0.01 a weight of the true one, 0 where alpha is infinite. Add it to a mean loss over
    examples as `weight * KL / number of training examples`. The weight is 1; let it rise from 0
    first (`optax.linear_schedule(0, 1, steps, begin)`), or weights are pruned before they have
    learned.

    Args:
      params: a tree that holds `log_sigma2` beside some kernels.

    Returns:
      A float32 scalar, in nats.

    Raises:
      ValueError: there is no `log_sigma2`, or one without a kernel of its shape.

    Example:
      >>> params = {"conv": {"kernel": jnp.ones(4), "log_sigma2": jnp.full(4, -8.0)}}
      >>> round(float(variational_dropout_kl(params)), 3)
      18.544

    Reference: Molchanov, Ashukha & Vetrov, "Variational dropout sparsifies deep neural networks",
    ICML 2017, equation 14; the rising weight is that of Sønderby et al., "Ladder variational
    autoencoders", NeurIPS 2016.
    """

    def of_layer(kernel: Array, log_sigma2: Array) -> Array:
        rate = log_alpha(kernel, log_sigma2).astype(jnp.float32)
        negative = _K1 * (jax.nn.sigmoid(_K2 + _K3 * rate) - 1) - 0.5 * jax.nn.softplus(-rate)
        return -negative.sum()

    layers = _noisy(params).values()
    return jnp.stack([of_layer(kernel, log_sigma2) for kernel, log_sigma2 in layers]).sum()


def variational_masks(
    params: PyTree, *, threshold: float = THRESHOLD, sparsity: float | None = None
) -> PyTree:
    """Keeps the weights whose log alpha is at most a threshold.

    Args:
      params: a tree that holds `log_sigma2` beside some kernels.
      threshold: of log alpha.
      sparsity: fraction of the noisy weights to remove, in [0, 1), those of the largest log alpha
        over all layers; None removes those above the threshold.

    Returns:
      A tree of the same structure: bool masks of noisy kernels, the scalar True elsewhere. Give it
      to `apply_masks` for the network that is evaluated.

    Raises:
      ValueError: there is no `log_sigma2`, one without a kernel of its shape, or a bad argument.

    Example:
      >>> params = {"conv": {"kernel": jnp.ones(3), "log_sigma2": jnp.array([-9.0, 2.9, 3.1])}}
      >>> variational_masks(params)["conv"]["kernel"].tolist()
      [True, True, False]

    Reference: Molchanov, Ashukha & Vetrov, "Variational dropout sparsifies deep neural networks",
    ICML 2017.
    """
    noisy = _noisy(params)
    if sparsity is None:
        _checks.number("threshold", threshold, low=-jnp.inf)
        masks = {name: _log_alpha(*layer) <= threshold for name, layer in noisy.items()}
    else:
        _checks.fraction("sparsity", sparsity)
        scores = {name: -_log_alpha(*layer) for name, layer in noisy.items()}
        kept = draw(unstructured(), scores, sparsity, "global")
        masks = {name: layer.mask for name, layer in kept.items()}
    return per_leaf(params, masks, jnp.asarray(True))


def with_log_variances(
    params: Mapping[str, Any],
    *,
    initial: float = INITIAL_LOG_SIGMA2,
    where: tree.Where | None = None,
) -> dict[str, Any]:
    """Puts a `log_sigma2` beside each chosen kernel.

    With these params any Flax linen network trains with variational dropout, inside of
    `linen.use_variational_dropout(key)`; without it, the network computes with the means.

    Args:
      params: nested dicts of arrays, as Flax linen makes them.
      initial: the logarithm of all variances.
      where: predicate (name, leaf) of the kernels, default conv kernels except the stem.

    Returns:
      New dicts; the kernels are shared.

    Raises:
      ValueError: the params are no dicts, a leaf of another name than `kernel` is chosen, or none.

    Example:
      >>> params = {"conv": {"kernel": jnp.ones((3, 3, 8, 8))}}
      >>> list(with_log_variances(params)["conv"])
      ['kernel', 'log_sigma2']
    """
    chosen = tree.choose(where, params)
    initial = _checks.number("initial", initial, low=-jnp.inf)
    other = [name for name in chosen if name.rpartition("/")[2] != "kernel"]
    if not isinstance(params, Mapping) or other:
        got = f"{other[0]!r} chosen" if other else type(params).__name__
        raise ValueError(
            f"params: expected nested dicts in which the chosen leaves are named 'kernel', got "
            f"{got}; choose others with where="
        )

    def widened(node: Any, name: str) -> Any:
        if not isinstance(node, Mapping):
            return node
        new = {key: widened(child, f"{name}{key}/") for key, child in node.items()}
        if f"{name}kernel" in chosen:
            new["log_sigma2"] = jnp.full_like(node["kernel"], initial)
        return new

    return widened(params, "")


def _log_alpha(kernel: Array, log_sigma2: Array) -> Array:
    return log_sigma2 - jnp.log(jnp.square(kernel) + _TINY)


def _noisy(params: PyTree) -> dict[str, tuple[Array, Array]]:
    """`(kernel, log_sigma2)` of each noisy layer, by the name of its kernel."""
    leaves = {tree.path_name(path): leaf for path, leaf in jax.tree.leaves_with_path(params)}
    names = [name for name in leaves if name.rpartition("/")[2] == "log_sigma2"]
    if not names:
        raise ValueError(
            f"params: expected 'log_sigma2' beside some kernels, got {sorted(leaves)[:8]}; add it "
            "with with_log_variances(params), or use VariationalConv and VariationalDense"
        )
    layers = {}
    for name in names:
        kernel = f"{name.removesuffix('log_sigma2')}kernel"
        found = jnp.shape(leaves[kernel]) if kernel in leaves else "none"
        if found != jnp.shape(leaves[name]):
            raise ValueError(
                f"params: expected {kernel!r} of the shape {jnp.shape(leaves[name])} of {name!r}, "
                f"got {found}"
            )
        layers[kernel] = leaves[kernel], leaves[name]
    return layers
