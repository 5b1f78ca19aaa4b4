"""Sparse variational dropout: the masks of a network whose weights are noisy."""

import functools

import optax
from jaxtyping import Array

from blocksparse_jax import _checks, tree
from blocksparse_jax.patterns import unstructured
from blocksparse_jax.spec import Spec
from blocksparse_jax.transforms._base import sparse_transformation
from blocksparse_jax.transforms.first_masks import keep_all

_VARIANCES = "log_sigma2"


def variational_dropout(
    sparsity: float = 0.0, *, where: tree.Where | None = None
) -> optax.GradientTransformationExtraArgs:
    """Holds the masks of sparse variational dropout; every weight goes on training.

    What prunes is the loss: noise in the layers (`linen.use_variational_dropout`, or the layers
    `VariationalConv` and `VariationalDense` of `linen` and `nnx`) and `variational_dropout_kl`.
    When the network is to be evaluated, set the masks, `replace_masks(state,
    variational_masks(params))`; `masked(params, state)` are its weights. Train on the params
    themselves.

    Args:
      sparsity: the fraction that `variational_masks(..., sparsity=)` removes, in [0, 1), for
        reports; 0 leaves it to the threshold.
      where: predicate (name, leaf) of the noisy kernels, as given to `with_log_variances`.

    Returns:
      An optax transformation that passes all gradients; put it first in the chain, inside
      `keep_zeros` (`sparse(method, optimizer)` does both).

    Raises:
      ValueError: a bad argument.

    Example:
      >>> import blocksparse_jax as bsj, jax.numpy as jnp
      >>> params = bsj.with_log_variances({"conv": {"kernel": jnp.ones((3, 3, 8, 8))}})
      >>> tx = bsj.sparse(variational_dropout(), optax.adam(1e-3))
      >>> state = bsj.replace_masks(tx.init(params), bsj.variational_masks(params))
      >>> float(bsj.metrics.density(bsj.get_masks(state)))
      1.0

    Reference: Molchanov, Ashukha & Vetrov, "Variational dropout sparsifies deep neural networks",
    ICML 2017.
    """
    _checks.fraction("sparsity", sparsity)
    choice = tree.conv_kernels if where is None else where

    def noisy(name: str, leaf: Array) -> bool:
        return name.rpartition("/")[2] != _VARIANCES and choice(name, leaf)

    spec = Spec(
        "variational-dropout",
        1 - sparsity,
        pattern=unstructured(),
        straight_through=True,
        resizes=True,
        own_parameters=(_VARIANCES,),
    )
    return sparse_transformation(
        spec, where=noisy, draw=functools.partial(keep_all, unstructured())
    )
