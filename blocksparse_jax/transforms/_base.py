"""The frame of every sparse method: an optax transformation from a few functions.

A method may act in three places: on the gradient (`penalty`, and the mask itself), on the masks at
the steps of its schedule (`redraw`), and on the proposed weights `params + updates` behind the
optimizer (`on_proposed`, which `keep_zeros` runs). Everywhere it sees its sparse leaves by name.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, PyTree

from blocksparse_jax import schedules, tree
from blocksparse_jax.layout_nodes import Dense, is_layout
from blocksparse_jax.patterns import Kept
from blocksparse_jax.spec import Spec
from blocksparse_jax.state import LAYOUTS_STAY_WHOLE, SparseState, stands_for_params
from blocksparse_jax.transforms.due import are_finite, cannot_grow, is_due
from blocksparse_jax.transforms.leaves import Leaf, Leaves, Step, sparse_leaves, with_leaves
from blocksparse_jax.transforms.proposed import lacks_keep_zeros, propose

Draw = Callable[[dict[str, Array]], Mapping[str, Kept]]
Redraw = Callable[[Step, Leaves], Mapping[str, Kept]]
Remember = Callable[[Step, Leaf], Array]
Penalty = Callable[[str, Leaf], Array]


def sparse_transformation(
    spec: Callable[[dict[str, Array]], Spec] | Spec,
    *,
    where: tree.Where | None = None,
    draw: Draw,
    redraw: Redraw | None = None,
    penalty: Penalty | None = None,
    remember: Remember | None = None,
    memory: Callable[[Array], Array] | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Makes a sparse method from its parts.

    Args:
      spec: what is fixed about the method, or a function of the chosen leaves. Its `schedule` says
        when masks are redrawn; its `on_proposed` is run by `keep_zeros`.
      where: predicate (name, leaf) of the sparse leaves, default conv kernels except the stem.
      draw: chosen weights by name -> `Kept(mask, layout)` by name, at init.
      redraw: (step, leaves by name) -> `Kept` by name, at the steps of the schedule; arrays keep
        their shapes.
      penalty: (name, leaf) -> a term that is added to its gradient, before the optimizer.
      remember: (step, leaf) -> the leaf's memory, at every update, before masks are redrawn.
      memory: weights -> the leaf's memory at init, of the leaf's shape or a scalar; None with
        `remember` is float32 zeros in the leaf's shape. `on_proposed` may change it too.

    Returns:
      An optax transformation whose state is a `SparseState`.

    Raises:
      ValueError: at init, what `where` and `draw` refuse; at update, params of another tree or
        shape, or None, and an `on_proposed` outside of `keep_zeros`, unless it is `ahead`.

    Example:
      >>> from blocksparse_jax.schedules import every
      >>> def draw(chosen):
      ...     return {name: Kept(jnp.abs(w) > 1, Dense()) for name, w in chosen.items()}
      >>> method = sparse_transformation(Spec("threshold", 0.5), draw=draw)
      >>> params = {"conv": jnp.linspace(-2, 2, 64).reshape(1, 1, 8, 8)}
      >>> int(method.init(params).masks["conv"].sum())
      32
    """

    def init(params: PyTree) -> SparseState:
        if stands_for_params(params):
            return 0  # type: ignore[return-value]  # one node that is not like the parameters
        chosen = tree.choose(where, params)
        kept = _checked_draw(draw(chosen), chosen)
        dense = jax.tree.map(lambda leaf: jnp.asarray(True), params)
        masks = {name: layer.mask for name, layer in kept.items()}
        layouts = {name: layer.layout for name, layer in kept.items()}
        has_memory = memory is not None or remember is not None
        start = {name: (memory or _zeros)(leaf) for name, leaf in chosen.items() if has_memory}
        scalars = jax.tree.map(lambda leaf: jnp.zeros((), jnp.float32), params)
        static = spec(chosen) if callable(spec) else spec
        return SparseState(
            count=jnp.zeros((), jnp.int32),
            masks=tree.replace(dense, masks, is_leaf=is_layout),
            layouts=tree.replace(
                jax.tree.map(lambda leaf: Dense(), params), layouts, is_leaf=is_layout
            ),
            memory=tree.replace(scalars, start, is_leaf=is_layout) if has_memory else (),
            skip_gradient=jnp.asarray(False),
            stalled_updates=jnp.zeros((), jnp.int32),
            spec=dataclasses.replace(static, variables=tree.has_variables(params)),
            nonfinite_updates=jnp.zeros((), jnp.int32),
        )

    def update(
        updates: PyTree, state: SparseState, params: PyTree | None = None, **extra_args: Any
    ) -> tuple[PyTree, SparseState]:
        if params is None:
            raise ValueError(
                f"params: {state.spec.method} reads the weights, expected tx.update(grads, state, "
                "params), got None"
            )
        _check_layouts_stay_whole(state, params)
        step = Step(state.count, extra_args)
        leaves = sparse_leaves(state, params, updates)
        runs_alone = bool(leaves) and lacks_keep_zeros(state.spec)
        if remember is not None:
            leaves = {
                name: leaf._replace(memory=remember(step, leaf)) for name, leaf in leaves.items()
            }
        due = jnp.asarray(False)
        stalled, nonfinite = state.stalled_updates, state.nonfinite_updates
        if redraw is not None and leaves:
            due = is_due(state.spec.schedule, state.count)
            if state.spec.grows_by_gradient:
                stalled = stalled + cannot_grow(state.spec.method, due, leaves)
            leaves, left_out = _redraw(redraw, state.spec, due, step, leaves)
            nonfinite = nonfinite + left_out
        skip = due if state.spec.skips_gradient else jnp.asarray(False)
        new_state = with_leaves(state, leaves)._replace(
            count=optax.safe_increment(state.count),
            skip_gradient=skip,
            stalled_updates=stalled,
            nonfinite_updates=nonfinite,
        )
        passed_on = {
            name: _gradient(state.spec, name, leaf, penalty) for name, leaf in leaves.items()
        }
        grads = jax.tree.unflatten(
            jax.tree.structure(params), tree.match("updates", updates, params)
        )
        grads = tree.replace(grads, passed_on, is_leaf=is_layout)
        if redraw is not None and state.spec.skips_gradient:
            grads = jax.tree.map(lambda g: jnp.where(skip, jnp.zeros_like(g), g), grads)
        if runs_alone:
            _, new_state = propose(new_state, state.count, params, updates, extra_args)
        return grads, new_state

    return optax.GradientTransformationExtraArgs(init, update)


def _zeros(leaf: Array) -> Array:
    """A memory without a beginning of its own."""
    return jnp.zeros(leaf.shape, jnp.float32)


def _checked_draw(kept: Any, chosen: Mapping[str, Array]) -> dict[str, Kept]:
    """What a method's `draw` returned; ValueError unless it is a `Kept` for every leaf."""
    expected = "{name: Kept(mask, layout)} for every chosen leaf"
    if not isinstance(kept, Mapping) or set(kept) != set(chosen):
        names = sorted(kept) if isinstance(kept, Mapping) else kept
        raise ValueError(f"draw: expected {expected} {sorted(chosen)[:8]}, got {names!r}")
    for leaf, layer in kept.items():
        if not isinstance(layer, Kept):
            raise ValueError(f"draw: expected {expected}, got {type(layer).__name__} at {leaf!r}")
        mask = layer.mask
        if jnp.shape(mask) != chosen[leaf].shape or jnp.asarray(mask).dtype != bool:
            raise ValueError(
                f"draw: expected a bool mask of shape {chosen[leaf].shape} at {leaf!r}, got "
                f"{jnp.asarray(mask).dtype}{list(jnp.shape(mask))}"
            )
    return dict(kept)


def _check_layouts_stay_whole(state: SparseState, params: PyTree) -> None:
    """ValueError in `flax.nnx.Optimizer`, which would write back a dict in place of a layout.

    It shows by a state that was made for nnx variables and now lies in none, though the params are
    no plain dict.
    """
    taken_out = state.spec.variables and not tree.has_variables(state.masks)
    if (
        taken_out
        and not isinstance(params, dict)
        and jax.tree.leaves(state.layouts)
        and not LAYOUTS_STAY_WHOLE.get()
    ):
        raise ValueError(
            "state: flax.nnx.Optimizer would take its layouts apart, use bsj.nnx.Optimizer (in a "
            "loop of your own, give tx.update params and state of variables, or params as a dict)"
        )


def decay_of_pruned(decay: float) -> Penalty | None:
    """The penalty `decay * (1 - mask) * w` of soft methods; None without decay."""

    def pull(name: str, leaf: Leaf) -> Array:
        return decay * jnp.where(leaf.mask, 0, leaf.weights)

    return pull if decay else None


def _redraw(
    redraw: Redraw, spec: Spec, due: Array, step: Step, leaves: Leaves
) -> tuple[Leaves, Array]:
    """The leaves with new masks and layouts, where the schedule is due.

    Where a weight, or a gradient that decides, is not finite, masks stay; int32 1 says so.
    """
    present = {name: Kept(leaf.mask, leaf.layout) for name, leaf in leaves.items()}

    def change(leaves: Leaves) -> tuple[dict[str, Kept], Array]:
        finite = are_finite(leaves, gradients=spec.grows_by_gradient)
        kept = jax.lax.cond(
            finite, lambda leaves: dict(redraw(step, leaves)), lambda leaves: present, leaves
        )
        return kept, ~finite

    if isinstance(spec.schedule, schedules.Always):
        kept, left_out = change(leaves)
    else:
        kept, left_out = jax.lax.cond(
            due, change, lambda leaves: (present, jnp.asarray(False)), leaves
        )
    moved = {
        name: leaf._replace(mask=kept[name].mask, layout=kept[name].layout)
        for name, leaf in leaves.items()
    }
    return moved, left_out.astype(jnp.int32)


def _gradient(spec: Spec, name: str, leaf: Leaf, penalty: Penalty | None) -> Array:
    """The gradient that goes on to the optimizer: masked for hard methods, whole for soft ones."""
    grad = leaf.grad
    if penalty is not None:
        grad = grad + penalty(name, leaf).astype(grad.dtype)
    return grad if spec.straight_through else jnp.where(leaf.mask, grad, jnp.zeros_like(grad))
