"""Wrappers of optax that a sparse method cannot work inside or outside of, refused at init."""

from typing import Any

import jax
import optax
from jaxtyping import PyTree

from blocksparse_jax.schedules import Always, Never
from blocksparse_jax.state import SparseState, is_sparse_state

_ApplyEvery = type(jax.eval_shape(optax.apply_every(1).init, {}))
_ACCUMULATE = (
    "optax.MultiSteps(sparse(method, optimizer), every_k_schedule=k), whose methods see the mean "
    "gradient and count whole steps"
)


def check_nesting(state: PyTree, params: PyTree) -> None:
    """Refuses an order of wrappers in which a method would get a part of the gradient.

    Args:
      state: the first state of the chain inside `keep_zeros`.
      params: the parameters it was made for.

    Raises:
      ValueError: gradients are accumulated behind or before a method that changes masks at some
        steps, or lookahead is inside; the message gives the order that works.
    """
    if isinstance(params, optax.LookaheadParams):
        raise ValueError(
            "inner: optax.lookahead holds two copies of the weights and belongs outside: "
            "optax.lookahead(sparse(method, optimizer), sync_period=..., slow_step_size=...)"
        )
    changing = [sparse.spec.method for sparse in _methods(state) if _changes_at_some_steps(sparse)]
    if not changing:
        return
    for node in jax.tree.leaves(state, is_leaf=_accumulates):
        if _accumulates(node):
            wrapper = "MultiSteps" if isinstance(node, optax.MultiStepsState) else "apply_every"
            raise ValueError(
                f"inner: optax.{wrapper} beside {changing[0]} would show it every micro-batch "
                f"alone, and its schedule would count micro-batches; use {_ACCUMULATE}"
            )


def accumulates_for_method(node: Any) -> bool:
    """True for the state of an `optax.MultiSteps` whose inner chain holds a sparse method."""
    return isinstance(node, optax.MultiStepsState) and bool(_methods(node.inner_opt_state))


def _accumulates(node: Any) -> bool:
    if isinstance(node, optax.MultiStepsState):
        return not accumulates_for_method(node)
    return isinstance(node, _ApplyEvery)


def _methods(state: PyTree) -> list[SparseState]:
    nodes = jax.tree.leaves(state, is_leaf=is_sparse_state)
    return [node for node in nodes if is_sparse_state(node)]


def _changes_at_some_steps(sparse: SparseState) -> bool:
    return not isinstance(sparse.spec.schedule, Always | Never)
