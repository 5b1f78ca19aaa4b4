"""The frame of every sparse method: an optax transformation from a few functions.

A method may act in three places: on the gradient (`penalty`, and the mask itself), on the masks at
the steps of its schedule (`redraw`), and on the proposed weights `params + updates` behind the
optimizer (`on_proposed`, which `keep_zeros` runs). Everywhere it sees its sparse leaves by name.
"""

import contextvars
import dataclasses
import functools
import warnings
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, PyTree

from blocksparse_jax import schedules, tree
from blocksparse_jax.alike import flat, map_alike
from blocksparse_jax.layout import Dense, Layout, is_layout
from blocksparse_jax.patterns import Kept
from blocksparse_jax.spec import Spec
from blocksparse_jax.state import (
    LAYOUTS_STAY_WHOLE,
    SparseState,
    is_node,
    stands_for_params,
)


class Leaf(NamedTuple):
    """What a method sees of one sparse leaf.

    Attributes:
      weights: the parameter; in `on_proposed`, the proposed one.
      grad: its gradient, as it came to the method.
      mask: bool, what is kept now.
      layout: its layout, or a marker.
      memory: the method's own array, a scalar where it has none.
    """

    weights: Array
    grad: Array
    mask: Array
    layout: Layout
    memory: Array


class Step(NamedTuple):
    """When and with what a method is called.

    Attributes:
      count: int32, updates so far.
      extra: the extra arguments of `tx.update(..., **extra)`, e.g. `value` or `loss`.
    """

    count: Array  # type: ignore[assignment]  # int32[], like optax's; tuple.count or not
    extra: Mapping[str, Any]


Leaves = dict[str, Leaf]
Draw = Callable[[dict[str, Array]], Mapping[str, Kept]]
Redraw = Callable[[Step, Leaves], Mapping[str, Kept]]
Remember = Callable[[Step, Leaf], Array]
Penalty = Callable[[str, Leaf], Array]
OnProposed = Callable[[Step, Leaves], Leaves]

INSIDE_KEEP_ZEROS = contextvars.ContextVar("INSIDE_KEEP_ZEROS", default=False)
"""Whether `keep_zeros` is running an update, and will call `on_proposed` after it."""


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
        lacks_keep_zeros = bool(leaves) and _lacks_keep_zeros(state.spec)
        if remember is not None:
            leaves = {
                name: leaf._replace(memory=remember(step, leaf)) for name, leaf in leaves.items()
            }
        due = jnp.asarray(False)
        stalled, nonfinite = state.stalled_updates, state.nonfinite_updates
        if redraw is not None and leaves:
            due = _is_due(state.spec.schedule, state.count)
            if state.spec.grows_by_gradient:
                stalled = stalled + _cannot_grow(state.spec.method, due, leaves)
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
        if lacks_keep_zeros:
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


def _lacks_keep_zeros(spec: Spec) -> bool:
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


def decay_of_pruned(decay: float) -> Penalty | None:
    """The penalty `decay * (1 - mask) * w` of soft methods; None without decay."""

    def pull(name: str, leaf: Leaf) -> Array:
        return decay * jnp.where(leaf.mask, 0, leaf.weights)

    return pull if decay else None


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
    due = has_moved(state, count) if always else _is_due(schedule, count) & has_moved(state, count)
    finite = functools.partial(_are_finite, gradients=False)
    change = due & jax.lax.cond(due, finite, lambda leaves: due, leaves)
    leaves = jax.lax.cond(
        change, lambda leaves: on_proposed(step, leaves), lambda leaves: leaves, leaves
    )
    weights = {name: leaf.weights for name, leaf in leaves.items()}
    new_state = with_leaves(state, leaves)._replace(
        nonfinite_updates=state.nonfinite_updates + (due & ~change).astype(jnp.int32)
    )
    return tree.replace(params, weights, is_leaf=is_layout), new_state


def sparse_leaves(state: SparseState, params: PyTree, grads: PyTree) -> Leaves:
    """The leaves that a method prunes, by name; packed and dense leaves are none.

    Raises:
      ValueError: the state is of another tree, or a leaf has another shape than at init.
    """
    names = [tree.path_name(path) for path, _ in jax.tree.leaves_with_path(params)]
    masks = tree.match("state", state.masks, params, is_leaf=is_node)
    layouts = tree.match("state", state.layouts, params, is_leaf=is_node)
    gradients = tree.match("updates", grads, params)
    memory = [jnp.zeros(())] * len(names)
    if jax.tree.leaves(state.memory):
        memory = tree.match("state", state.memory, params, is_leaf=is_node)
    weights = jax.tree.leaves(params)
    leaves = {
        name: Leaf(*columns)
        for name, *columns in zip(names, weights, gradients, masks, layouts, memory, strict=True)
        if not isinstance(columns[2], optax.MaskedNode) and jnp.ndim(columns[2])
        if columns[2].size  # none where all channels were removed
    }
    for name, leaf in leaves.items():
        if leaf.mask.dtype != bool:
            raise ValueError(
                f"state: expected a bool mask at {name!r}, got {leaf.mask.dtype}: a wrapper did "
                "arithmetic with the masks. optax.lookahead(reset_state=True) does, and would take "
                "masks and step count back to the start: use reset_state=False; optax.contrib.sam "
                "does too: leave it out"
            )
        if not leaf.weights.shape == leaf.grad.shape == leaf.mask.shape:
            raise ValueError(
                f"params: expected shape {leaf.mask.shape} at {name!r} as at init, got weights "
                f"{leaf.weights.shape} and gradient {leaf.grad.shape}; packed values go with the "
                "packed state of pack_tree"
            )
    return leaves


def with_leaves(state: SparseState, leaves: Leaves) -> SparseState:
    """The state with the masks, layouts and memory of the given leaves."""
    masks = {name: leaf.mask for name, leaf in leaves.items()}
    layouts = {name: leaf.layout for name, leaf in leaves.items()}
    memory = {name: leaf.memory for name, leaf in leaves.items()}
    return state._replace(
        masks=tree.replace(state.masks, masks, is_leaf=is_node),
        layouts=tree.replace(state.layouts, layouts, is_leaf=is_node),
        memory=tree.replace(state.memory, memory, is_leaf=is_node),
    )


def _is_due(schedule: schedules.Schedule, count: Array) -> Array:
    """Whether masks change at that count; never at the last int32, where the count stays."""
    return jnp.asarray(schedule(count)) & (count < jnp.iinfo(jnp.int32).max)


def has_moved(state: SparseState, count: Array) -> Array:
    """Whether the update ran since that count: a wrapper such as MultiSteps leaves some out."""
    return (state.count != count) | (count == jnp.iinfo(jnp.int32).max)


def _redraw(
    redraw: Redraw, spec: Spec, due: Array, step: Step, leaves: Leaves
) -> tuple[Leaves, Array]:
    """The leaves with new masks and layouts, where the schedule is due.

    Where a weight, or a gradient that decides, is not finite, masks stay; int32 1 says so.
    """
    present = {name: Kept(leaf.mask, leaf.layout) for name, leaf in leaves.items()}

    def change(leaves: Leaves) -> tuple[dict[str, Kept], Array]:
        finite = _are_finite(leaves, gradients=spec.grows_by_gradient)
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


def _are_finite(leaves: Leaves, *, gradients: bool) -> Array:
    """Whether all weights, and gradients too, are finite.

    Arrays of a dtype are looked at together, which compiles many times as fast, but for those that
    are sharded over explicit axes.
    """
    groups: dict[Any, list[Array]] = {}
    for name, leaf in leaves.items():
        for array in (leaf.weights, leaf.grad) if gradients else (leaf.weights,):
            is_sharded = any(jax.typeof(array).sharding.spec)
            key = (array.dtype, name, id(array)) if is_sharded else array.dtype
            groups.setdefault(key, []).append(array)
    finite = []
    for arrays in groups.values():
        flat = [array.reshape(-1) for array in arrays] if len(arrays) > 1 else arrays
        finite.append(jnp.isfinite(jnp.concatenate(flat) if len(flat) > 1 else flat[0]).all())
    return jnp.stack(finite).all()


def _gradient(spec: Spec, name: str, leaf: Leaf, penalty: Penalty | None) -> Array:
    """The gradient that goes on to the optimizer: masked for hard methods, whole for soft ones."""
    grad = leaf.grad
    if penalty is not None:
        grad = grad + penalty(name, leaf).astype(grad.dtype)
    return grad if spec.straight_through else jnp.where(leaf.mask, grad, jnp.zeros_like(grad))


def _cannot_grow(method: str, due: Array, leaves: Leaves) -> Array:
    """1 where masks change now, and a layer's gradient is zero on all its pruned weights.

    The gradient must not be zero on the kept ones too: then the network has no gradient at all.
    Raises a ValueError where the values are known (outside of jit).
    """

    def look(layer: tuple[Array, Array], _: None) -> Array:
        grad, mask = layer
        nonzero = grad != 0
        parts = jnp.stack([nonzero & mask, nonzero & ~mask, ~mask])
        # One reduction, not three.
        on_kept, on_pruned, pruned = parts.any(tuple(range(1, parts.ndim)))
        return on_kept & ~on_pruned & pruned

    def look_at_all(leaves: Leaves) -> Array:
        layers = {name: (leaf.grad, leaf.mask) for name, leaf in leaves.items()}
        return jnp.stack(list(map_alike(look, flat(layers), dict.fromkeys(layers)).values()))

    stalled = jax.lax.cond(due, look_at_all, lambda leaves: jnp.zeros(len(leaves), bool), leaves)
    if not isinstance(stalled, jax.core.Tracer) and bool(stalled.any()):
        name = list(leaves)[stalled.tolist().index(True)]
        raise ValueError(
            f"updates: the gradient at {name!r} is zero on every pruned weight, so {method} can "
            "grow none; give its update steps the full gradient: conv(..., "
            "kernel_gradient='dense'), likewise in BlockSparseConv, or a dense convolution of the "
            "masked weights"
        )
    return stalled.any().astype(jnp.int32)
