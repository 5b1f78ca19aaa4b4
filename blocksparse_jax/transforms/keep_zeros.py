"""keep_zeros: pruned weights are exactly zero after every update, and grown ones start fresh."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, PyTree

from blocksparse_jax import tree
from blocksparse_jax.state import (
    hard_masks,
    is_sparse_state,
    sparse_states,
    stands_for_params,
)
from blocksparse_jax.transforms.due import has_moved
from blocksparse_jax.transforms.nesting import accumulates_for_method, check_nesting
from blocksparse_jax.transforms.proposed import INSIDE_KEEP_ZEROS, propose


def sparse(
    method: optax.GradientTransformation, *optimizer: optax.GradientTransformation
) -> optax.GradientTransformationExtraArgs:
    """Trains with a sparse method: `keep_zeros(optax.chain(method, *optimizer))`.

    Args:
      method: a sparse method, e.g. `hrbp_prune(0.9)`.
      *optimizer: the optimizer, and what comes before it, e.g. `optax.add_decayed_weights(5e-4),
        optax.sgd(0.1, momentum=0.9)`.

    Returns:
      An optax transformation under which pruned weights are exactly zero.

    Raises:
      ValueError: an argument is no transformation; at init, when there is no sparse method.

    Example:
      >>> import blocksparse_jax as bsj
      >>> tx = sparse(bsj.rigl(0.5, until=100), optax.sgd(0.1, momentum=0.9))
      >>> state = tx.init({"conv": jnp.ones((3, 3, 8, 8))})
      >>> int(bsj.get_masks(state)["conv"].sum())
      288
    """
    _check_transformation("method", method, "hrbp_prune(0.9)")
    if not optimizer:
        raise ValueError(
            "optimizer: expected one or more transformations, got none; write sparse(method, "
            "optax.sgd(0.1))"
        )
    for place, part in enumerate(optimizer):
        _check_transformation(f"optimizer[{place}]", part, "optax.sgd(0.1)")
    inner = keep_zeros(optax.chain(method, *optimizer))

    def init(params: PyTree) -> PyTree:
        state = inner.init(params)
        if stands_for_params(params):
            return state
        try:
            sparse_states(state[0])
        except ValueError:
            raise ValueError(
                "method: expected a sparse method first, as in sparse(hrbp_prune(0.9), "
                f"optax.sgd(0.1)), got one whose state is {type(state[0]).__name__}; swap the "
                "arguments"
            ) from None
        return state

    return optax.GradientTransformationExtraArgs(init, inner.update)


def keep_zeros(inner: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """Keeps pruned weights exactly zero under momentum, weight decay, whatever the chain does.

    One exception: a weight that is NaN or infinite at init and pruned there is NaN from then on, as
    no update that is added can make it zero. `apply_masks(params, get_masks(state))` does. Masks
    never change where a weight that decides them is not finite (`SparseState.nonfinite_updates`).

    The update becomes `u = -p` where pruned. Every state leaf that belongs to a parameter (found by
    its key path, not by optimizer type: moments, traces, accumulators) is zeroed where the weight
    is pruned or newly grown. On a step that changes masks and applies no gradient (RigL, dynamic
    HRBP) no weight moves but the newly pruned ones, and those state leaves keep their values;
    counts go on. Straight-through methods (SR-STE, soft SUBP) train the pruned weights too: they
    pass unchanged. Methods that act on the proposed weights `params + updates` (`Spec.on_proposed`)
    run here, behind the optimizer. The state is the chain's own.

    Args:
      inner: a transformation that holds a sparse method, e.g. `optax.chain(hrbp_prune(...),
        optax.sgd(0.1))`; `sparse(method, optimizer)` writes both at once.

    Returns:
      An optax transformation.

    Raises:
      ValueError: `inner` is no transformation; at init, when there is no sparse method inside, or
        gradients are accumulated beside one that changes masks (`optax.apply_every`, or
        `optax.MultiSteps` around the optimizer alone); at update, when params is None.

    Example:
      >>> import blocksparse_jax as bsj
      >>> tx = bsj.keep_zeros(optax.chain(bsj.rigl(0.5, until=100), optax.adamw(0.1)))
      >>> params = {"w": jnp.ones((3, 3, 8, 8))}
      >>> updates, state = tx.update(params, tx.init(params), params)
      >>> int((optax.apply_updates(params, updates)["w"] == 0).sum())
      288

    Reference: the precedent is `optax.keep_params_nonnegative`.
    """
    _check_transformation("inner", inner, "optax.chain(rigl(...), optax.sgd(0.1))")
    inner = optax.with_extra_args_support(inner)

    def init(params: PyTree) -> PyTree:
        state = inner.init(params)
        if stands_for_params(params):
            return state
        check_nesting(state, params)
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
        token = INSIDE_KEEP_ZEROS.set(True)
        try:
            new_updates, new_state = inner.update(updates, state, params, **extra_args)
        finally:
            INSIDE_KEEP_ZEROS.reset(token)
        skip = _skips_gradient(new_state, state)
        new_updates, new_state = _run_proposals(
            new_updates, new_state, updates, state, params, skip, extra_args
        )
        return _project(new_updates, new_state, state, params, skip)

    return optax.GradientTransformationExtraArgs(init, update)


def _check_transformation(name: str, value: Any, example: str) -> None:
    if not (callable(getattr(value, "init", None)) and callable(getattr(value, "update", None))):
        raise ValueError(
            f"{name}: expected an optax transformation such as {example}, got {value!r}"
        )


def _skips_gradient(new_state: PyTree, state: PyTree) -> Array | None:
    """Whether this step changes masks and applies no gradient; None where no method does so."""
    methods = sparse_states(new_state)
    if not any(sparse.spec.skips_gradient for sparse in methods):
        return None
    # not where a wrapper inside (MultiSteps) has left the state of an earlier step
    skips = [
        new.skip_gradient & has_moved(new, old.count)
        for new, old in zip(methods, sparse_states(state), strict=True)
    ]
    return jnp.any(jnp.stack(skips))


def _run_proposals(
    updates: PyTree,
    new_state: PyTree,
    grads: PyTree,
    state: PyTree,
    params: PyTree,
    skip: Array | None,
    extra: Mapping[str, Any],
) -> tuple[PyTree, PyTree]:
    """What methods make of the proposed weights, in the order of the chain."""
    if all(sparse.spec.on_proposed is None for sparse in sparse_states(new_state)):
        return updates, new_state
    proposed = optax.apply_updates(params, updates)
    if skip is not None:
        proposed = jax.tree.map(lambda old, new: jnp.where(skip, old, new), params, proposed)
    nodes, structure = jax.tree.flatten(new_state, is_leaf=is_sparse_state)
    before = jax.tree.leaves(state, is_leaf=is_sparse_state)
    weights = proposed
    for place, node in enumerate(nodes):
        if is_sparse_state(node):
            weights, nodes[place] = propose(node, before[place].count, weights, grads, extra)

    def moved(update: Array, new: Array, old: Array) -> Array:
        # an infinite weight minus itself is NaN
        return update if new is old else jnp.where(new == old, update, update + (new - old))

    updates = jax.tree.map(moved, updates, weights, proposed)
    return updates, jax.tree.unflatten(structure, nodes)


def _project(
    updates: PyTree, new_state: PyTree, state: PyTree, params: PyTree, skip: Array | None
) -> tuple[PyTree, PyTree]:
    """Updates that end in zero where pruned, and a state without moments there."""
    before, after = hard_masks(state, params), hard_masks(new_state, params)

    def project(update: Array, weight: Array, mask: Array) -> Array:
        if skip is not None:
            update = jnp.where(skip, jnp.zeros_like(update), update)
        return jnp.where(mask, update, -weight) if jnp.ndim(mask) else update

    names = [tree.path_name(path) for path, _ in jax.tree.leaves_with_path(params)]
    weights = jax.tree.leaves(params)
    shapes = dict(zip(names, map(jnp.shape, weights), strict=True))
    was_kept = dict(zip(names, before, strict=True))
    is_kept = dict(zip(names, after, strict=True))

    def reset(name: str | None, new: Any, old: Any) -> Any:
        if name is None or jnp.shape(new) != shapes[name]:
            return new
        if not jnp.issubdtype(jnp.result_type(new), jnp.inexact):
            return new
        value = new if skip is None else jnp.where(skip, old, new)
        if not jnp.ndim(is_kept[name]):
            return value
        return jnp.where(was_kept[name] & is_kept[name], value, jnp.zeros_like(value))

    leaves = zip(tree.match("updates", updates, params), weights, after, strict=True)
    projected = [project(update, weight, mask) for update, weight, mask in leaves]
    reset_state = tree.map_state(reset, params, new_state, state, is_leaf=is_sparse_state)
    # gradients on their way to a method are no moments
    reset_state = jax.tree.map(
        lambda node, new: (
            node._replace(acc_grads=new.acc_grads) if accumulates_for_method(node) else node
        ),
        reset_state,
        new_state,
        is_leaf=accumulates_for_method,
    )
    return jax.tree.unflatten(jax.tree.structure(params), projected), reset_state
