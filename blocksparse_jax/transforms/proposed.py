"""What a method does to the proposed weights `params + updates`, as `keep_zeros` runs it."""

import contextvars
import functools
import warnings
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from blocksparse_jax import schedules, tree
from blocksparse_jax.layout_nodes import is_layout
from blocksparse_jax.spec import Spec
from blocksparse_jax.state import SparseState
from blocksparse_jax.transforms.due import are_finite, has_moved, is_due
from blocksparse_jax.transforms.leaves import Step, sparse_leaves, with_leaves

INSIDE_KEEP_ZEROS = contextvars.ContextVar("INSIDE_KEEP_ZEROS", default=False)
"""Whether `keep_zeros` is running an update, and will call `on_proposed` after it."""


def lacks_keep_zeros(spec: Spec) -> bool:
    """Whether a method that acts on the proposed weights is called outside of `keep_zeros`.

    A warning where masks alone follow from them, which present weights can stand in for; else a
    ValueError.
    """
    if spec.on_proposed is None or INSIDE_KEEP_ZEROS.get():
        return False
    advice = "use sparse(method, optimizer) or keep_zeros(optax.chain(method, optimizer))"
    if not spec.ahead:
        raise ValueError(
            f"method: {spec.method} acts on the weights after an update, and only keep_zeros knows "
            f"them; {advice}"
        )
    warnings.warn(
        f"method: {spec.method} sets masks from the weights after an update, and only keep_zeros "
        f"knows them: outside of it those before the update decide; {advice}",
        stacklevel=3,
    )
    return True


def propose(
    state: SparseState, count: Array, params: PyTree, grads: PyTree, extra: Mapping[str, Any]
) -> tuple[PyTree, SparseState]:
    """Runs a method's `on_proposed` where its schedule is due.

    Args:
      state: of the method, after the update.
      count: int32, updates before it.
      params: the proposed weights `params + updates`, or `params` where the step applies no
        gradient.
      grads: the gradients that came to the chain.
      extra: the extra arguments of the update.

    Returns:
      The weights and the state that the method makes of them.
    """
    on_proposed = state.spec.on_proposed
    leaves = sparse_leaves(state, params, grads)
    if on_proposed is None or not leaves:
        return params, state
    step = Step(count, extra)
    schedule = state.spec.schedule
    always = isinstance(schedule, schedules.Always)
    due = has_moved(state, count) if always else is_due(schedule, count) & has_moved(state, count)
    finite = functools.partial(are_finite, gradients=False)
    change = due & jax.lax.cond(due, finite, lambda leaves: due, leaves)
    leaves = jax.lax.cond(
        change, lambda leaves: on_proposed(step, leaves), lambda leaves: leaves, leaves
    )
    weights = {name: leaf.weights for name, leaf in leaves.items()}
    new_state = with_leaves(state, leaves)._replace(
        nonfinite_updates=state.nonfinite_updates + (due & ~change).astype(jnp.int32)
    )
    return tree.replace(params, weights, is_leaf=is_layout), new_state
