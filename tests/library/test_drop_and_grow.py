"""drop_and_grow over every pattern, and its aliases SET and SNFS, against plain NumPy."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import references as ref

import blocksparse_jax as bsj
from blocksparse_jax import patterns as P
from blocksparse_jax.selection import highest_in_rows, ranks, ranks_of_stored

SHAPE = (3, 3, 16, 32)
EVERY = bsj.every(2, until=20)


def kernel(seed, shape=SHAPE):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def fraction_at(step, fraction=0.3, start=0, until=20):
    return fraction / 2 * (1 + np.cos(np.pi * (step - start) / (until - start)))


def kernel_of(kind, seed):
    """Weights or gradients, adversarial ones too."""
    rng = np.random.default_rng(seed)
    if kind == "ties":
        return rng.integers(-2, 3, SHAPE).astype(np.float32)
    if kind == "one channel":
        return kernel(seed) * (np.arange(SHAPE[2]) == 3)[:, None]
    if kind == "random":
        return kernel(seed)
    return np.full(SHAPE, 0.0 if kind == "zeros" else 0.5, np.float32)


def run(method, steps, params=None, grads=kernel, update=None, state=None):
    """The states before and after each step of a chain without an optimizer."""
    params = {"conv": jnp.asarray(kernel(99))} if params is None else params
    state, update = state or method.init(params), update or jax.jit(method.update)
    states = [state]
    for step in range(steps):
        _, state = update({"conv": jnp.asarray(grads(step))}, state, params)
        states.append(state)
    return params, states


PATTERNS = [
    P.unstructured(),
    P.kernel(),
    P.window(),
    P.n_of_m(4, 8),
    P.one_by_n(8),
    P.channel("input"),
    P.channel("output"),
    P.block(group_size=8),
    P.block(group_size=16, block_density=1.0, channel_block=4),
]


EDGES = [
    (P.unstructured(), 0.0),
    (P.unstructured(), 0.99),
    (P.one_by_n(8), 0.99),
    pytest.param(P.channel("input"), 0.99, marks=pytest.mark.slow),
    pytest.param(P.block(group_size=8), 0.0, marks=pytest.mark.slow),
    pytest.param(P.block(group_size=8), 0.99, marks=pytest.mark.slow),
]


@pytest.mark.parametrize(
    ("pattern", "sparsity"), [*((pattern, 0.75) for pattern in PATTERNS), *EDGES], ids=str
)
@pytest.mark.filterwarnings("ignore:sparsity", "ignore:block_density")
def test_every_pattern_moves_its_sets_as_the_reference_does(pattern, sparsity):
    """The counts of every row stay; what stays and what comes follows from the definition."""
    sparsity = 1 - pattern.density if pattern.density else sparsity
    method = bsj.drop_and_grow(sparsity, pattern=pattern, schedule=EVERY, fraction=0.6)
    update, first = jax.jit(method.update), method.init({"conv": jnp.asarray(kernel(99))})
    for kind in ("random", "ties", "equal", "zeros", "one channel"):
        params = {"conv": jnp.asarray(kernel_of(kind, 99))}
        grads = functools.partial(kernel_of, kind)
        moved = check_moves(pattern, params, grads, run(method, 7, params, grads, update, first)[1])
        assert moved > 0 or sparsity == 0 or kind != "random"


def check_moves(pattern, params, grads, states):
    """How many sets moved in a run whose every step is the reference's."""
    weights = np.abs(np.asarray(params["conv"]))
    moved = 0
    for step, (before, after) in enumerate(itertools.pairwise(states)):
        layout = before.layouts["conv"]
        old = np.asarray(pattern.kept_sets(before.masks["conv"], layout))
        new = np.asarray(pattern.kept_sets(after.masks["conv"], after.layouts["conv"]))
        np.testing.assert_array_equal(old.sum(1), new.sum(1))
        if not EVERY(step):
            np.testing.assert_array_equal(old, new)
            continue
        stay = np.asarray(pattern.sets(jnp.asarray(weights), layout))
        come = np.asarray(pattern.sets(jnp.asarray(np.abs(grads(step))), layout))
        share = np.float32(fraction_at(step, 0.6)) * old.sum(1)
        rounding = 0.0 if pattern == P.unstructured() else 0.5
        counts = np.floor(share + rounding).astype(int)
        for row in range(len(old)):
            expected = ref.exchange(old[row], stay[row], come[row], counts[row])
            np.testing.assert_array_equal(new[row], expected)
        moved += (old != new).sum()
        assert bool(after.skip_gradient)
        if isinstance(after.layouts["conv"], bsj.BlockLayout):
            bsj.validate(after.layouts["conv"])
            mask = bsj.layout_to_mask(after.layouts["conv"])
            np.testing.assert_array_equal(mask, after.masks["conv"])
    return moved


def test_set_drops_the_smallest_and_grows_at_random():
    method = bsj.set_(0.9, schedule=bsj.every(2), drop_fraction=0.4)
    params, states = run(method, 5, grads=lambda step: np.zeros(SHAPE, np.float32))
    weights = np.abs(np.asarray(params["conv"]))
    grown = []
    for before, after in ((states[2], states[3]), (states[4], states[5])):
        old, new = np.asarray(before.masks["conv"]), np.asarray(after.masks["conv"])
        count = int(np.floor(np.float32(0.4) * old.sum()))
        stays = ref.largest(np.where(old, weights, -1), old.sum() - count)
        assert new[stays].all()
        assert new.sum() == old.sum()
        grown.append(new & ~stays)
        assert grown[-1].sum() == count
    assert (grown[0] & grown[1]).sum() < 0.5 * grown[0].sum(), "each update draws anew"
    spec = bsj.get_spec(states[0])
    assert not any(spec.dense_gradient(step) for step in range(100))
    assert [step for step in range(7) if spec.changes(step)] == [2, 4, 6]


def test_set_grows_uniformly():
    """Of 4096 pruned places, each is as likely as any other: their mean index is the middle."""
    shape = (1, 1, 64, 72)
    params = {"conv": jnp.asarray(kernel(0, shape))}

    @jax.jit
    def masks(key):
        method = bsj.set_(0.9, schedule=bsj.every(1), key=key)
        state = method.init(params)
        _, before = method.update(params, state, params)
        _, after = method.update(params, before, params)
        return before.masks["conv"], after.masks["conv"]

    centres = []
    for seed in range(40):
        before, after = (np.asarray(mask) for mask in masks(jax.random.key(seed)))
        centres.append(np.flatnonzero(after & ~before).mean() / np.prod(shape))
    # 138 draws each: standard deviation 0.289 / sqrt(40 * 120) = 0.0042
    assert abs(np.mean(centres) - 0.5) < 4 * 0.0042


def test_snfs_grows_by_the_moving_average_of_the_dense_gradient():
    method = bsj.snfs(0.8, schedule=EVERY, momentum=0.7, drop_fraction=0.5)
    params, states = run(method, 5)
    average = np.zeros(SHAPE, np.float32)
    for step, (before, after) in enumerate(itertools.pairwise(states)):
        average = ref.moving_average(average, kernel(step), np.float32(0.7))
        np.testing.assert_allclose(after.memory["conv"], average, rtol=1e-5, atol=1e-6)
        if EVERY(step):
            old = np.asarray(before.masks["conv"]).ravel()
            count = int(np.floor(np.float32(fraction_at(step, 0.5)) * old.sum()))
            weights, size = np.abs(params["conv"]).ravel(), np.abs(after.memory["conv"]).ravel()
            expected = ref.exchange(old, np.asarray(weights), np.asarray(size), count)
            np.testing.assert_array_equal(np.asarray(after.masks["conv"]).ravel(), expected)
    spec = bsj.get_spec(states[0])
    assert all(spec.dense_gradient(step) for step in range(20))
    assert not spec.dense_gradient(20), "no update from 20 on, so no average either"


def test_growing_by_a_function_of_the_leaf():
    """Channel 5 has the score, and all kernel slices that come are of that channel."""

    def towards_channel_5(leaf):
        return jnp.zeros(leaf.weights.shape).at[:, :, 5].set(1.0)

    method = bsj.drop_and_grow(
        0.9, pattern=P.kernel(), grow=towards_channel_5, schedule=bsj.every(1), fraction=0.2
    )
    _, states = run(method, 2)
    new = np.asarray(states[2].masks["conv"]).any((0, 1))
    old = np.asarray(states[1].masks["conv"]).any((0, 1))
    came = new & ~old
    assert came.any()
    assert not np.delete(came, 5, axis=0).any()


@pytest.mark.parametrize("allowed", [0, 3])
def test_minus_infinity_forbids_growth_and_counts_stay(allowed):
    """Of 461 weights 276 are dropped. Few others may grow: the rest of the dropped ones stay."""

    def forbid(leaf):
        free = jnp.cumsum(~leaf.mask.reshape(-1)).reshape(leaf.mask.shape) <= allowed
        return jnp.where(free & ~leaf.mask, 1.0, -jnp.inf)

    method = bsj.drop_and_grow(0.9, grow=forbid, schedule=bsj.every(1), fraction=0.6)
    _, states = run(method, 2)
    old, new = (np.asarray(state.masks["conv"]) for state in states[1:])
    assert new.sum() == old.sum() == 461
    assert (new & ~old).sum() == allowed


def test_a_function_may_drop_by_minus_infinity():
    def drop_first_half(leaf):
        return jnp.where(jnp.arange(SHAPE[3]) < SHAPE[3] // 2, -jnp.inf, 1.0) + 0 * leaf.weights

    method = bsj.drop_and_grow(
        0.5, drop=drop_first_half, grow="random", schedule=bsj.every(1), fraction=0.1
    )
    _, states = run(method, 2)
    old, new = (np.asarray(state.masks["conv"]) for state in states[1:])
    assert new.sum() == old.sum()
    assert 0 < (old & ~new).sum() <= 0.1 * old.sum()
    half = SHAPE[3] // 2
    assert new[..., half:][old[..., half:]].all()


def test_between_ends_as_every_does():
    """The fraction falls to 0 by the end, and momentum needs no gradient after it."""
    method = bsj.snfs(0.8, schedule=bsj.between(0, 10, every=2), drop_fraction=0.5)
    _, states = run(method, 11)
    masks = [np.asarray(state.masks["conv"]) for state in states]
    moved = [int((masks[t + 1] & ~masks[t]).sum()) for t in range(0, 11, 2)]
    assert moved == sorted(moved, reverse=True)
    assert moved[0] > 10 * moved[-1]
    assert [bsj.get_spec(states[0]).dense_gradient(t) for t in (10, 11)] == [True, False]


def test_the_end_of_the_schedule_counts_though_the_first_gradient_draws_the_masks():
    method = bsj.drop_and_grow(
        0.8, grow="momentum", scores="gradient", schedule=bsj.every(3, until=9)
    )
    spec = bsj.get_spec(method.init({"conv": jnp.asarray(kernel(1))}))
    assert [spec.dense_gradient(t) for t in (0, 8, 9, 50)] == [True, True, False, False]


def test_two_layers_of_one_shape_grow_different_weights():
    params = {"a": jnp.asarray(kernel(1)), "b": jnp.asarray(kernel(1))}
    method = bsj.set_(0.9, schedule=bsj.every(1))
    state = method.init(params)
    for _ in range(2):
        _, state = method.update(params, state, params)
    assert not np.array_equal(state.masks["a"], state.masks["b"])


def test_the_global_budget_counts_once_and_stays():
    params = {"a": jnp.asarray(kernel(1)) * 3, "b": jnp.asarray(kernel(2))}
    method = bsj.drop_and_grow(
        0.8, budget="global", scores="magnitude", schedule=bsj.every(1), fraction=0.5
    )
    state = method.init(params)
    first = {name: int(mask.sum()) for name, mask in state.masks.items()}
    assert sum(first.values()) == round(0.2 * 2 * params["a"].size)
    assert first["a"] > 3 * first["b"]
    for _ in range(3):
        _, state = method.update(params, state, params)
    assert {name: int(mask.sum()) for name, mask in state.masks.items()} == first


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"schedule": 100}, "schedule: expected a schedule such as every"),
        ({"schedule": EVERY, "grow": "gradients"}, "grow: .*did you mean 'gradient'"),
        ({"schedule": EVERY, "drop": "small"}, "drop: expected one of 'magnitude'"),
        ({"schedule": EVERY, "fraction": 1.5}, "fraction: expected a number"),
        ({"schedule": EVERY, "momentum": 1.0}, "momentum: expected a number"),
        ({"schedule": EVERY, "scores": "weights"}, "scores: expected one of"),
    ],
)
def test_bad_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        bsj.drop_and_grow(0.5, **options)


def test_packing_refuses_to_lose_a_memory_of_pruned_weights():
    params = {"conv": jnp.asarray(kernel(3))}
    method = bsj.drop_and_grow(
        0.75, pattern=P.one_by_n(8), grow="momentum", schedule=bsj.every(1, until=3)
    )
    tx = bsj.sparse(method, optax.sgd(0.1))
    state = tx.init(params)
    params = bsj.apply_masks(params, bsj.get_masks(state))
    for step in range(3):
        updates, state = tx.update({"conv": jnp.asarray(kernel(step))}, state, params)
        params = optax.apply_updates(params, updates)
    layouts = bsj.get_layouts(state)
    with pytest.raises(ValueError, match="state: drop-and-grow remembers pruned weights"):
        bsj.pack_tree(params, state, layouts)
    values, packed = bsj.pack_tree(params, state, layouts, drop_pruned=True)
    assert packed[0].memory["conv"].shape == values["conv"].shape
    back, back_state = bsj.unpack_tree(values, packed, layouts)
    np.testing.assert_array_equal(back["conv"], params["conv"])
    mask = np.asarray(bsj.get_masks(state)["conv"])
    expected = np.where(mask, state[0].memory["conv"], 0)
    np.testing.assert_array_equal(back_state[0].memory["conv"], expected)


def test_both_ways_to_rank_agree():
    """By sorting and by comparing all pairs: the same order with ties."""
    rows = jnp.asarray(np.random.default_rng(0).integers(0, 4, (50, 16)).astype(np.float32))
    np.testing.assert_array_equal(ranks(rows), ranks_of_stored(rows))
    assert ranks(jnp.array([[1.0, jnp.nan, 2.0]])).tolist() == [[1, 2, 0]]


def test_counts_are_exact_though_scores_are_computed():
    """Scores that XLA may compute twice with other roundings still give exact counts."""

    @jax.jit
    def kept(weights):
        scores = weights / weights.sum(-1, keepdims=True) - jnp.sqrt(jnp.square(weights).mean())
        return highest_in_rows(scores, 6)

    for seed in range(20):
        weights = jnp.abs(jnp.asarray(kernel(seed, (40, 10))))
        assert (kept(jnp.round(weights, 1)).sum(1) == 6).all()
