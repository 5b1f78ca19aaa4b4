"""Network slimming: L1 on the scales of batch norms, so that channels can be told apart by them."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import PyTree

from blocksparse_jax import _checks, tree


def norm_scales(name: str, leaf: Any) -> bool:
    """The default choice of scaling factors: the scales of norms, `.../scale`.

    Args:
      name: the leaf's path name.
      leaf: the parameter.

    Returns:
      Whether its values scale channels.

    Example:
      >>> norm_scales("stem_norm/scale", jnp.ones(8)), norm_scales("stem_norm/bias", jnp.ones(8))
      (True, False)

    Reference: Liu et al., "Network slimming", ICCV 2017; the name is Flax's.
    """
    return leaf.ndim == 1 and name.rpartition("/")[2] == "scale"


class SlimmingState(NamedTuple):
    """Optax state of `slimming`.

    Attributes:
      count: int32, updates so far.

    Example:
      >>> SlimmingState._fields
      ('count',)
    """

    count: jax.Array  # type: ignore[assignment]  # int32[]; tuple has a method of this name


def slimming(
    penalty: float = 1e-4, *, until: int | None = None, where: tree.Where | None = None
) -> optax.GradientTransformation:
    """Adds `penalty * sign(scale)` to the gradient of batch norm scales: L1 that ranks channels.

    Then, outside of the step, the channels of the smallest scales go, and training goes on without
    the penalty:

        scales = channel_maxima(spaces, params, where=norm_scales)
        kept = largest_channels(scales, 0.7)
        params, batch_stats, state = remove_channels(spaces, kept, params, batch_stats, state)

    Args:
      penalty: lambda, of L1.
      until: the first step without the penalty; None goes on with it.
      where: predicate (name, leaf) of the scales, default leaves called `scale` that are vectors.

    Returns:
      An optax transformation for the head of the chain. It masks nothing.

    Raises:
      ValueError: a bad penalty or step; at init, no scale among the params; at update, no params.

    Example:
      >>> params = {"norm": {"scale": jnp.array([0.5, -0.5])}}
      >>> tx = slimming(0.25)
      >>> updates, _ = tx.update(params, tx.init(params), params)
      >>> updates["norm"]["scale"].tolist()
      [0.75, -0.75]

    Reference: Liu et al., "Learning efficient convolutional networks through network slimming",
    ICCV 2017. Our choice: a channel of a residual stream counts as the largest of its scales.
    """
    _checks.number("penalty", penalty)
    if until is not None:
        _checks.step("until", until)
    chosen = where or norm_scales

    def init(params: PyTree) -> SlimmingState:
        tree.choose(chosen, params)
        return SlimmingState(jnp.zeros([], jnp.int32))

    def update(
        updates: PyTree, state: SlimmingState, params: PyTree | None = None
    ) -> tuple[PyTree, SlimmingState]:
        if params is None:
            raise ValueError(
                "params: slimming needs the scales, expected tx.update(grads, state, params), got "
                "None"
            )
        strength = jnp.float32(penalty)
        if until is not None:
            strength = jnp.where(state.count < until, strength, 0)

        def penalised(path: tuple[Any, ...], update: jax.Array, leaf: jax.Array) -> jax.Array:
            if not chosen(tree.path_name(path), leaf):
                return update
            return update + (strength * jnp.sign(leaf)).astype(update.dtype)

        new = jax.tree.map_with_path(penalised, updates, params)
        return new, SlimmingState(optax.safe_increment(state.count))

    return optax.GradientTransformation(init, update)
