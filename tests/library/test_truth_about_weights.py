"""summarize looks at the weights and moments, whatever the masks say."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from sparse_methods import noise, small_tree

import blocksparse_jax as bsj

RIGL = bsj.rigl(0.7, schedule=bsj.every(3), budget="uniform")


def trained(tx, steps, params=None, grads=noise):
    params = small_tree() if params is None else params
    state, update = tx.init(params), jax.jit(tx.update)
    for step in range(steps):
        updates, state = update(grads(params, step), state, params)
        params = optax.apply_updates(params, updates)
    return params, state


def last_line(params, state):
    return str(bsj.summarize(params, state)).splitlines()[-1]


def test_a_run_as_documented_has_no_remarks():
    params, state = trained(bsj.sparse(RIGL, optax.adamw(0.1)), 5)
    summary = bsj.summarize(params, state)
    assert summary.remarks == ()
    assert summary.weight_density == summary.density == pytest.approx(0.3, abs=0.001)
    assert summary.nonfinite_weights == summary.nonfinite_state == {}


@pytest.mark.parametrize("optimizer", [optax.sgd(0.1), optax.adamw(1e-3)], ids=["sgd", "adamw"])
def test_without_keep_zeros_the_density_of_the_weights_is_shown(optimizer):
    params, state = trained(optax.chain(RIGL, optimizer), 5)
    summary = bsj.summarize(params, state)
    sizes = {name: params[name]["kernel"].size for name in ("conv1", "conv2")}
    masks = bsj.get_masks(state)
    revived = {
        f"{name}/kernel": int(((params[name]["kernel"] != 0) & ~masks[name]["kernel"]).sum())
        for name in sizes
    }
    assert summary.nonzero_pruned_layers == revived
    assert summary.nonzero_pruned == sum(revived.values()) > 3000
    assert summary.weight_density == pytest.approx(1.0)
    expected = "keep 0.2999 by the masks, but 1.0000 of the weights are not zero (target 0.3000)"
    assert expected in last_line(params, state)
    assert (
        f"{summary.nonzero_pruned:,} pruned weights are not zero "
        f"({revived['conv1/kernel']:,} at 'conv1/kernel', and in 1 other): start from"
    ) in str(summary)


def test_weights_that_lookahead_brings_back_are_shown():
    tx = optax.lookahead(bsj.sparse(RIGL, optax.sgd(0.1)), sync_period=2, slow_step_size=0.5)
    state = tx.init(optax.LookaheadParams.init_synced(small_tree()))
    both = optax.LookaheadParams.init_synced(
        bsj.apply_masks(small_tree(), bsj.get_masks(state)),
    )
    for step in range(4):
        updates, state = jax.jit(tx.update)(noise(both.fast, step), state, both)
        both = optax.apply_updates(both, updates)
    for params in both:
        revived = int(bsj.nonzero_pruned(params, state))
        assert revived > 0
        assert bsj.summarize(params, state).nonzero_pruned == revived


@pytest.mark.parametrize("inside", [True, False])
def test_schedule_free_outside_is_named(inside):
    """Its own iterates z start as the unmasked weights and stay so: they come back by averaging."""
    optimizer = optax.contrib.schedule_free(optax.chain(RIGL, optax.sgd(0.1)), 0.1)
    tx = bsj.keep_zeros(optimizer)
    if not inside:
        tx = optax.contrib.schedule_free(bsj.sparse(RIGL, optax.sgd(0.1)), 0.1)
    params, state = trained(tx, 5)
    evaluated = optax.contrib.schedule_free_eval_params(state, params)
    for values in (params, evaluated):
        text = str(bsj.summarize(values, state))
        assert ("schedule_free holds" in text) != inside
        assert ("keep_zeros(schedule_free(optax.chain(method" in text) != inside
        assert (bsj.summarize(values, state).nonzero_pruned == 0) == inside
    zeroed = bsj.apply_masks(params, bsj.get_masks(state))
    assert ("schedule_free holds" in str(bsj.summarize(zeroed, state))) != inside


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_are_counted_by_layer(bad):
    params, state = trained(bsj.sparse(RIGL, optax.sgd(0.1, momentum=0.9)), 5)
    masks = bsj.get_masks(state)
    kept = np.flatnonzero(masks["conv1"]["kernel"])[:3]
    spoilt = params["conv1"]["kernel"].reshape(-1).at[kept].set(bad).reshape(3, 3, 16, 32)
    params["conv1"]["kernel"] = spoilt
    params["conv1"]["bias"] = params["conv1"]["bias"].at[5].set(bad)
    trace = state[1][0].trace
    trace["conv2"]["kernel"] = trace["conv2"]["kernel"].at[0, 0, 0, :2].set(bad)
    summary = bsj.summarize(params, state)
    assert summary.nonfinite_weights == {"conv1/bias": 1, "conv1/kernel": 3}
    assert summary.nonfinite_state == {"1/0/trace/conv2/kernel": 2}
    assert summary.nonzero_pruned == 0
    assert "4 weights (3 at 'conv1/kernel', and in 1 other) are not finite" in str(summary)
    assert "2 values of the optimizer state (2 at '1/0/trace/conv2/kernel') are not" in str(summary)


def test_scalars_of_a_state_may_be_infinite():
    """`reduce_on_plateau` starts from an infinite best loss."""
    tx = optax.chain(bsj.sparse(RIGL, optax.sgd(0.1)), optax.contrib.reduce_on_plateau())
    params = small_tree()
    state = tx.init(params)
    assert any(np.isinf(leaf).any() for leaf in jax.tree.leaves(state) if leaf.ndim == 0)
    assert bsj.summarize(params, state).nonfinite_state == {}


def test_updates_of_the_masks_that_were_left_out_are_shown():
    """One NaN in the gradients of two of three updates of the masks."""

    def grads(params, step):
        drawn = noise(params, step)
        if step in (3, 6):
            drawn["conv2"]["kernel"] = drawn["conv2"]["kernel"].at[0, 0, 1, 2].set(np.nan)
        return drawn

    params, state = trained(bsj.sparse(RIGL, optax.sgd(0.1)), 10, grads=grads)
    summary = bsj.summarize(params, state)
    assert summary.nonfinite_updates == int(state[0].nonfinite_updates) == 2
    assert summary.nonfinite_weights == {}, "a step that changes masks applies no gradient"
    assert "2 updates of the masks were left out, since the weights" in str(summary)
    assert "the masks stayed as they were" in str(summary)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_zeros_are_exact_whatever_the_values_were(bad):
    """Gradients that are not finite, at pruned weights and kept ones, for ten steps."""

    def grads(params, step):
        return jax.tree.map(lambda p: jnp.full_like(p, bad), params)

    for method in (RIGL, bsj.set_(0.7, schedule=bsj.every(3)), bsj.hrbp_prune(0.7, group_size=16)):
        params, state = trained(bsj.sparse(method, optax.adam(0.1)), 10, grads=grads)
        masks = bsj.get_masks(state)
        for name in ("conv1", "conv2"):
            pruned = ~np.asarray(masks[name]["kernel"])
            assert not np.asarray(params[name]["kernel"])[pruned].any()
            for moment in (state[1][0].mu, state[1][0].nu):
                assert not np.asarray(moment[name]["kernel"])[pruned].any()
        assert bsj.summarize(params, state).nonzero_pruned == 0


def test_a_momentum_that_a_method_keeps_forgets_gradients_that_are_not_finite():
    """SNFS: an infinite gradient would rule its moving average for ever."""
    method = bsj.snfs(0.5, schedule=bsj.every(100))
    params = small_tree()
    state = method.init(params)
    clean = state
    for step in range(3):
        grads = noise(params, step)
        bad = jax.tree.map(jnp.array, grads)
        bad["conv1"]["kernel"] = (
            bad["conv1"]["kernel"].at[0, 0, 0, 0].set([np.nan, np.inf][step % 2])
        )
        _, state = method.update(bad, state, params)
        _, clean = method.update(grads, clean, params)
    memory = np.asarray(state.memory["conv1"]["kernel"])
    expected = np.asarray(clean.memory["conv1"]["kernel"]).copy()
    expected[0, 0, 0, 0] = 0
    np.testing.assert_array_equal(memory, expected)
