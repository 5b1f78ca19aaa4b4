"""Dynamic HRBP equals its plain NumPy reference: which channels move, how many, when, and what the
optimizer does meanwhile.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import references as ref
from hypothesis import given, settings
from hypothesis import strategies as st

import blocksparse_jax as bsj

START, EVERY, DROP_FRACTION = 1, 2, 0.87
# shape, filters in a group, kept taps, kept channels, channels in a run, last step
CASES = [
    ((3, 3, 8, 8), 4, 3, 5, 1, 8),
    ((3, 3, 8, 8), 4, 3, 5, 1, None),
    ((3, 3, 16, 6), 3, 5, 8, 4, 8),
    ((2, 3, 6, 4), 2, 2, 3, 1, 8),
]
KINDS = ["normal", "grid", "equal", "zero", "one channel", "nan"]


def conv_kernels(name, leaf):
    return leaf.ndim == 4


def draw(kind, seed, shape):
    """Weights or gradients: without ties, with many, or with nothing else."""
    rng = np.random.default_rng(seed)
    normal = rng.normal(size=shape).astype(np.float32)
    if kind == "grid":
        return (rng.integers(-2, 3, shape) / 4).astype(np.float32)
    if kind == "equal":
        return np.full(shape, 0.5, np.float32)
    if kind == "zero":
        return np.zeros(shape, np.float32)
    if kind == "one channel":
        return normal * (np.arange(shape[2]) == rng.integers(shape[2]))[:, None]
    if kind == "nan":
        return np.where(rng.random(shape) < 0.2, np.float32(np.nan), normal)
    return normal


@functools.cache
def compiled(case):
    """A method that keeps exactly the case's counts, with jitted `init` and `update`."""
    shape, group_size, kept_taps, kept, run, until = case
    kh, kw, cin, _ = shape
    tx = bsj.hrbp_prune(
        1 - kept / cin * kept_taps / (kh * kw),
        group_size=group_size,
        block_density=kept_taps / (kh * kw),
        channel_block=run,
        update=bsj.periodic(EVERY, start=START, until=until),
        drop_fraction=DROP_FRACTION,
        where=conv_kernels,
    )
    return jax.jit(tx.init), jax.jit(tx.update)


def index_of(state):
    layout = bsj.get_layouts(state)["conv"]
    return [np.asarray(index) for index in (layout.filters, layout.channels, layout.taps)]


@settings(max_examples=15, deadline=None)
@given(
    case=st.sampled_from(CASES),
    weight_kind=st.sampled_from(KINDS[:5]),
    gradient_kind=st.sampled_from(KINDS),
    seed=st.integers(0, 999),
)
def test_every_step_equals_the_reference(case, weight_kind, gradient_kind, seed):
    shape, group_size, kept_taps, kept, run, until = case
    init, update = compiled(case)
    bias = np.ones(shape[3], np.float32)
    state = init({"conv": draw("normal", seed, shape), "bias": bias})
    filters, channels, taps = index_of(state)
    assert filters.shape == (shape[3] // group_size, group_size)
    assert (channels.shape[1], taps.shape[1]) == (kept, kept_taps)
    for step in range(9):
        kernel = draw(weight_kind, seed + step, shape)
        gradient = draw(gradient_kind, seed + 100 + step, shape)
        params, grads = {"conv": kernel, "bias": bias}, {"conv": gradient, "bias": 3 * bias}
        updates, state = update(grads, state, params)
        due = ref.rigl_due(step, START, np.inf if until is None else until, EVERY)
        if due and np.isfinite(gradient).all():  # else the channels stay
            fraction = ref.cosine_fraction(step, START, until, DROP_FRACTION)
            moved = ref.hrbp_moved_runs(kept // run, fraction)
            assert abs(moved - round(moved)) > 1e-3
            channels = ref.hrbp_channels(filters, channels, taps, kernel, gradient, int(moved), run)
        after = index_of(state)
        np.testing.assert_array_equal(after[0], filters)
        np.testing.assert_array_equal(after[1], channels)
        np.testing.assert_array_equal(after[2], taps)
        mask = ref.block_mask(filters, channels, taps, shape)
        np.testing.assert_array_equal(bsj.get_masks(state)["conv"], mask)
        expected = np.zeros(shape) if due else np.where(mask, gradient, 0)
        np.testing.assert_array_equal(updates["conv"], expected)
        np.testing.assert_array_equal(updates["bias"], 0 * bias if due else 3 * bias)


def test_only_the_kept_taps_and_the_filters_of_the_group_are_scored():
    """Two groups of two filters, a 1x2 kernel of which the first group keeps tap 0 and the second
    tap 1. What lies at the other tap is a hundred times as large and says the opposite.
    """
    start = [[0, 1], [2, 3]], [[0, 1], [0, 1]], [[0], [1]]
    tx = bsj.hrbp_prune(
        0.75,
        group_size=2,
        block_density=0.5,
        scores={"conv": ref.block_mask(*start, (1, 2, 4, 4)).astype(np.float32)},
        update=bsj.periodic(1),
        drop_fraction=0.5,
        where=conv_kernels,
    )
    kernel, gradient = (np.zeros((1, 2, 4, 4), np.float32) for _ in range(2))
    first, second = slice(0, 2), slice(2, 4)
    # Channels 0 and 1 are kept: the first group drops 1, the second drops 0.
    kernel[0, 0, :2, first] = [[2, 2], [1, 1]]
    kernel[0, 1, :2, first] = [[100, 100], [200, 200]]
    kernel[0, 1, :2, second] = [[1, 1], [2, 2]]
    kernel[0, 0, :2, second] = [[200, 200], [100, 100]]
    # The first group grows channel 2, the second channel 3.
    gradient[0, 0, 2:, first] = [[2, 2], [1, 1]]
    gradient[0, 1, 2:, first] = [[100, 100], [200, 200]]
    gradient[0, 1, 2:, second] = [[1, 1], [2, 2]]
    gradient[0, 0, 2:, second] = [[200, 200], [100, 100]]
    state = tx.init({"conv": kernel})
    assert [index.tolist() for index in index_of(state)] == list(start)
    for _ in range(2):
        _, state = tx.update({"conv": gradient}, state, {"conv": kernel})
    assert bsj.get_layouts(state)["conv"].channels.tolist() == [[0, 2], [1, 3]]


@pytest.mark.parametrize(
    ("drop_fraction", "moved"), [(0.0, 0), (0.12, 0), (0.13, 1), (0.5, 2), (0.7, 3), (1.0, 4)]
)
def test_how_many_channels_move(drop_fraction, moved):
    """Four kept channels of which the gradient wants none: `drop_fraction * 4`, rounded, move."""
    tx = bsj.hrbp_prune(
        0.5,
        group_size=2,
        block_density=1.0,
        update=bsj.periodic(1),
        drop_fraction=drop_fraction,
        where=conv_kernels,
    )
    kernel = jnp.arange(1.0, 9.0)[None, None, :, None] * jnp.ones((1, 1, 8, 2))
    gradient = kernel[:, :, ::-1]
    state = tx.init({"conv": kernel})
    assert bsj.get_layouts(state)["conv"].channels.tolist() == [[4, 5, 6, 7]]
    for _ in range(2):
        _, state = tx.update({"conv": gradient}, state, {"conv": kernel})
    expected = [*range(moved), *range(4 + moved, 8)]
    assert bsj.get_layouts(state)["conv"].channels.tolist() == [expected]


def test_a_channel_that_was_just_dropped_can_come_back():
    """It has the largest gradient of all that did not stay: its weights live on."""
    tx = bsj.hrbp_prune(
        0.5, group_size=2, block_density=1.0, update=bsj.periodic(1), drop_fraction=0.5
    )
    tx = bsj.keep_zeros(optax.chain(tx, optax.sgd(0.1, momentum=0.9)))
    kernel = jnp.array([9.0, 1.0, 0.1, 0.1, 0.1, 0.1])[None, None, :, None] * jnp.ones((1, 1, 6, 2))
    gradient = jnp.array([0.0, 5.0, 0.0, 1.0, 0.0, 0.0])[None, None, :, None] * jnp.ones(2)
    params = {"conv": jnp.where(kernel > 0.05, kernel, 0)}
    state = tx.init(params)
    assert bsj.get_layouts(state)["conv"].channels.tolist() == [[0, 1, 2]]
    params = bsj.apply_masks(params, bsj.get_masks(state))
    zeros = jax.tree.map(jnp.zeros_like, params)
    _, state = tx.update(zeros, state, params)
    updates, state = tx.update({"conv": gradient}, state, params)
    after = optax.apply_updates(params, updates)["conv"]
    # round(0.5 * 3) = 2 channels are dropped, 1 and 2; the gradient brings back 1, and 3.
    assert bsj.get_layouts(state)["conv"].channels.tolist() == [[0, 1, 3]]
    assert after[0, 0, :, 0].tolist() == [9.0, 1.0, 0.0, 0.0, 0.0, 0.0]


def test_trajectory_under_keep_zeros():
    """24 steps of chain(dynamic HRBP, weight decay, momentum): params and momentum equal NumPy's;
    new weights start at 0 and without momentum.
    """
    shape, _, _, kept, run, _ = CASES[0]
    rate, momentum, weight_decay, until = 0.1, 0.9, 1e-2, 19
    rng = np.random.default_rng(5)
    kernel, target = (rng.normal(size=shape).astype(np.float32) for _ in range(2))
    noise = rng.normal(size=(24, *shape)).astype(np.float32)
    method = bsj.hrbp_prune(
        1 - kept / 8 * 3 / 9,
        group_size=4,
        update=bsj.periodic(3, until=until),
        drop_fraction=0.7,
    )
    tx = bsj.keep_zeros(
        optax.chain(
            method, optax.add_decayed_weights(weight_decay), optax.sgd(rate, momentum=momentum)
        )
    )
    params = {"conv": jnp.asarray(kernel)}
    state, step = tx.init(params), jax.jit(tx.update)
    filters, channels, taps = index_of(state)
    mask, trace, grown = np.asarray(bsj.get_masks(state)["conv"]), np.zeros(shape), 0
    for t in range(24):
        gradient = 0.3 * (np.asarray(params["conv"]) - target) + noise[t]
        updates, state = step({"conv": gradient}, state, params)
        params = optax.apply_updates(params, updates)
        if ref.rigl_due(t, 0, until, 3):
            moved = ref.hrbp_moved_runs(kept, ref.cosine_fraction(t, 0, until, 0.7))
            assert abs(moved - round(moved)) > 1e-3
            channels = ref.hrbp_channels(filters, channels, taps, kernel, gradient, int(moved), run)
            after = ref.block_mask(filters, channels, taps, shape)
            both, mask = mask & after, after
            grown += (mask & ~both).sum()
            kernel, trace = kernel * both, trace * both
        else:
            trace = (momentum * trace + gradient * mask + weight_decay * kernel) * mask
            kernel = (kernel - rate * trace) * mask
        np.testing.assert_array_equal(bsj.get_masks(state)["conv"], mask)
        assert not np.asarray(params["conv"])[~mask].any()
        np.testing.assert_allclose(params["conv"], kernel, rtol=2e-5, atol=2e-6)
        np.testing.assert_allclose(
            optax.tree.get(state, "trace")["conv"], trace, rtol=2e-5, atol=2e-6
        )
    assert grown > 20
