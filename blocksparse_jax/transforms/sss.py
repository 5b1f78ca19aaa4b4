"""Sparse structure selection: scaling factors that reach exact zeros under a proximal gradient."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, PyTree

from blocksparse_jax import _checks, tree
from blocksparse_jax.transforms.slimming import norm_scales


def branch_factors(name: str, leaf: Any) -> bool:
    """Chooses the factors of residual branches, scalar parameters called `factor`.

    A block has one where it computes `x + factor * branch(x)`, with, in Flax linen,
    `factor = self.param("factor", nn.initializers.ones, ())`, or `self.factor =
    nnx.Param(jnp.ones(()))`.

    Args:
      name: the leaf's path name.
      leaf: the parameter.

    Returns:
      Whether its value scales a branch.

    Example:
      >>> branch_factors("block1/factor", jnp.ones(())), branch_factors("norm/scale", jnp.ones(8))
      (True, False)

    Reference: Huang & Wang, "Data-driven sparse structure selection for deep neural networks", ECCV
    2018, equation 4; the name is our choice.
    """
    return leaf.ndim == 0 and name.rpartition("/")[2] == "factor"


def scaling_factors(name: str, leaf: Any) -> bool:
    """The default choice of `sss`: the scales of norms, and the factors of residual branches.

    Args:
      name: the leaf's path name.
      leaf: the parameter.

    Returns:
      Whether `norm_scales` or `branch_factors` chooses it.

    Example:
      >>> scaling_factors("block1/factor", jnp.ones(())), scaling_factors("norm/scale", jnp.ones(8))
      (True, True)
    """
    return norm_scales(name, leaf) or branch_factors(name, leaf)


class ProximalState(NamedTuple):
    """Optax state of the scaling factors of `sss`.

    Attributes:
      count: int32, updates so far.
      velocity: the params' structure, the momentum of each factor.

    Example:
      >>> ProximalState._fields
      ('count', 'velocity')
    """

    count: jax.Array  # type: ignore[assignment]  # int32[]; tuple has a method of this name
    velocity: PyTree


def sss(
    optimizer: optax.GradientTransformation,
    learning_rate: optax.ScalarOrSchedule,
    *,
    penalty: float = 5e-4,
    momentum: float = 0.9,
    where: tree.Where | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Trains scaling factors with L1 by an accelerated proximal gradient, the rest as before.

    A factor `s` with gradient g moves by

        z = soft(s - rate * g, rate * penalty),  v = z - s + momentum * v,  s = z + momentum * v

    where `soft(x, t) = sign(x) max(|x| - t, 0)`. Factors become exactly zero, and what they scale
    can go, outside of the step:

        scales = channel_maxima(spaces, params, where=norm_scales)
        kept = {space: s > 1e-8 for space, s in scales.items()}  # and at least one of each
        params, batch_stats, state = remove_channels(spaces, kept, params, batch_stats, state)

    Where the factor of a residual branch, `x + factor * branch(x)`, is zero, the block is exactly
    its shortcut. The branch goes with `remove_channels(..., vanishing=)`, and the model leaves it
    out.

    Args:
      optimizer: of all other parameters, e.g. `optax.sgd(0.1, momentum=0.9)`.
      learning_rate: of the factors; a number or a schedule, step -> rate.
      penalty: gamma, of L1.
      momentum: mu, in [0, 1).
      where: predicate (name, leaf) of the factors; None is `scaling_factors`, the scales of norms
        (neurons) and the factors of residual branches (blocks, which the paper uses alone in
        ResNets: `branch_factors`).

    Returns:
      An optax transformation, the whole chain. It masks nothing.

    Raises:
      ValueError: a bad argument; at init, no factor among the params; at update, no params.

    Example:
      >>> params = {"norm": {"scale": jnp.array([1.0, 0.25])}}
      >>> tx = sss(optax.sgd(0.1), 0.5, momentum=0.0, penalty=1.0)
      >>> zeros = jax.tree.map(jnp.zeros_like, params)
      >>> updates, _ = tx.update(zeros, tx.init(params), params)
      >>> optax.apply_updates(params, updates)["norm"]["scale"].tolist()
      [0.5, 0.0]

    Reference: Huang & Wang, "Data-driven sparse structure selection for deep neural networks", ECCV
    2018, equations 10 to 12. Our choice: the scales of batch norms are the factors of neurons,
    which take their shifts along when they go; the default of the penalty.
    """
    _checks.number("penalty", penalty)
    _checks.fraction("momentum", momentum)
    if not callable(learning_rate):
        _checks.number("learning_rate", learning_rate)
    chosen = where or scaling_factors

    def labels(params: PyTree) -> PyTree:
        tree.choose(chosen, params)
        return jax.tree.map_with_path(
            lambda path, leaf: "factor" if chosen(tree.path_name(path), leaf) else "other", params
        )

    factors = _proximal(learning_rate, penalty, momentum)
    return optax.partition({"factor": factors, "other": optimizer}, labels)


def _proximal(
    learning_rate: optax.ScalarOrSchedule, penalty: float, momentum: float
) -> optax.GradientTransformation:
    """Accelerated proximal gradient of an L1 penalty, in the form of a momentum method."""

    def init(params: PyTree) -> ProximalState:
        return ProximalState(jnp.zeros([], jnp.int32), jax.tree.map(jnp.zeros_like, params))

    def update(
        updates: PyTree, state: ProximalState, params: PyTree | None = None
    ) -> tuple[PyTree, ProximalState]:
        if params is None:
            raise ValueError(
                "params: sss needs the factors, expected tx.update(grads, state, params), got None"
            )
        rate = learning_rate(state.count) if callable(learning_rate) else learning_rate

        def velocity(grad: Array, factor: Array, before: Array) -> Array:
            new = _soft(factor - rate * grad, rate * penalty) - factor + momentum * before
            return new.astype(before.dtype)

        def move(grad: Array, factor: Array, after: Array) -> Array:
            new = _soft(factor - rate * grad, rate * penalty) + momentum * after
            return (new - factor).astype(grad.dtype)

        after = jax.tree.map(velocity, updates, params, state.velocity)
        moves = jax.tree.map(move, updates, params, after)
        return moves, ProximalState(optax.safe_increment(state.count), after)

    return optax.GradientTransformation(init, update)


def _soft(x: Float[Array, "..."], threshold: Any) -> Float[Array, "..."]:
    """Soft thresholding, the proximal map of L1."""
    return jnp.sign(x) * jnp.maximum(jnp.abs(x) - threshold, 0)
