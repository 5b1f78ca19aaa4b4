"""SET by sign, Deep-R, DSR, GraNet, SRigL, MEST, NeST and Narang's ramp against plain NumPy, over
random and adversarial values, and what is drawn at random against its distribution.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import references as ref
from flax import serialization
from sparse_methods import METHODS, noise, slow_unless, small_tree

import blocksparse_jax as bsj
from blocksparse_jax import patterns as P
from blocksparse_jax.transforms.dsr import share

SHAPES = {
    "whole": (3, 3, 4, 8),
    "half": (3, 3, 4, 8),
    "few": (3, 3, 4, 8),
    "one_in": (1, 1, 1, 8),
    "one_out": (1, 1, 8, 1),
}
BUDGET = {"whole": 0.0, "half": 0.7, "few": 0.99, "one_in": 0.7, "one_out": 0.7}
VALUES = ["random", "ties", "equal", "zeros"]


def every_leaf(name, leaf):
    return True


def tree(seed, kind):
    """Weights or gradients of all layers."""
    rng = np.random.default_rng(seed)
    values = {
        "random": lambda shape: rng.normal(size=shape),
        "ties": lambda shape: rng.integers(-1, 2, shape),
        "equal": lambda shape: np.full(shape, 0.5),
        "zeros": np.zeros,
    }
    return {name: values[kind](shape).astype(np.float32) for name, shape in SHAPES.items()}


METHOD = {
    "signed": lambda: bsj.set_(
        0.5, schedule=bsj.every(1), drop="signed", budget=BUDGET, where=every_leaf
    ),
    "deep-r": lambda: bsj.deep_r(
        0.5, rate=0.5, l1=1.0, temperature=0.0, budget=BUDGET, where=every_leaf
    ),
    "dsr": lambda: bsj.dsr(
        0.5, schedule=bsj.every(1), threshold=0.6, budget=BUDGET, where=every_leaf
    ),
    "granet": lambda: bsj.granet(0.9, schedule=bsj.between(0, 4), where=every_leaf),
    "srigl": lambda: bsj.srigl(
        0.5, schedule=bsj.every(1), drop_fraction=0.5, budget=BUDGET, where=every_leaf
    ),
    "mest": lambda: bsj.mest(
        0.5, schedule=bsj.between(1, 8), fraction=0.4, budget=BUDGET, where=every_leaf
    ),
    "mest-soft": lambda: bsj.mest(
        0.5, schedule=bsj.between(1, 4), fraction=0.4, soft=True, budget=BUDGET, where=every_leaf
    ),
    "nest": lambda: bsj.nest(0.5, schedule=bsj.between(0, 4), budget=BUDGET, where=every_leaf),
    "narang": lambda: bsj.narang(0.5, schedule=bsj.between(0, 4), budget=BUDGET, where=every_leaf),
}


@functools.cache
def compiled(name):
    """A method behind an optimizer that moves nothing, and its jitted update."""
    tx = bsj.sparse(METHOD[name](), optax.set_to_zero())
    return tx, jax.jit(tx.update)


def steps(name, number, kind):
    """(step, weights, gradients, state before, state after, updates) of a run; weights are new at
    each step, so that what is kept has values of its own, and zero where pruned.
    """
    tx, update = compiled(name)
    state = tx.init(tree(0, "random"))
    for step in range(number):
        weights = bsj.apply_masks(tree(step, kind), bsj.get_masks(state))
        grads = tree(100 + step, kind)
        updates, after = update(grads, state, weights)
        yield step, to_numpy(weights), grads, state[0], after[0], to_numpy(updates)
        state = after


def to_numpy(values):
    return {name: np.asarray(value) for name, value in values.items()}


@pytest.mark.parametrize("kind", VALUES)
def test_set_by_sign_drops_a_part_of_each_sign_and_all_zeros(kind):
    dropped = 0
    for step, weights, _, before, after, _ in steps("signed", 4, kind):
        for name, weight in weights.items():
            old, new = np.asarray(before.masks[name]), np.asarray(after.masks[name])
            assert old.sum() == new.sum()
            if step:
                stays = ref.signed_stays(weight, old, 0.3)
                assert new[stays].all(), (name, step)
                dropped += int((old & ~stays).sum())
    assert dropped > 0


@pytest.mark.parametrize("kind", VALUES)
def test_deep_r_prunes_where_the_sign_flips_and_keeps_every_count(kind):
    flipped = 0
    for _, weights, _, before, after, updates in steps("deep-r", 4, kind):
        for name, weight in weights.items():
            old, new = np.asarray(before.masks[name]), np.asarray(after.masks[name])
            sign = np.where(tree(0, "random")[name] < 0, -1, 1)
            np.testing.assert_array_equal(before.memory[name], sign)
            moved, stays = ref.deep_r_walk(weight, old, sign, 0.5)
            np.testing.assert_allclose(weight + updates[name], moved, atol=1e-6)
            assert new[stays].all()
            assert new.sum() == old.sum()
            flipped += int((old & ~stays).sum())
    assert flipped > 0


@pytest.mark.parametrize("kind", VALUES)
def test_dsr_conserves_the_total_and_moves_it_between_layers(kind):
    threshold, moved = 0.6, 0
    for step, weights, _, before, after, _ in steps("dsr", 5, kind):
        old, new = to_numpy(before.masks), to_numpy(after.masks)
        total = sum(mask.sum() for mask in old.values())
        assert sum(mask.sum() for mask in new.values()) == total
        if step == 0:
            continue
        survivors = ref.dsr_survivors(weights, old, threshold)
        gone = total - sum(mask.sum() for mask in survivors.values())
        free = sum((~mask).sum() for mask in old.values())
        for name, mask in old.items():
            assert new[name][survivors[name]].all()
            if gone <= free:
                assert not new[name][mask & ~survivors[name]].any(), "never where just pruned"
        threshold = ref.dsr_threshold(threshold, gone, 0.1 * total)
        np.testing.assert_allclose(after.memory["few"], threshold, rtol=1e-6)
        moved += sum(abs(int(new[n].sum()) - int(old[n].sum())) for n in old)
    assert moved > 0


def test_dsr_grows_in_proportion_to_the_survivors():
    """Two layers with room, of which one loses most of its weights."""
    params = {"a": jnp.full((1, 1, 40, 40), 1.0), "b": jnp.full((1, 1, 40, 40), 1.0)}
    method = bsj.dsr(0.9, schedule=bsj.every(1), threshold=0.5)
    tx = bsj.sparse(method, optax.set_to_zero())
    state = tx.init(params)
    zeros = jax.tree.map(jnp.zeros_like, params)
    _, state = tx.update(zeros, state, params)
    weak = jnp.arange(1600).reshape(1, 1, 40, 40) % 4 != 0
    params = {"a": params["a"], "b": jnp.where(weak, 0.1, 1.0)}
    old = state[0].masks
    _, state = tx.update(zeros, state, bsj.apply_masks(params, old))
    survivors = {"a": 160, "b": int((old["b"] & ~weak).sum())}
    gone = 160 - survivors["b"]
    share_of_a = gone * 160 / (160 + survivors["b"])
    assert abs(int(state[0].masks["a"].sum()) - 160 - share_of_a) <= 1
    assert int(state[0].masks["a"].sum() + state[0].masks["b"].sum()) == 320


@pytest.mark.parametrize(
    "pattern", [P.channel("input"), pytest.param(P.kernel("mean"), marks=pytest.mark.slow)]
)
def test_dsr_moves_kernels_and_input_channels(pattern):
    method = bsj.dsr(0.7, schedule=bsj.every(1), threshold=1.0, pattern=pattern)
    tx, params = bsj.sparse(method, optax.sgd(0.1)), small_tree()
    state, update = tx.init(params), jax.jit(tx.update)
    first = bsj.get_masks(state)
    for step in range(3):
        updates, state = update(noise(params, step), state, params)
        params = optax.apply_updates(params, updates)
    counts = []
    for masks in (first, bsj.get_masks(state)):
        sets = [
            int(pattern.kept_sets(masks[n]["kernel"], bsj.Dense()).sum())
            for n in ("conv1", "conv2")
        ]
        counts.append(sets)
    assert sum(counts[0]) == sum(counts[1])
    assert counts[0] != counts[1]
    if pattern.has_layout:
        layout = bsj.get_layouts(state)["conv1"]["kernel"]
        np.testing.assert_array_equal(
            bsj.layout_to_mask(layout), bsj.get_masks(state)["conv1"]["kernel"]
        )


def test_dsr_refuses_a_pattern_with_rows():
    method = bsj.dsr(0.5, schedule=bsj.every(1), pattern=P.one_by_n(8))
    with pytest.raises(ValueError, match="pattern: dsr moves single sets between layers"):
        method.init(small_tree())


def test_shares_add_up_within_their_places():
    rng = np.random.default_rng(0)
    shared = jax.jit(share, static_argnums=3)
    for _ in range(60):
        weights, places = rng.integers(0, 9, 5), rng.integers(0, 12, 5)
        total = rng.integers(0, places.sum() + 1)
        result = np.asarray(shared(jnp.int32(total), jnp.array(weights), jnp.array(places), 5))
        assert result.sum() == total
        assert (result >= 0).all()
        assert (result <= places).all()
    free = shared(jnp.int32(100), jnp.array([1, 2, 3, 4, 0]), jnp.full(5, 1000), 5)
    assert free.tolist() == [10, 20, 30, 40, 0]


@pytest.mark.parametrize("kind", VALUES)
def test_granet_prunes_by_one_threshold_and_exchanges(kind):
    for step, weights, grads, before, after, _ in steps("granet", 5, kind):
        sparsity = 0.9 - 0.9 * (1 - np.float32(step / 4)) ** 3
        part = 0.005 + ref.cosine_fraction(step, 0, 4, 0.495)
        expected = ref.granet_masks(weights, grads, to_numpy(before.masks), sparsity, part)
        for name, mask in expected.items():
            np.testing.assert_array_equal(after.masks[name], mask, err_msg=f"{name} {step}")
    assert sum(int(mask.sum()) for mask in after.masks.values()) == round(0.1 * 880)


@pytest.mark.filterwarnings("ignore:sparsity")
def test_granet_starts_sparse_and_runs_over_blocks():
    """From random blocks at half the density; the layouts are read from the masks."""
    method = bsj.granet(
        0.75, pattern=P.one_by_n(8), initial_sparsity=0.5, schedule=bsj.between(1, 3)
    )
    tx, params = bsj.sparse(method, optax.sgd(0.1)), small_tree()
    state, update = tx.init(params), jax.jit(tx.update)
    densities = []
    for step in range(4):
        densities.append(float(bsj.metrics.density(bsj.get_masks(state))))
        updates, state = update(noise(params, step), state, params)
        params = optax.apply_updates(params, updates)
    layout = bsj.get_layouts(state)["conv1"]["kernel"]
    np.testing.assert_array_equal(
        bsj.layout_to_mask(layout), bsj.get_masks(state)["conv1"]["kernel"]
    )
    conv = [bsj.get_masks(state)[n]["kernel"] for n in ("conv1", "conv2")]
    kept = sum(int(mask.sum()) for mask in conv) / sum(mask.size for mask in conv)
    assert kept == pytest.approx(0.25, abs=0.02)
    assert densities == sorted(densities, reverse=True)


@pytest.mark.filterwarnings("ignore:sparsity")
@pytest.mark.parametrize("kind", VALUES)
def test_srigl_keeps_a_constant_fan_in_as_the_reference_does(kind):
    fan_in = {}
    for step, weights, grads, before, after, _ in steps("srigl", 4, kind):
        for name in SHAPES:
            old = np.asarray(before.masks[name])
            new = np.asarray(after.masks[name])
            if step == 0:
                (fan_in[name],) = set(old.sum((0, 1, 2)))
                assert fan_in[name] == pytest.approx((1 - BUDGET[name]) * old[..., 0].size, abs=1.7)
                continue
            expected = ref.srigl_mask(weights[name], grads[name], old, fan_in[name], 0.5, 0.3)
            np.testing.assert_array_equal(new, expected, err_msg=f"{name} {step}")
            assert len(set(new.sum((0, 1, 2))) - {0}) == 1


def test_srigl_ablates_filters_for_good_and_hands_their_weights_on():
    """Four of 16 filters have tiny weights and gradients; later the four at the other end."""
    weak = jnp.arange(16) < 4
    params = {"w": jnp.where(weak, 1e-3, 1.0) * jax.random.normal(jax.random.key(0), (3, 3, 8, 16))}
    method = bsj.srigl(0.75, schedule=bsj.every(1), drop_fraction=0.5, budget="uniform")
    state, update = method.init(params), jax.jit(method.update)
    for step in range(4):
        if step == 3:
            params = {"w": params["w"][..., ::-1]}
        _, state = update(params, state, params)
        fans = state.masks["w"].sum((0, 1, 2)).tolist()
        late = [36] * 8 + [0] * 4 if step == 3 else [24] * 12
        assert fans == ([18] * 16 if step == 0 else [0] * 4 + late)


@pytest.mark.parametrize("kind", VALUES)
def test_mest_drops_by_weight_and_gradient_and_keeps_counts(kind):
    for step, weights, grads, before, after, _ in steps("mest", 9, kind):
        part = 0.0 if step == 8 else (0.2 if step >= 1 + 0.75 * 7 else 0.4)
        for name in SHAPES:
            old, new = np.asarray(before.masks[name]), np.asarray(after.masks[name])
            number = int(old.sum())
            assert new.sum() == number
            moved = math.floor(np.float32(part) * np.float32(number)) if step else 0
            scores = np.where(old, ref.mest_scores(weights[name], grads[name], 0.1), -1.0)
            assert new[ref.largest(scores, number - moved)].all(), (name, step)
    spec = bsj.get_spec(compiled("mest")[0].init(tree(0, "random")))
    assert not any(spec.dense_gradient(step) for step in range(9))


@pytest.mark.parametrize("kind", VALUES)
def test_soft_mest_trains_more_weights_between_two_steps(kind):
    final = {name: max(1, round((1 - BUDGET[name]) * math.prod(s))) for name, s in SHAPES.items()}
    for step, weights, grads, before, after, _ in steps("mest-soft", 5, kind):
        part = [0.0, 0.4, 0.4, 0.4, 0.0][step]
        for name, shape in SHAPES.items():
            old, new = np.asarray(before.masks[name]), np.asarray(after.masks[name])
            more = math.floor(np.float32(part) * np.float32(final[name]))
            assert new.sum() == min(math.prod(shape), final[name] + more), (name, step)
            scores = np.where(old, ref.mest_scores(weights[name], grads[name], 0.1), -1.0)
            assert new[ref.largest(scores, final[name])].all(), (name, step)


@pytest.mark.parametrize("kind", VALUES)
def test_nest_grows_by_summed_gradients_and_prunes_by_magnitude(kind):
    total = {name: np.zeros(shape, np.float32) for name, shape in SHAPES.items()}
    for step, weights, grads, before, after, _ in steps("nest", 5, kind):
        for name, shape in SHAPES.items():
            size, density = math.prod(shape), 1 - BUDGET[name]
            seed, peak, final = (
                max(1, round(min(1.0, factor * density) * size)) for factor in (0.5, 2.0, 1.0)
            )
            old, new = np.asarray(before.masks[name]), np.asarray(after.masks[name])
            if step <= 2:
                total[name] = grads[name]  # the last step changed masks, so the sum began anew
                assert old.sum() == (
                    seed if step == 0 else seed + round((peak - seed) * (step - 1) / 2)
                )
                grown = seed + round((peak - seed) * step / 2) - int(old.sum())
                expected = old | ref.largest(np.where(old, -np.inf, np.abs(total[name])), grown)
            else:
                count = final + round((peak - final) * (1 - (step - 2) / 2) ** 3)
                expected = ref.largest(np.where(old, np.abs(weights[name]), -1.0), count)
            np.testing.assert_array_equal(new, expected, err_msg=f"{name} {step}")


def test_nest_sums_gradients_between_two_steps():
    method = bsj.nest(0.75, schedule=bsj.between(0, 12, every=3), grow_until=6)
    params = {"w": jnp.ones((1, 1, 8, 8))}
    state, update = method.init(params), jax.jit(method.update)
    sums = []
    for step in range(9):
        _, state = update({"w": jnp.full((1, 1, 8, 8), 10.0**step)}, state, params)
        sums.append(float(state.memory["w"][0, 0, 0, 0]))
    assert sums == [1, 10, 110, 1110, 1e4, 1.1e5, 1.11e6, 0, 0]


@pytest.mark.parametrize("kind", VALUES)
def test_narang_prunes_below_a_threshold_on_two_slopes(kind):
    for step, weights, _, before, after, _ in steps("narang", 5, kind):
        part = np.float32(ref.narang_part(step, 0, 2, 4, 1.5))
        for name, weight in weights.items():
            old, new = np.asarray(before.masks[name]), np.asarray(after.masks[name])
            size = np.abs(weight)
            count = max(1, round((1 - BUDGET[name]) * size.size))
            q = np.sort(size.reshape(-1))[::-1][count - 1]
            expected = old & ((size >= part * q) | ref.largest(size, 1))
            np.testing.assert_array_equal(new, expected, err_msg=f"{name} {step}")
            if kind == "random" and step == 4:
                assert new.sum() == count


def test_narang_takes_thresholds_of_another_network():
    method = bsj.narang(0.5, schedule=bsj.between(0, 10, every=5), thresholds={"w": 48.0})
    params = {"w": jnp.arange(64.0).reshape(1, 1, 8, 8)}
    state, counts = method.init(params), []
    for _ in range(11):
        _, state = method.update(params, state, params)
        counts.append(int(state.masks["w"].sum()))
    # theta = 48 * 5 / (5 + 1.5 * 5): 3.84 for each step, 5.76 from step 5 on
    assert (counts[0], counts[5], counts[10]) == (64 - 4, 64 - 29, 16)
    with pytest.raises(ValueError, match="thresholds: 'v' is no sparse layer"):
        bsj.narang(0.5, schedule=bsj.between(0, 9), thresholds={"v": 1.0}).init(params)


def test_deep_r_walks_as_far_as_the_temperature_says_and_cools_down():
    """Weights far from zero, so that none flips: their steps are normal with `sqrt(2 rate T)`."""
    method = bsj.deep_r(
        0.5, schedule=bsj.between(0, 9), rate=0.5, l1=0.0, temperature=1.0, final_temperature=1e-4
    )
    tx = bsj.sparse(method, optax.set_to_zero())
    params = {"w": jnp.full((1, 1, 100, 100), 50.0)}
    state, update = tx.init(params), jax.jit(tx.update)
    for step in range(10):
        updates, state = update(params, state, bsj.apply_masks(params, bsj.get_masks(state)))
        moved = np.asarray(updates["w"])[np.asarray(bsj.get_masks(state)["w"])]
        assert len(moved) == 5000
        size = math.sqrt(1e-4 ** (step / 10))
        assert abs(moved.std() / size - 1) < 4 / math.sqrt(2 * 5000)
        assert abs(moved.mean() / size) < 4 / math.sqrt(5000)


@pytest.mark.parametrize("name", ["deep-r", "signed", "mest"])
def test_random_growth_is_uniform(name):
    """Each place that may grow is grown as often as any other: a chi-squared test over 300 keys."""
    methods = {
        "deep-r": lambda key: bsj.deep_r(0.75, rate=1.0, l1=9.0, temperature=0.0, key=key),
        "signed": lambda key: bsj.set_(
            0.75, schedule=bsj.every(1), drop_fraction=0.5, drop="signed", key=key
        ),
        "mest": lambda key: bsj.mest(0.75, schedule=bsj.between(1, 9), fraction=0.5, key=key),
    }
    params = {"w": jnp.ones((1, 1, 8, 16))}

    @jax.jit
    def masks(key):
        tx = bsj.sparse(methods[name](key), optax.set_to_zero())
        state = tx.init(params)
        zeros = jax.tree.map(jnp.zeros_like, params)
        weights = bsj.apply_masks(params, bsj.get_masks(state))
        # Half of the kept weights of SET and MEST, and all of Deep-R's, go.
        steps = 1 if name == "deep-r" else 2
        before = state
        for _ in range(steps):
            before = state
            _, state = tx.update(zeros, state, weights)
        return bsj.get_masks(before)["w"], bsj.get_masks(state)["w"]

    before, after = jax.lax.map(masks, jax.random.split(jax.random.key(0), 300))
    assert (after.sum((1, 2, 3, 4)) == 32).all()
    grown = np.asarray(after & ~before).reshape(300, -1).sum(0)
    expected = grown.sum() / grown.size
    assert expected > 20
    # 128 places: mean 127 of chi-squared, standard deviation 16; without replacement it is less.
    assert ((grown - expected) ** 2 / expected).sum() < 127 + 4 * 16


@pytest.mark.parametrize(
    "name",
    [
        slow_unless(name in ("deep-r", "dsr", "nest"), name)  # those with a memory
        for name in ("deep-r", "dsr", "srigl", "mest", "granet", "nest", "narang")
    ],
)
def test_a_restored_run_draws_the_same_masks(name):
    """Written in the middle of the schedule and restored into another state, in another trace."""
    params = small_tree()
    tx = bsj.sparse(METHODS[name](params), optax.sgd(0.1, momentum=0.9))
    state, update = tx.init(params), jax.jit(tx.update)
    for step in range(4):
        updates, state = update(noise(params, step), state, params)
        params = optax.apply_updates(params, updates)
    written = serialization.to_bytes((params, state))
    again = bsj.sparse(METHODS[name](params), optax.sgd(0.1, momentum=0.9))
    other = jax.tree.map(jnp.zeros_like, params)
    weights, restored = serialization.from_bytes((other, again.init(small_tree())), written)
    update_again = jax.jit(again.update)
    changed = 0.0
    for step in range(4, 9):
        before = bsj.get_masks(state)
        updates, state = update(noise(params, step), state, params)
        params = optax.apply_updates(params, updates)
        updates, restored = update_again(noise(weights, step), restored, weights)
        weights = optax.apply_updates(weights, updates)
        one, two = bsj.get_masks(state), bsj.get_masks(restored)
        jax.tree.map(np.testing.assert_array_equal, one, two)
        changed += float(bsj.sad(before, one).total)
    assert changed > 0


MOVES = {
    "rigl": lambda pattern: bsj.rigl(0.5, pattern=pattern, schedule=bsj.every(1)),
    "set": lambda pattern: bsj.set_(0.5, pattern=pattern, schedule=bsj.every(1)),
    "snfs": lambda pattern: bsj.snfs(0.5, pattern=pattern, schedule=bsj.every(1)),
    "mest": lambda pattern: bsj.mest(
        0.5, pattern=pattern, schedule=bsj.between(1, 9), fraction=0.4
    ),
}


@pytest.mark.parametrize(
    ("name", "pattern"),
    [
        slow_unless(quick, name, pattern, id=f"{name}-{pattern.noun}")
        for name in MOVES
        for pattern, quick in (
            (P.one_by_n(8), name == "set"),
            (P.block(group_size=8, block_density=1.0), name == "mest"),
        )
    ],
)
def test_blocks_move_with_their_layouts(name, pattern):
    params = {"w": jax.random.normal(jax.random.key(0), (3, 3, 16, 16))}
    method = MOVES[name](pattern)
    state, update = method.init(params), jax.jit(method.update)
    first = state
    for step in range(3):
        _, state = update(noise(params, step), state, params)
    assert state.layouts["w"].packed_shape == first.layouts["w"].packed_shape
    np.testing.assert_array_equal(bsj.layout_to_mask(state.layouts["w"]), state.masks["w"])
    assert (state.masks["w"] != first.masks["w"]).any()


SCHEDULE = bsj.between(0, 9)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: bsj.set_(0.5, schedule=SCHEDULE, drop="sign"), "drop: .*mean 'signed'"),
        (
            lambda: bsj.set_(0.5, schedule=SCHEDULE, drop="signed", pattern=P.kernel()),
            "drop: 'signed' tells positive weights",
        ),
        (lambda: bsj.deep_r(0.5, temperature=-1.0), "temperature: expected a number of at least"),
        (lambda: bsj.deep_r(0.5, final_temperature=1.0), "final_temperature: expected at most"),
        (lambda: bsj.deep_r(0.5, l1=-1.0), "l1: expected a number"),
        (lambda: bsj.deep_r(0.5, rate="fast"), "rate: expected a number"),
        (lambda: bsj.dsr(0.5, schedule=10), "schedule: expected a schedule"),
        (lambda: bsj.dsr(0.5, schedule=SCHEDULE, threshold=0.0), "threshold: expected a number"),
        (lambda: bsj.dsr(0.5, schedule=SCHEDULE, fraction=1.0), "fraction: expected a number"),
        (lambda: bsj.granet(0.5, schedule=bsj.every(3)), "schedule: expected between"),
        (
            lambda: bsj.granet(0.5, schedule=SCHEDULE, initial_sparsity=0.6),
            "initial_sparsity: expected at most sparsity=0.5, got 0.6",
        ),
        (
            lambda: bsj.granet(0.5, schedule=SCHEDULE, final_fraction=0.6),
            "final_fraction: expected at most fraction=0.5, got 0.6",
        ),
        (
            lambda: bsj.granet(0.5, schedule=SCHEDULE, pattern=P.block()),
            "pattern: granet changes how many",
        ),
        (lambda: bsj.srigl(0.5, schedule=SCHEDULE, budget="global"), "budget: 'global' has no"),
        (lambda: bsj.srigl(0.5, schedule=SCHEDULE, min_salient=2), "min_salient: expected"),
        (lambda: bsj.mest(0.5, schedule=bsj.every(3)), "schedule: expected between"),
        (
            lambda: bsj.mest(0.5, schedule=SCHEDULE, soft=True, pattern=P.block()),
            "pattern: mest with soft=True changes how many",
        ),
        (lambda: bsj.mest(0.5, schedule=SCHEDULE, soft=True, budget="global"), "budget: mest with"),
        (
            lambda: bsj.mest(None, schedule=SCHEDULE, soft=True, pattern=P.n_of_m(2, 4)),
            "pattern: .* fixes its own density 0.5",
        ),
        (lambda: bsj.nest(0.5, schedule=SCHEDULE, grow_until=9), "grow_until: expected a step"),
        (lambda: bsj.nest(0.5, schedule=SCHEDULE, peak=0.5), "peak: expected a number"),
        (lambda: bsj.nest(0.5, schedule=SCHEDULE, seed=3.0), "seed: expected at most peak=2.0"),
        (lambda: bsj.nest(0.5, schedule=SCHEDULE, budget="global"), "budget: nest grows"),
        (lambda: bsj.narang(0.5, schedule=SCHEDULE, ramp=10), "ramp: expected a step from 0 to 9"),
        (lambda: bsj.narang(0.5, schedule=SCHEDULE, budget="global"), "budget: narang has"),
        (
            lambda: bsj.narang(0.5, schedule=SCHEDULE, thresholds={"w": 0.0}),
            r"thresholds\['w'\]: expected a number above 0",
        ),
    ],
)
def test_bad_arguments(make, message):
    with pytest.raises(ValueError, match=message):
        make()
