"""Gradual pruning over every pattern: exact counts, monotone masks, layouts at the end."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import references as ref

import blocksparse_jax as bsj
from blocksparse_jax import patterns as P
from blocksparse_jax.patterns.block import Block

SHAPE = (3, 3, 32, 48)
SCHEDULE = bsj.between(2, 12, every=3)
PATTERNS = [
    P.unstructured(),
    P.kernel(),
    P.window(),
    P.one_by_n(16),
    P.channel("input"),
    P.channel("output"),
    P.block(group_size=16),
    pytest.param(
        P.block(group_size=24, block_density=2 / 3, channel_block=4), marks=pytest.mark.slow
    ),
]


def kernel(seed):
    return jnp.asarray(np.random.default_rng(seed).normal(size=SHAPE).astype(np.float32))


def trained(method, steps=15):
    """Trains on noise; the masks before each step and after the last."""
    params = {"a": kernel(0), "b": kernel(1)}
    tx = bsj.sparse(method, optax.sgd(0.1, momentum=0.9))
    state, update = tx.init(params), jax.jit(tx.update)
    states = [state]
    for step in range(steps):
        grads = {name: kernel(10 * step + i) for i, name in enumerate(params)}
        updates, state = update(grads, state, params)
        params = optax.apply_updates(params, updates)
        states.append(state)
    return params, states


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.filterwarnings("ignore:sparsity")
def test_every_pattern_prunes_gradually(pattern):
    sparsity = 0.75
    params, states = trained(bsj.gradual(sparsity, pattern=pattern, schedule=SCHEDULE))
    densities = []
    for step, (before, after) in enumerate(itertools.pairwise(states)):
        old, new = (np.asarray(bsj.get_masks(s)["a"]) for s in (before, after))
        assert not (new & ~old).any(), "pruned weights stay pruned"
        assert (new != old).any() <= SCHEDULE(step)
        densities.append(new.mean())
        if pattern.has_layout:
            layout = bsj.get_layouts(after)["a"]
            bsj.validate(layout)
            np.testing.assert_array_equal(bsj.layout_to_mask(layout), new)
    assert sorted(densities, reverse=True) == densities
    assert len(set(densities)) > 2, "it takes several steps"
    last = jax.tree.map(jnp.abs, params)
    one_shot = bsj.masks_from_scores(last, sparsity, pattern=pattern)
    for name in params:
        mask = bsj.get_masks(states[-1])[name]
        assert int(mask.sum()) == int(one_shot[name].sum()), "as many as one-shot pruning"
        assert not np.asarray(params[name])[~np.asarray(mask)].any()
    if isinstance(pattern, Block):
        before, first, last = (states[i][0].layouts["a"].filters for i in (2, 3, -1))
        np.testing.assert_array_equal(before, np.arange(48).reshape(-1, pattern.group_size))
        assert not np.array_equal(first, before), "groups are found when pruning starts"
        np.testing.assert_array_equal(first, last)


SETS = [  # of whole or single weights, all patterns but HRBP's blocks, which lose taps first
    P.unstructured(),
    P.kernel(),
    P.vector(),
    P.window(),
    P.fan_in(),
    P.channel_tap(),
    P.one_by_n(4),
    P.channel("input"),
    P.channel("output"),
]


@pytest.mark.parametrize("sparsity", [0.75, pytest.param(0.99, marks=pytest.mark.slow)])
@pytest.mark.parametrize("pattern", SETS, ids=str)
@pytest.mark.filterwarnings("ignore:sparsity")
def test_the_largest_sets_of_every_row_stay(pattern, sparsity):
    """Against NumPy, over weights with ties, all equal, zeros and one channel; at 0 all stay."""
    shape, rng = (3, 3, 8, 12), np.random.default_rng(0)
    method = bsj.gradual(sparsity, pattern=pattern, schedule=bsj.between(0, 2))
    update = jax.jit(method.update)
    sets = pattern.units(shape).sets
    for kind in ("random", "ties", "equal", "zeros", "one channel"):
        state = method.init({"w": jnp.ones(shape)})
        for part in (0.0, 0.875, 1.0):  # of the sparsity, at the start, in the middle, at the end
            weights = {
                "random": rng.normal(size=shape),
                "ties": rng.integers(-2, 3, shape),
                "one channel": rng.normal(size=shape) * (np.arange(8) == 5)[:, None],
            }.get(kind, np.full(shape, 0.0 if kind == "zeros" else 0.5))
            weights = jnp.asarray(weights, jnp.float32)
            old = np.asarray(pattern.kept_sets(state.masks["w"], bsj.Dense()))
            sizes = np.asarray(pattern.sets(jnp.abs(weights), bsj.Dense()))
            _, state = update({"w": weights}, state, {"w": weights})
            new = np.asarray(pattern.kept_sets(state.masks["w"], bsj.Dense()))
            count = max(1, round(float(np.float32(1 - part * sparsity)) * sets))
            for before, after, size in zip(old, new, sizes, strict=True):
                expected = ref.largest(np.where(before, size, -1.0), count)
                np.testing.assert_array_equal(after, expected, err_msg=f"{kind} {part}")
    nothing = bsj.gradual(0.0, pattern=pattern, schedule=bsj.between(0, 2))
    _, state = nothing.update({"w": weights}, nothing.init({"w": weights}), {"w": weights})
    assert state.masks["w"].all()


def test_blocks_are_those_of_one_shot_pruning_in_shape():
    pattern = P.block(group_size=16)
    _, states = trained(bsj.gradual(0.9, pattern=pattern, schedule=bsj.between(0, 6, every=2)))
    final = bsj.get_layouts(states[-1])["a"]
    scores = {"a": jnp.abs(kernel(0)), "b": jnp.abs(kernel(1))}
    expected = bsj.layouts_from_scores(scores, 0.9, pattern=pattern)["a"]
    assert final.packed_shape == expected.packed_shape
    np.testing.assert_array_equal(final.filters, expected.filters)  # grouped by the first weights


def test_one_threshold_at_each_step():
    """A layer of small weights loses more; the total follows the curve."""
    params = {"a": kernel(0), "b": 0.1 * kernel(1)}
    method = bsj.gradual(0.9, budget="global", schedule=bsj.between(0, 4, every=1))
    state = method.init(params)
    for step in range(5):
        _, state = method.update(params, state, params)
        kept = sum(int(mask.sum()) for mask in state.masks.values())
        density = 1 - 0.9 * (1 - (1 - step / 4) ** 3)
        assert kept == pytest.approx(density * 2 * kernel(0).size, abs=1)
    assert state.masks["b"].mean() < 0.01 < state.masks["a"].mean()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"schedule": bsj.every(5)}, "schedule: expected between"),
        ({"schedule": SCHEDULE, "pattern": P.n_of_m(2, 4)}, "pattern: .* fixes its own density"),
        ({"schedule": SCHEDULE, "pattern": P.block(), "budget": "global"}, "budget: 'global'"),
        ({"schedule": SCHEDULE, "initial_sparsity": 0.95}, "initial_sparsity: expected at most"),
    ],
)
def test_bad_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        bsj.gradual(0.9, **options)
