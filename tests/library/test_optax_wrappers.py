"""Optax's wrappers that average, interpolate or reject: what holds of masks and zeros under each.

Masks and their counts hold under all of them. Exact zeros hold where `keep_zeros` has the last word
over the parameters: it belongs outside of `schedule_free` and of averages that live in the
optimizer state. `lookahead` and averages outside of it mix parameters of several steps, so a weight
that is pruned in the midst of training fades out of them; `apply_masks` makes it zero.
"""

import functools
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from sparse_methods import (
    EXCHANGING,
    HARD,
    METHODS,
    MOVING,
    STATIC,
    chain,
    kinds_first,
    noise,
    small_tree,
)

import blocksparse_jax as bsj

RATE = 0.1


@functools.cache
def momentum_sgd(name):
    """The method with momentum under keep_zeros, and its jitted step; shared by the tests."""
    tx = bsj.keep_zeros(chain(name, optax.sgd(RATE, momentum=0.9)))
    return tx, compiled(tx)[0]


def compiled(tx):
    """One jitted training step, and a list with an entry for each time that it was traced."""
    traces = []

    def step(params, state, grads):
        traces.append(None)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return jax.jit(step), traces


def zeroed(tx, params):
    """The state, and the parameters with zeros where the first masks prune."""
    state = tx.init(params)
    return bsj.apply_masks(params, bsj.get_masks(state)), state


def pruned_values(params, masks):
    """All values at pruned places, one flat array."""
    values = [
        np.asarray(p)[~np.broadcast_to(m, p.shape)]
        for p, m in zip(jax.tree.leaves(params), jax.tree.leaves(masks), strict=True)
    ]
    return np.concatenate(values)


def counts(masks):
    return [int(mask.sum()) for mask in jax.tree.leaves(masks) if mask.ndim]


def assert_close(actual, expected):
    chex.assert_trees_all_close(actual, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", kinds_first(METHODS))
def test_lookahead_around_keep_zeros(name, params):
    """Masks, fast and slow parameters are those of a loop that does lookahead by hand. Fast
    parameters are zero where pruned, except right after a synchronisation that brought back what
    the slow ones still had of a pruned weight.
    """
    inner, inner_step = momentum_sgd(name)
    tx = optax.lookahead(inner, sync_period=3, slow_step_size=0.5)
    params, _ = zeroed(inner, params)
    inner_state = inner.init(params)
    both = optax.LookaheadParams.init_synced(params)
    state = tx.init(both)
    chex.assert_trees_all_equal(bsj.get_masks(state), bsj.get_masks(inner_state))
    step, traces = compiled(tx)
    fast = slow = params
    for t in range(9):
        grads = noise(params, t)
        both, state = step(both, state, grads)
        fast, inner_state = inner_step(fast, inner_state, grads)
        synchronised = t % 3 == 2
        before = slow
        if synchronised:
            fast = slow = jax.tree.map(lambda s, f: s + 0.5 * (f - s), slow, fast)
        masks = bsj.get_masks(state)
        chex.assert_trees_all_equal(masks, bsj.get_masks(inner_state))
        assert_close(both.fast, fast)
        assert_close(both.slow, slow)
        fast, slow = both.fast, both.slow  # so that roundings do not add up
        if name in HARD and not synchronised:
            assert not pruned_values(both.fast, masks).any()
        if name in HARD and synchronised:
            np.testing.assert_array_equal(
                pruned_values(both.slow, masks), 0.5 * pruned_values(before, masks)
            )
        if name in STATIC:
            assert not pruned_values(both.fast, masks).any()
            assert not pruned_values(both.slow, masks).any()
    if name in HARD:
        assert bsj.nonzero_pruned(bsj.apply_masks(both.slow, masks), state) == 0
    assert len(traces) == 1


@pytest.mark.parametrize("name", kinds_first(METHODS))
def test_an_average_of_the_parameters_outside(name, params):
    """`optax.ema` of the parameters: exact zeros where masks never change; where they do, what is
    left of a weight pruned since fades by the decay, and `apply_masks` removes it.
    """
    tx, step = momentum_sgd(name)
    average = optax.ema(0.5, debias=False)
    params, state = zeroed(tx, params)
    average_state, expected = average.init(params), jax.tree.map(np.zeros_like, params)
    for t in range(9):
        params, state = step(params, state, noise(params, t))
        averaged, average_state = average.update(params, average_state)
        expected = jax.tree.map(lambda a, p: 0.5 * a + 0.5 * np.asarray(p), expected, params)
    assert_close(averaged, expected)
    if name in STATIC:
        assert bsj.nonzero_pruned(averaged, state) == 0
        layouts = bsj.get_layouts(state)
        values, _ = bsj.pack_tree(averaged, None, layouts)
        chex.assert_trees_all_equal(bsj.unpack_tree(values, None, layouts)[0], averaged)
    if name in MOVING:
        assert bsj.nonzero_pruned(averaged, state) > 0
        assert bsj.nonzero_pruned(bsj.apply_masks(averaged, bsj.get_masks(state)), state) == 0
    chex.assert_trees_all_equal_structs(bsj.masked(averaged, state), params)


class AverageState(NamedTuple):
    average: Any


def average_inside(decay):
    """A moving average of the parameters that lives in the optimizer state, last in its chain."""

    def update(updates, state, params):
        new = optax.apply_updates(params, updates)
        return updates, AverageState(optax.incremental_update(new, state.average, 1 - decay))

    return optax.GradientTransformation(AverageState, update)


@pytest.mark.parametrize("name", kinds_first(METHODS))
def test_an_average_of_the_parameters_inside(name, params):
    """Under keep_zeros it is part of the state of each weight: zero where pruned or newly grown."""
    tx = bsj.keep_zeros(chain(name, optax.sgd(RATE, momentum=0.9), average_inside(0.5)))
    params, state = zeroed(tx, params)
    step, traces = compiled(tx)
    for t in range(8):
        before = bsj.get_masks(state)
        params, state = step(params, state, noise(params, t))
        after = bsj.get_masks(state)
        average = optax.tree.get(state, "average")
        if name in HARD:
            assert not pruned_values(params, after).any()
            assert not pruned_values(average, after).any()
            assert not pruned_values(average, before).any()
    assert np.any(average["conv1"]["kernel"])
    assert len(traces) == 1


@pytest.mark.parametrize("name", kinds_first(HARD))
def test_an_average_of_the_updates(name, params):
    """`optax.ema` in the chain smooths updates, as momentum does: zeros stay exact."""
    tx = bsj.keep_zeros(chain(name, optax.ema(0.9), optax.scale(-RATE)))
    params, state = zeroed(tx, params)
    step, _ = compiled(tx)
    for t in range(8):
        params, state = step(params, state, noise(params, t))
        masks = bsj.get_masks(state)
        assert not pruned_values(params, masks).any()
        assert not pruned_values(optax.tree.get(state, "ema"), masks).any()


@pytest.mark.parametrize("name", kinds_first(METHODS))
def test_schedule_free_inside_keep_zeros(name, params):
    """The parameters y, the iterates z and the averages x for evaluation are all zero where pruned;
    a step that changes masks moves no weight that stays; grown weights start at zero.
    """
    tx = bsj.keep_zeros(optax.contrib.schedule_free(chain(name, optax.sgd(RATE)), RATE))
    params, state = zeroed(tx, params)
    step, traces = compiled(tx)
    first = state
    for t in range(9):
        before, old_z, old_masks = params, state.z, bsj.get_masks(state)
        params, state = step(params, state, noise(params, t))
        masks = bsj.get_masks(state)
        evaluated = optax.contrib.schedule_free_eval_params(state, params)
        chex.assert_trees_all_equal_shapes_and_dtypes(state, first)
        if name not in HARD:
            continue
        for values in (params, state.z, evaluated):
            assert not pruned_values(values, masks).any()
            assert not pruned_values(values, old_masks).any() or not skips(state)
        if skips(state):
            chex.assert_trees_all_equal(params, bsj.apply_masks(before, masks))
            stays = jax.tree.map(jnp.logical_and, old_masks, masks)
            chex.assert_trees_all_equal(state.z, bsj.apply_masks(old_z, stays))
    assert np.any(evaluated["conv1"]["kernel"] != first.z["conv1"]["kernel"])
    assert len(traces) == 1


def skips(state):
    """Whether the last update changed masks instead of applying a gradient."""
    return any(bool(leaf) for leaf in jax.tree.leaves(optax.tree.get(state, "skip_gradient")))


def test_schedule_free_outside_of_keep_zeros_loses_zeros(params):
    """The other order: `keep_zeros` then speaks to z only through its update, and the interpolation
    keeps what y had of a weight that is pruned.
    """
    tx = optax.contrib.schedule_free(momentum_sgd("rigl")[0], RATE)
    params, state = zeroed(tx, params)
    step, _ = compiled(tx)
    for t in range(9):
        params, state = step(params, state, noise(params, t))
    assert bsj.nonzero_pruned(params, state) > 0


@pytest.mark.parametrize("name", kinds_first(METHODS))
def test_apply_if_finite_around_keep_zeros(name, params):
    tx = optax.apply_if_finite(momentum_sgd(name)[0], max_consecutive_errors=2)
    check_that_rejected_steps_leave_no_trace(tx, name, params)


@pytest.mark.parametrize("name", ["rigl", "hrbp-dynamic", "gradual", "subp"])
def test_apply_if_finite_inside_keep_zeros(name, params):
    inner = chain(name, optax.sgd(RATE, momentum=0.9))
    tx = bsj.keep_zeros(optax.apply_if_finite(inner, max_consecutive_errors=2))
    check_that_rejected_steps_leave_no_trace(tx, name, params)


def check_that_rejected_steps_leave_no_trace(tx, name, params):
    """With some gradients that are not finite, parameters, masks and moments are those of a run
    that never met these steps.
    """
    plain, plain_step = momentum_sgd(name)
    params, state = zeroed(tx, params)
    expected, plain_state = params, plain.init(small_tree())
    step, traces = compiled(tx)
    for t in range(7):
        for bad in {0: [jnp.nan], 3: [jnp.inf, -jnp.inf], 5: [jnp.nan]}.get(t, []):
            grads = noise(params, 100 + t)
            grads["conv1"]["kernel"] = grads["conv1"]["kernel"].at[0, 0, 0, 0].set(bad)
            unchanged = params
            params, state = step(params, state, grads)
            chex.assert_trees_all_equal(params, unchanged)
        params, state = step(params, state, noise(params, t))
        expected, plain_state = plain_step(expected, plain_state, noise(expected, t))
        chex.assert_trees_all_equal(bsj.get_masks(state), bsj.get_masks(plain_state))
        assert_close(params, expected)
    assert int(state.total_notfinite) == 4
    assert_close(state.inner_state, plain_state)
    assert len(traces) == 1


@pytest.mark.parametrize("name", EXCHANGING)
def test_counts_stay_exact_where_apply_if_finite_gives_up(name, params):
    """After two errors in a row it lets the third through: the weights are lost, the counts not."""
    tx = optax.apply_if_finite(momentum_sgd(name)[0], max_consecutive_errors=2)
    params, state = zeroed(tx, params)
    step, _ = compiled(tx)
    expected = counts(bsj.get_masks(state))
    bad = jax.tree.map(lambda p: jnp.full_like(p, jnp.nan), params)
    for _ in range(6):
        params, state = step(params, state, bad)
    assert int(state.notfinite_count) == 6
    assert counts(bsj.get_masks(state)) == expected
    assert np.isnan(params["conv1"]["bias"]).all()
