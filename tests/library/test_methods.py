"""SR-STE, RigL and gradual magnitude equal their plain NumPy references, step by step and over
whole training runs.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import references as ref
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import blocksparse_jax as bsj

few = settings(max_examples=8, deadline=None)
SHAPES = [(1, 1, 1, 1), (1, 1, 8, 4), (3, 3, 4, 2), (2, 3, 4, 3), (3, 1, 1, 5)]


def conv_kernels(path, leaf):
    return leaf.ndim == 4


def random_kernel(seed, shape):
    """Weights on a grid, so that many are equal and many are zero."""
    return (np.random.default_rng(seed).integers(-3, 4, shape) / 4).astype(np.float32)


def normal(seed, shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def host(tree):
    return jax.tree.map(np.asarray, tree)


def assert_close(actual, expected):
    np.testing.assert_allclose(np.asarray(actual), expected, rtol=2e-5, atol=2e-6)


# N:M, STE, SR-STE


@few
@given(
    shape=st.sampled_from([(1, 1, 4, 1), (1, 1, 8, 4), (3, 3, 8, 2), (2, 3, 4, 3)]),
    pattern=st.sampled_from([(2, 4), (1, 4), (1, 2), (4, 4)]),
    axis=st.sampled_from(["input", "kernel"]),
    seed=st.integers(0, 999),
)
def test_n_m_masks_forward_and_gradient(shape, pattern, axis, seed):
    n, m = pattern
    kernel, grad = random_kernel(seed, shape), random_kernel(seed + 1, shape)
    params, grads = (
        {"conv": kernel, "bias": np.ones(3, np.float32)},
        {"conv": grad, "bias": np.full(3, 2.0, np.float32)},
    )
    tx = bsj.sr_ste(n, m, decay=0.5, axis=axis, where=conv_kernels)
    state = tx.init(params)
    updates, state = tx.update(grads, state, params)
    mask = ref.n_m_mask(kernel, n, m, axis)
    np.testing.assert_array_equal(bsj.get_masks(state)["conv"], mask)
    assert_close(updates["conv"], ref.sr_ste_gradient(grad, kernel, mask, 0.5))
    np.testing.assert_array_equal(updates["bias"], grads["bias"])

    later = {"conv": random_kernel(seed + 2, shape), "bias": params["bias"]}
    forward, pullback = jax.vjp(lambda p: bsj.masked(p, state), later)
    np.testing.assert_array_equal(
        forward["conv"], later["conv"] * ref.n_m_mask(later["conv"], n, m, axis)
    )
    np.testing.assert_array_equal(forward["bias"], later["bias"])
    (back,) = pullback(grads)
    np.testing.assert_array_equal(back["conv"], grad)  # straight through


def test_n_m_by_hand():
    kernel = np.array([0.3, -0.9, 0.1, 0.2, 0.5, 0.5, -0.5, 0.5], np.float32).reshape(1, 1, 8, 1)
    state = bsj.sr_ste(2, 4, where=conv_kernels).init({"conv": kernel})
    forward = bsj.masked({"conv": kernel}, state)["conv"]
    np.testing.assert_array_equal(
        np.asarray(forward).ravel(), np.array([0.3, -0.9, 0, 0, 0.5, 0.5, 0, 0], np.float32)
    )


def test_n_m_along_the_kernel_by_hand():
    """One filter, 2 channels of 1 x 2 taps: the run is (c0 x0, c0 x1, c1 x0, c1 x1), and one input
    axis of 2 does not hold 4.
    """
    kernel = np.zeros((1, 2, 2, 1), np.float32)
    kernel[0, :, 0, 0], kernel[0, :, 1, 0] = [1, 4], [3, 2]
    state = bsj.sr_ste(2, 4, axis="kernel", where=conv_kernels).init({"conv": kernel})
    forward = np.asarray(bsj.masked({"conv": kernel}, state)["conv"])
    assert forward[0].reshape(-1).tolist() == [0, 3, 4, 0]


@pytest.mark.parametrize("value", [0.0, 0.1, -7.0])
@pytest.mark.parametrize("axis", ["input", "kernel"])
def test_n_m_with_all_equal_weights_keeps_the_first_of_each_group(axis, value):
    kernel = np.full((3, 3, 8, 2), value, np.float32)
    tx = bsj.sr_ste(2, 4, axis=axis, where=conv_kernels)
    _, state = tx.update({"conv": kernel}, tx.init({"conv": kernel}), {"conv": kernel})
    mask = np.asarray(bsj.get_masks(state)["conv"])
    runs = np.moveaxis(mask, 2, -1) if axis == "input" else mask.transpose(3, 2, 0, 1)
    assert (runs.reshape(-1, 4) == [True, True, False, False]).all()


@pytest.mark.parametrize(
    ("shape", "axis"), [((3, 3, 6, 4), "input"), ((1, 1, 1, 4), "input"), ((3, 3, 3, 4), "kernel")]
)
def test_m_that_does_not_divide_names_the_layer(shape, axis):
    params = {"fine": np.ones((3, 3, 8, 4), np.float32), "odd_one": np.ones(shape, np.float32)}
    with pytest.raises(ValueError, match="odd_one"):
        bsj.sr_ste(2, 4, axis=axis, where=conv_kernels).init(params)


def test_ste_is_sr_ste_without_decay():
    kernel, grad = normal(0, (3, 3, 8, 4)), normal(1, (3, 3, 8, 4))
    tx = bsj.ste(2, 4, where=conv_kernels)
    updates, state = tx.update({"conv": grad}, tx.init({"conv": kernel}), {"conv": kernel})
    np.testing.assert_array_equal(updates["conv"], grad)
    np.testing.assert_array_equal(bsj.get_masks(state)["conv"], ref.n_m_mask(kernel, 2, 4, "input"))


def test_sad_counts_the_changes():
    a, b = normal(0, (3, 3, 8, 4)) > 0, normal(1, (3, 3, 8, 4)) > 0
    value = bsj.sad({"conv": jnp.asarray(a)}, {"conv": jnp.asarray(b)})
    assert_close(jax.tree.leaves(value)[0], ref.sad(a, b))


@pytest.mark.parametrize("axis", ["input", "kernel"])
def test_sr_ste_trajectory_with_momentum_and_weight_decay(axis):
    """30 steps on `0.5 sum(a (w~ - target)^2)`; the SR-STE term joins the gradient before momentum,
    in addition to weight decay.
    """
    rate, momentum, weight_decay, decay = 0.1, 0.9, 1e-2, 0.2
    kernel, target, curvature = (
        normal(0, (3, 3, 8, 4)),
        normal(1, (3, 3, 8, 4)),
        np.abs(normal(2, (3, 3, 8, 4))),
    )
    sr_ste = bsj.sr_ste(2, 4, decay=decay, axis=axis, where=conv_kernels)
    tx = bsj.keep_zeros(
        optax.chain(
            sr_ste, optax.add_decayed_weights(weight_decay), optax.sgd(rate, momentum=momentum)
        )
    )

    def loss(params, state):
        return 0.5 * (curvature * (bsj.masked(params, state)["conv"] - target) ** 2).sum()

    @jax.jit
    def step(params, state):
        updates, state = tx.update(jax.grad(loss)(params, state), state, params)
        return optax.apply_updates(params, updates), state

    params = {"conv": jnp.asarray(kernel)}
    state, trace = tx.init(params), np.zeros_like(kernel)
    changes = 0
    for _ in range(30):
        params, state = step(params, state)
        mask = ref.n_m_mask(kernel, 2, 4, axis)
        grad = ref.sr_ste_gradient(curvature * (kernel * mask - target), kernel, mask, decay)
        trace = momentum * trace + grad + weight_decay * kernel
        kernel = kernel - rate * trace
        changes += (mask != ref.n_m_mask(kernel, 2, 4, axis)).sum()
        np.testing.assert_allclose(params["conv"], kernel, rtol=1e-4, atol=1e-5)
    assert changes > 0
    assert (kernel != 0).all()  # soft: nothing is zeroed


# RigL


@functools.cache
def compiled(method, *args, **options):
    """One jitted `init` and `update` for each set of options, so that hypothesis does not compile
    again and again.
    """
    tx = method(*args, where=conv_kernels, **options)
    return jax.jit(tx.init), jax.jit(tx.update)


def masks_over(functions, params_at, grads_at, steps):
    """Runs `update` at steps 0, 1, ... with the params and gradients of each step; yields step,
    masks before and after, updates, state.
    """
    init, update = functions
    state = init(params_at(0))
    for t in range(steps):
        before = host(bsj.get_masks(state))
        updates, state = update(grads_at(t), state, params_at(t))
        yield t, before, host(bsj.get_masks(state)), host(updates), state


@few
@given(shape=st.sampled_from(SHAPES), seed=st.integers(0, 999))
def test_rigl_steps(shape, seed):
    """Every step: masks move only when due, to the reference's, with no gradient; otherwise the
    gradient is masked.
    """
    start, until, every, drop_fraction = 1, 8, 3, 0.917
    tx = compiled(
        bsj.rigl,
        0.4,
        update_every=every,
        start=start,
        until=until,
        drop_fraction=drop_fraction,
        budget="uniform",
    )

    def params_at(t):
        return {"conv": random_kernel(seed + t, shape), "bias": np.ones(2, np.float32)}

    def grads_at(t):
        return {"conv": random_kernel(seed + 100 + t, shape), "bias": np.full(2, 3.0, np.float32)}

    for t, before, after, updates, state in masks_over(tx, params_at, grads_at, 10):
        kernel, grad = params_at(t)["conv"], grads_at(t)["conv"]
        due = ref.rigl_due(t, start, until, every)
        assert bool(state.skip_gradient) == due
        if due:
            count = ref.rigl_drop_count(t, before["conv"].sum(), start, until, drop_fraction)
            assert abs(count - round(count)) > 1e-4 or count == 0
            expected = ref.rigl_mask(kernel, grad, before["conv"], int(count))
            np.testing.assert_array_equal(after["conv"], expected)
            assert not any(u.any() for u in jax.tree.leaves(updates))
        else:
            np.testing.assert_array_equal(after["conv"], before["conv"])
            np.testing.assert_array_equal(updates["conv"], grad * after["conv"])
            np.testing.assert_array_equal(updates["bias"], grads_at(t)["bias"])
        assert after["conv"].sum() == before["conv"].sum()


def test_rigl_due_steps():
    """After `start`, every `update_every` steps counted from it, before `until`."""
    tx = compiled(bsj.rigl, 0.5, update_every=4, start=2, until=14)

    def params_at(t):
        return {"conv": normal(t, (3, 3, 8, 8))}

    changed = [
        t
        for t, before, after, _, _ in masks_over(tx, params_at, params_at, 20)
        if (before["conv"] != after["conv"]).any()
    ]
    assert changed == [6, 10]


@pytest.mark.parametrize("budget", ["erk", "uniform"])
def test_rigl_starts_random_with_exact_counts(budget):
    shapes = [(1, 1, 16, 16), (3, 3, 16, 32), (1, 3, 5, 7)]
    params = {f"conv_{i}": np.ones(s, np.float32) for i, s in enumerate(shapes)}
    densities = ref.erk_densities(shapes, 0.37) if budget == "erk" else [0.37] * len(shapes)

    @jax.jit
    def draw(key):
        return bsj.get_masks(
            bsj.rigl(0.63, until=100, budget=budget, where=conv_kernels, key=key).init(params)
        )

    masks = [host(draw(jax.random.key(seed))) for seed in range(2)]
    for i, (shape, density) in enumerate(zip(shapes, densities)):
        first, second = (np.broadcast_to(m[f"conv_{i}"], shape) for m in masks)
        assert first.sum() == second.sum() == round(density * first.size)
        assert density == 1 or (first != second).any()
    assert budget == "uniform" or max(densities) == 1 > min(densities)


@pytest.mark.parametrize("value", [0.0, 0.1])
def test_rigl_with_all_equal_weights_and_gradients(value):
    """The first active weights in C order stay, the first of the rest come: the mask is then the
    reference's, whatever the ties.
    """
    shape = (3, 3, 4, 4)
    tx = compiled(bsj.rigl, 0.5, update_every=1, until=10, drop_fraction=0.9, budget="uniform")

    def at(t):
        return {"conv": np.full(shape, value, np.float32)}

    for t, before, after, _, _ in masks_over(tx, at, at, 4):
        if t > 0:
            n_drop = int(ref.rigl_drop_count(t, before["conv"].sum(), 0, 10, 0.9))
            assert n_drop > 0
            np.testing.assert_array_equal(
                after["conv"], ref.rigl_mask(at(t)["conv"], at(t)["conv"], before["conv"], n_drop)
            )


def test_rigl_prefers_active_zeros_to_pruned_weights():
    """An active weight of 0 is kept before any pruned one, though both score 0 and the pruned one
    may come first in C order.
    """
    shape = (1, 1, 8, 8)
    tx = compiled(bsj.rigl, 0.5, update_every=1, until=1000, drop_fraction=0.3, budget="uniform")

    def at(t):
        return {"conv": np.zeros(shape, np.float32)}

    def grads_at(t):
        return {"conv": np.arange(64, dtype=np.float32).reshape(shape)}

    for t, before, after, _, _ in masks_over(tx, at, grads_at, 2):
        if t == 1:
            n_drop = int(ref.rigl_drop_count(1, 32, 0, 1000, 0.3))
            stay = np.flatnonzero(before["conv"])[: 32 - n_drop]
            assert n_drop == 9
            assert after["conv"].ravel()[stay].all()


@pytest.mark.parametrize("masked_start", [True, False])
def test_rigl_trajectory_under_keep_zeros(masked_start):
    """30 steps of chain(rigl, weight decay, momentum): params and momentum equal NumPy's, new
    weights start at 0 with no momentum.
    """
    start, until, every, drop_fraction, rate, momentum, weight_decay = (
        0,
        23,
        4,
        0.31,
        0.1,
        0.9,
        1e-2,
    )
    shape = (3, 3, 8, 4)
    target, noise, bias_noise = normal(1, shape), normal(2, (30, *shape)), normal(3, (30, 4))
    rigl = bsj.rigl(
        0.7,
        update_every=every,
        start=start,
        until=until,
        drop_fraction=drop_fraction,
        where=conv_kernels,
        key=jax.random.key(0),
    )
    tx = bsj.keep_zeros(
        optax.chain(
            rigl, optax.add_decayed_weights(weight_decay), optax.sgd(rate, momentum=momentum)
        )
    )
    params = {"conv": jnp.asarray(normal(0, shape)), "bias": jnp.ones(4)}
    state = tx.init(params)
    mask = np.asarray(bsj.get_masks(state)["conv"])
    if masked_start:
        params = bsj.apply_masks(params, bsj.get_masks(state))
    kernel, bias = host(params)["conv"], host(params)["bias"]
    trace, bias_trace = np.zeros_like(kernel), np.zeros_like(bias)
    step = jax.jit(tx.update)
    grown_total = 0
    for t in range(30):
        grads = {"conv": 0.3 * (params["conv"] - target) + noise[t], "bias": bias_noise[t]}
        updates, state = step(grads, state, params)
        params = optax.apply_updates(params, updates)

        grad = 0.3 * (kernel - target) + noise[t]
        if ref.rigl_due(t, start, until, every):
            count = ref.rigl_drop_count(t, mask.sum(), start, until, drop_fraction)
            assert abs(count - round(count)) > 1e-3
            new_mask = ref.rigl_mask(kernel, grad, mask, int(count))
            both, mask = mask & new_mask, new_mask
            grown_total += (mask & ~both).sum()
            kernel, trace = (
                kernel * both,
                trace * both,
            )  # pruned and truly new weights at 0; just-dropped regrown ones live on
        else:
            trace = momentum * trace + grad * mask + weight_decay * kernel
            kernel = (kernel - rate * trace) * mask
            bias_trace = momentum * bias_trace + bias_noise[t] + weight_decay * bias
            bias = bias - rate * bias_trace
        np.testing.assert_array_equal(bsj.get_masks(state)["conv"], mask)
        assert not np.asarray(params["conv"])[~mask].any()
        assert_close(params["conv"], kernel)
        assert_close(params["bias"], bias)
        momenta = optax.tree.get(state, "trace")
        assert_close(momenta["conv"] * mask, trace * mask)
        assert_close(momenta["bias"], bias_trace)
    assert grown_total > 20


# Gradual magnitude


@few
@given(
    shape=st.sampled_from(SHAPES[:3]),
    seed=st.integers(0, 999),
    options=st.sampled_from([(0.0, 3), (0.213, 1)]),
)
def test_gradual_magnitude_steps(shape, seed, options):
    """Every step: counts of the cubic schedule, the largest weights, nested masks, masked
    gradients.
    """
    start, end, every, final = 2, 8, 3, 0.717
    initial, power = options
    tx = compiled(
        bsj.gradual_magnitude,
        final,
        start=start,
        end=end,
        update_every=every,
        initial_sparsity=initial,
        power=power,
    )

    def at(t):
        return {
            "conv": random_kernel(seed + t, shape) * (random_kernel(seed + 99 - t, shape) > 0.4),
            "bias": np.ones(2, np.float32),
        }

    expected = np.ones(shape, bool)
    for t, _, after, updates, state in masks_over(tx, at, at, 11):
        if start <= t <= end and (t - start) % every == 0:
            sparsity = ref.cubic_sparsity(t, start, end, initial, final, power)
            assume(round((1 - sparsity) * expected.size) > 0)
            expected = ref.gradual_mask(at(t)["conv"], expected, sparsity)
            assert expected.sum() == round((1 - sparsity) * expected.size)
        np.testing.assert_array_equal(np.broadcast_to(after["conv"], shape), expected)
        np.testing.assert_array_equal(updates["conv"], at(t)["conv"] * expected)
        np.testing.assert_array_equal(updates["bias"], at(t)["bias"])
        assert not bool(state.skip_gradient)


def test_gradual_magnitude_never_empties_a_layer():
    """`round(0.1 * 4)` is 0 weights: one stays."""
    tx = compiled(bsj.gradual_magnitude, 0.9, start=0, end=1, update_every=1)

    def at(t):
        return {"conv": np.array([1, 3, -4, 2], np.float32).reshape(1, 1, 4, 1)}

    *_, (_, _, after, _, _) = masks_over(tx, at, at, 2)
    assert after["conv"].ravel().tolist() == [False, False, True, False]


def test_gradual_magnitude_reaches_its_sparsity_at_an_end_between_updates():
    tx = compiled(bsj.gradual_magnitude, 0.5, start=1, end=6, update_every=3)

    def at(t):
        return {"conv": normal(t, (1, 1, 8, 10))}

    kept = [int(after["conv"].sum()) for _, _, after, _, _ in masks_over(tx, at, at, 9)]
    assert kept == [
        80,
        80,
        80,
        80,
        43,
        43,
        40,
        40,
        40,
    ]  # 0.5 - 0.5 (1 - 3 / 5)^3 = 0.468: 43 of 80 (42.56)


def test_gradual_magnitude_by_hand():
    """Equation 1 with s_i = 0, s_f = 0.8 over [0, 4]: 0, 0.4625, 0.7, 0.7875, 0.8 of 80 weights."""
    tx = compiled(bsj.gradual_magnitude, 0.8, start=0, end=4, update_every=1)

    def at(t):
        return {"conv": normal(0, (1, 1, 8, 10))}

    kept = [
        int(np.broadcast_to(after["conv"], (1, 1, 8, 10)).sum())
        for _, _, after, _, _ in masks_over(tx, at, at, 6)
    ]
    assert kept == [80, 43, 24, 17, 16, 16]


@pytest.mark.parametrize("value", [0.0, 0.1])
def test_gradual_magnitude_with_all_equal_weights_keeps_the_first(value):
    tx = compiled(bsj.gradual_magnitude, 0.5, start=0, end=2, update_every=1)

    def at(t):
        return {"conv": np.full((2, 2, 2, 4), value, np.float32)}

    *_, (_, _, after, _, _) = masks_over(tx, at, at, 3)
    assert after["conv"].ravel().tolist() == [True] * 16 + [False] * 16


def test_gradual_magnitude_trajectory_under_keep_zeros():
    """Hard: under momentum and weight decay pruned weights are exact zeros and stay zero, whatever
    the size of their gradients.
    """
    shape, rate, momentum, weight_decay = (3, 3, 4, 4), 0.1, 0.9, 1e-2
    noise = normal(1, (20, *shape))
    method = bsj.gradual_magnitude(0.9, start=2, end=14, update_every=4, where=conv_kernels)
    tx = bsj.keep_zeros(
        optax.chain(
            method, optax.add_decayed_weights(weight_decay), optax.sgd(rate, momentum=momentum)
        )
    )
    params = {"conv": jnp.asarray(normal(0, shape))}
    state, step = tx.init(params), jax.jit(tx.update)
    kernel, mask, trace = normal(0, shape), np.ones(shape, bool), np.zeros(shape, np.float32)
    for t in range(20):
        updates, state = step({"conv": noise[t]}, state, params)
        params = optax.apply_updates(params, updates)
        if t in (2, 6, 10, 14):
            mask = ref.gradual_mask(kernel, mask, ref.cubic_sparsity(t, 2, 14, 0.0, 0.9))
        trace = (momentum * trace + noise[t] * mask + weight_decay * kernel) * mask
        kernel = (kernel - rate * trace) * mask
        np.testing.assert_array_equal(np.broadcast_to(bsj.get_masks(state)["conv"], shape), mask)
        assert not np.asarray(params["conv"])[~mask].any()
        assert_close(params["conv"], kernel)
    assert mask.sum() == round(0.1 * mask.size)
