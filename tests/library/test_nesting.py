"""Wrappers around and beside a sparse method: the orders that work, and those refused at init."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from sparse_methods import METHODS, chain, noise, small_tree

import blocksparse_jax as bsj

MAX = np.iinfo(np.int32).max


@pytest.mark.parametrize("name", ["rigl", "set", "hrbp-dynamic", "gradual", "subp"])
@pytest.mark.parametrize(
    ("wrapper", "beside"),
    [
        (
            "MultiSteps",
            lambda m: (m, optax.MultiSteps(optax.sgd(1.0), 4).gradient_transformation()),
        ),
        ("apply_every", lambda m: (m, optax.sgd(1.0), optax.apply_every(4))),
        ("apply_every", lambda m: (optax.apply_every(4), m, optax.sgd(1.0))),
    ],
    ids=["MultiSteps behind", "apply_every behind", "apply_every before"],
)
def test_accumulation_beside_a_method_that_changes_masks_is_refused(name, wrapper, beside):
    params = small_tree()
    tx = bsj.keep_zeros(optax.chain(*beside(METHODS[name](params))))
    with pytest.raises(ValueError, match=rf"inner: optax\.{wrapper}.*optax\.MultiSteps\(sparse\("):
        tx.init(params)


@pytest.mark.parametrize("name", ["fixed", "hrbp", "sr-ste"])
def test_accumulation_beside_masks_that_no_schedule_changes_is_fine(name):
    params = small_tree()
    behind = optax.MultiSteps(optax.sgd(0.1), 2).gradient_transformation()
    tx = bsj.sparse(METHODS[name](params), behind)
    outside = optax.MultiSteps(bsj.sparse(METHODS[name](params), optax.sgd(0.1)), 2)
    results = []
    for transformation in (tx, outside):
        state, trained = transformation.init(params), params
        trained = bsj.apply_masks(trained, bsj.get_masks(state)) if name != "sr-ste" else trained
        for step in range(4):
            updates, state = transformation.update(noise(params, step), state, trained)
            trained = optax.apply_updates(trained, updates)
        results.append(trained)
    for a, b in zip(*map(jax.tree.leaves, results), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_lookahead_inside_is_refused():
    params = small_tree()
    inner = chain("rigl", optax.sgd(0.1))
    tx = bsj.keep_zeros(optax.lookahead(inner, sync_period=2, slow_step_size=0.5))
    with pytest.raises(ValueError, match=r"inner: optax\.lookahead.*belongs outside"):
        tx.init(optax.LookaheadParams.init_synced(params))


def test_lookahead_that_resets_the_state_is_named():
    """It would take masks and step count back to the start at every synchronisation."""
    inner = bsj.sparse(bsj.rigl(0.5, until=9), optax.sgd(0.1))
    tx = optax.lookahead(inner, sync_period=2, slow_step_size=0.5, reset_state=True)
    params = optax.LookaheadParams.init_synced(small_tree())
    state = tx.init(params)
    _, state = tx.update(noise(params.fast, 0), state, params)
    with pytest.raises(
        ValueError, match=r"state: .*bool mask at 'conv1/kernel'.*reset_state=False"
    ):
        tx.update(noise(params.fast, 1), state, params)


@pytest.mark.parametrize(
    "method",
    [
        bsj.rigl(0.5, schedule=bsj.every(1)),
        bsj.rigl(0.5, schedule=bsj.every(7, start=MAX - 7 * 5)),
        bsj.hrbp_prune(0.7, group_size=16, schedule=bsj.every(1)),
    ],
)
def test_a_saturated_count_skips_no_gradient(method):
    """The last int32 is a step of the schedule, and the count stays there for ever."""
    params = small_tree()
    tx = bsj.sparse(method, optax.sgd(0.1))
    state = tx.init(params)
    assert bsj.get_spec(state).changes(MAX)
    state = (state[0]._replace(count=jnp.int32(MAX)), *state[1:])
    masks, update = bsj.get_masks(state), jax.jit(tx.update)
    for step in range(2):
        updates, state = update(noise(params, step), state, params)
        assert np.any(updates["stem"]["kernel"])
    assert float(bsj.sad(masks, bsj.get_masks(state)).total) == 0
    assert int(state[0].count) == MAX


@pytest.mark.parametrize("step", [MAX, MAX + 1, 2**40])
def test_steps_beyond_int32_are_refused_when_the_schedule_is_made(step):
    makers = {
        "until": lambda: bsj.every(100, until=step),
        "start": lambda: bsj.every(100, start=step),
        "end": lambda: bsj.between(0, step),
        "every": lambda: bsj.between(0, 10, every=step),
    }
    for name, make in makers.items():
        with pytest.raises(ValueError, match=rf"{name}: expected .*2,147,483,647.*got {step:,}"):
            make()
    with pytest.raises(ValueError, match="every: expected fewer"):
        bsj.every(step)
    bsj.every(100, until=MAX - 1)
    endless = bsj.keep_zeros(bsj.subp(0.5, schedule=bsj.between(0, MAX - 1, every=1000)))
    params = small_tree()
    jax.jit(endless.update)(params, endless.init(params), params)
