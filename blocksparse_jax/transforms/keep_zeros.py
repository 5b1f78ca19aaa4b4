"""keep_zeros: pruned weights are exactly zero after every update, and regrown ones start with fresh
moments.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, PyTree

from blocksparse_jax import tree
from blocksparse_jax.state import hard_masks, is_sparse_state, sparse_states


def keep_zeros(inner: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """Wraps a chain with a sparse method so that zeros are exact under momentum, weight decay,
    schedules, whatever the chain does.

    The update becomes `u = -p` where pruned. Every state leaf that belongs to a parameter (found by
    its key path, not by optimizer type: moments, traces, accumulators) is zeroed where the weight
    is pruned or newly grown. On a step that moves the topology and applies no gradient (RigL,
    dynamic HRBP) no weight moves but the newly pruned ones, and those state leaves keep their
    values; counts go on. Straight-through methods (SR-STE, soft SUBP) train the pruned weights too:
    they pass unchanged. The state is the chain's own.

    Args:
      inner: a transformation that holds a sparse method, e.g. `optax.chain(hrbp_prune(...),
        optax.sgd(0.1))`.

    Returns:
      An optax transformation.

    Raises:
      ValueError: `inner` is no transformation; at init, when there is no sparse method inside; at
        update, when params is None.

    Example:
      >>> import blocksparse_jax as bsj
      >>> tx = bsj.keep_zeros(optax.chain(bsj.rigl(0.5, until=100), optax.adamw(0.1)))
      >>> params = {"w": jnp.ones((3, 3, 8, 8))}
      >>> updates, state = tx.update(params, tx.init(params), params)
      >>> int((optax.apply_updates(params, updates)["w"] == 0).sum())
      288

    Reference: the precedent is `optax.keep_params_nonnegative`.
    """
    if not (callable(getattr(inner, "init", None)) and callable(getattr(inner, "update", None))):
        raise ValueError(
            f"inner: expected an optax transformation such as optax.chain(rigl(...), "
            f"optax.sgd(0.1)), got {inner!r}"
        )
    inner = optax.with_extra_args_support(inner)

    def init(params: PyTree) -> PyTree:
        state = inner.init(params)
        sparse_states(state)
        return state

    def update(
        updates: PyTree, state: PyTree, params: PyTree | None = None, **extra_args: Any
    ) -> tuple[PyTree, PyTree]:
        if params is None:
            raise ValueError(
                "params: keep_zeros projects the weights, expected tx.update(grads, state, "
                "params), got None"
            )
        before = hard_masks(state, params)
        new_updates, new_state = inner.update(updates, state, params, **extra_args)
        after = hard_masks(new_state, params)
        methods = sparse_states(new_state)
        skips = any(s.spec.skips for s in methods)
        skip = jnp.any(jnp.stack([s.skip_gradient for s in methods]))

        def project(update: Array, weight: Array, mask: Array) -> Array:
            update = jnp.where(skip, jnp.zeros_like(update), update) if skips else update
            return jnp.where(mask, update, -weight) if jnp.ndim(mask) else update

        leaves = jax.tree.leaves_with_path(params)
        owned = {
            tree.path_name(path): (leaf, *m)
            for (path, leaf), m in zip(leaves, zip(before, after, strict=True), strict=True)
        }

        def reset(name: str | None, new: Any, old: Any) -> Any:
            if (
                name is None
                or jnp.shape(new) != jnp.shape(owned[name][0])
                or not jnp.issubdtype(jnp.result_type(new), jnp.inexact)
            ):
                return new
            _, was, now = owned[name]
            value = jnp.where(skip, old, new) if skips else new
            return jnp.where(was & now, value, jnp.zeros_like(value)) if jnp.ndim(now) else value

        new = tree.match("updates", new_updates, params)
        projected = [
            project(u, leaf, mask) for u, (_, leaf), mask in zip(new, leaves, after, strict=True)
        ]
        new_state = tree.map_state(reset, params, new_state, state, is_leaf=is_sparse_state)
        return jax.tree.unflatten(jax.tree.structure(params), projected), new_state

    return optax.GradientTransformationExtraArgs(init, update)
