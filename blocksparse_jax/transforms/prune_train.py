"""PruneTrain: a group lasso over channels, whose strength follows from the first loss."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, PyTree

from blocksparse_jax import _checks, tree
from blocksparse_jax.grouping.channel_choice import weights_of_channels
from blocksparse_jax.grouping.channel_spaces import Spaces, kernel_axes

_EPSILON = 1e-8


class PruneTrainState(NamedTuple):
    """Optax state of `prune_train`.

    Attributes:
      count: int32, updates so far.
      strength: float32, lambda; 0 before the first update.

    Example:
      >>> PruneTrainState._fields
      ('count', 'strength')
    """

    count: jax.Array  # type: ignore[assignment]  # int32[]; tuple has a method of this name
    strength: jax.Array  # float32[]


def prune_train(
    spaces: Spaces, *, ratio: float = 0.2, where: tree.Where | None = None
) -> optax.GradientTransformationExtraArgs:
    """Adds the gradient of a group lasso over channels, so that whole channels go to zero.

    The penalty is `lambda * sum sqrt(sum w^2 + 1e-8)`. A group is what one channel has of one
    kernel: its weights along the kernel's output axis, or along the input axis. The first update
    sets `lambda = ratio * loss / (lasso * (1 - ratio))`: the penalty starts as `ratio` of what
    training minimises. Then, every ten epochs or so, outside of the step::

        kept = channels_above(spaces, params)
        params, batch_stats, state = remove_channels(spaces, kept, params, batch_stats, state)

    Args:
      spaces: `{space: [(leaf name, axis), ...]}`, as in `fold_channel_orders`; an axis that no
        space has (images, logits) forms no groups.
      ratio: of the penalty to the whole at the first step, in [0, 1).
      where: predicate (name, leaf) of the kernels that are penalised, default all but depthwise
        ones, whose names hold "depthwise".

    Returns:
      An optax transformation for the head of the chain. It masks nothing; its update takes the loss
      as `value`: `tx.update(grads, state, params, value=loss)`.

    Raises:
      ValueError: a bad ratio; at init, a space that does not fit the params, or no kernel in any;
        at update, no params or no `value`.

    Example:
      >>> params = {"a": jnp.ones((1, 2)), "b": jnp.ones((2, 1))}
      >>> tx = prune_train({"s": [("a", 1), ("b", 0)]}, ratio=0.5)
      >>> grads = jax.tree.map(jnp.zeros_like, params)
      >>> updates, state = tx.update(grads, tx.init(params), params, value=8.0)
      >>> float(state.strength), updates["a"].tolist()  # a lasso of 4 groups of norm 1
      (2.0, [[2.0, 2.0]])

    Reference: Lym et al., "PruneTrain: fast neural network training by dynamic sparse model
    reconfiguration", SC 2019, with the constants of the authors' code, which also drops layers that
    lose all channels. Our choice: one channel of each space stays.
    """
    _checks.fraction("ratio", ratio)
    chosen = where or weights_of_channels

    def init(params: PyTree) -> PruneTrainState:
        if not _groups(spaces, params, chosen):
            raise ValueError(
                f"spaces: no kernel of params is in any of {list(spaces)[:8]}, so there are no "
                f"groups; name kernels, or choose others with `where`"
            )
        return PruneTrainState(jnp.zeros([], jnp.int32), jnp.zeros([], jnp.float32))

    def update(
        updates: PyTree,
        state: PruneTrainState,
        params: PyTree | None = None,
        *,
        value: Any = None,
        **extra_args: Any,
    ) -> tuple[PyTree, PruneTrainState]:
        if params is None or value is None:
            missing = "params" if params is None else "value"
            raise ValueError(
                f"{missing}: prune_train needs the weights and the loss, expected "
                f"tx.update(grads, state, params, value=loss), got None"
            )
        lasso, pull = jax.value_and_grad(_lasso)(params, spaces, chosen)
        first = ratio * jnp.float32(value) / (lasso * (1 - ratio))
        strength = jnp.where(state.count == 0, first, state.strength)
        new = jax.tree.map(lambda u, p: u + (strength * p).astype(u.dtype), updates, pull)
        return new, PruneTrainState(optax.safe_increment(state.count), strength)

    return optax.GradientTransformationExtraArgs(init, update)


def _groups(spaces: Spaces, params: PyTree, where: tree.Where) -> list[tuple[Array, int]]:
    """The kernels and axes whose channels are groups."""
    leaves = {tree.path_name(path): leaf for path, leaf in jax.tree.leaves_with_path(params)}
    axes = kernel_axes(spaces, params, where)
    return [(leaves[name], axis) for entries in axes.values() for name, axis in entries]


def _lasso(params: PyTree, spaces: Spaces, where: tree.Where) -> Float[Array, ""]:
    """The sum of the groups' norms, in float32."""
    norms = []
    for leaf, axis in _groups(spaces, params, where):
        others = tuple(a for a in range(leaf.ndim) if a != axis)
        squares = jnp.square(leaf.astype(jnp.float32)).sum(others)
        norms.append(jnp.sqrt(squares + _EPSILON).sum())
    return jnp.stack(norms).sum()
