"""Group lasso and group-wise brain damage: penalty and masks equal plain NumPy, step by step."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import references as ref

import blocksparse_jax as bsj
from blocksparse_jax import patterns as P

PATTERNS = {
    "filter": P.channel("output"),
    "channel": P.channel("input"),
    "channel tap": P.channel_tap(),
}
AXES = {"filter": (0, 1, 2), "channel": (0, 1, 3), "channel tap": (3,)}
SHAPE = (3, 3, 8, 12)


def kernel_of(kind, seed=0, shape=SHAPE):
    drawn = np.random.default_rng(seed).normal(size=shape).astype(np.float32)
    if kind == "random":
        # sets of very different sizes
        return drawn * np.linspace(0.01, 1, shape[2], dtype=np.float32)[:, None]
    if kind == "one channel":
        return drawn * (np.arange(shape[2]) == 3).astype(np.float32)[:, None]
    return np.full(shape, 0.0 if kind == "zeros" else 0.5, np.float32)


def one_leaf(name, leaf):
    return True


@pytest.mark.parametrize("kernel", ["random", "one channel"])
@pytest.mark.parametrize("kind", PATTERNS)
def test_the_penalty_is_the_gradient_of_the_norms(kind, kernel):
    weights = kernel_of(kernel)
    method = bsj.group_lasso(
        0.5,
        pattern=PATTERNS[kind],
        schedule=bsj.between(5, 9),
        strength=0.3,
        also=(P.channel("output"),),
        where=one_leaf,
    )
    params, noise = {"w": jnp.asarray(weights)}, kernel_of("random", 1)
    updates, _ = method.update({"w": jnp.asarray(noise)}, method.init(params), params)
    expected = noise + sum(
        ref.group_lasso_gradient(weights, each, 0.3) for each in (kind, "filter")
    )
    np.testing.assert_allclose(updates["w"], expected, atol=2e-5)


@pytest.mark.filterwarnings("ignore:sparsity. density")  # that whole sets cannot reach
@pytest.mark.parametrize(
    ("kernel", "sparsity"),
    [("random", 0.0), ("random", 0.5), ("equal", 0.99), ("zeros", 0.5), ("one channel", 0.99)],
)
@pytest.mark.parametrize("kind", PATTERNS)
def test_masks_equal_numpy_through_the_schedule(kind, kernel, sparsity):
    """Sets below the threshold go while the schedule runs, exactly the rest at its end."""
    threshold, axes = 0.2, AXES[kind]
    weights = kernel_of(kernel)
    method = bsj.group_lasso(
        sparsity,
        pattern=PATTERNS[kind],
        schedule=bsj.between(1, 3),
        threshold=threshold,
        where=one_leaf,
    )
    update = jax.jit(method.update)
    params = {"w": jnp.asarray(weights)}
    state = method.init(params)
    size = np.prod([SHAPE[axis] for axis in axes])
    sets = weights.size // size
    kept = np.ones(sets, bool)
    for step in range(5):
        now = weights * np.float32(1 - 0.2 * step)
        _, state = update({"w": jnp.zeros(SHAPE)}, state, {"w": jnp.asarray(now)})
        if 1 <= step <= 3:
            norms = np.sqrt((now.astype(np.float64) ** 2).sum(axes)).reshape(-1)
            final = max(1, round((1 - sparsity) * sets))
            kept = ref.group_lasso_kept(norms, kept, size, threshold, final, step == 3)
        shape = [1 if axis in axes else SHAPE[axis] for axis in range(4)]
        expected = np.broadcast_to(kept.reshape(shape), SHAPE)
        np.testing.assert_array_equal(bsj.get_masks(state)["w"], expected)
        weights = weights * np.asarray(expected)


def test_brain_damage_penalises_what_is_to_go_and_no_more():
    weights = kernel_of("random")
    params = {"w": jnp.asarray(weights)}
    kept = ref.largest((weights**2).sum(-1), weights[..., 0].size // 4)[..., None]
    whole = ref.group_lasso_gradient(weights, "channel tap", 0.1)
    for gradual, expected in ((True, np.where(kept, 0, whole)), (False, whole)):
        method = bsj.brain_damage(
            0.75, schedule=bsj.between(5, 9), strength=0.1, gradual=gradual, where=one_leaf
        )
        updates, _ = method.update({"w": jnp.zeros(SHAPE)}, method.init(params), params)
        np.testing.assert_allclose(updates["w"], expected, atol=1e-5)


def test_brain_damage_that_is_not_gradual_prunes_once():
    params = {"w": jnp.asarray(kernel_of("random"))}
    for gradual in (True, False):
        method = bsj.brain_damage(
            0.5, schedule=bsj.between(0, 2), threshold=0.5, gradual=gradual, where=one_leaf
        )
        state, counts = method.init(params), []
        for _ in range(3):
            _, state = method.update(params, state, params)
            counts.append(int(bsj.get_masks(state)["w"].any(-1).sum()))
        assert counts[-1] == 36
        assert (counts[0] < 72) == gradual


def test_a_set_that_the_penalty_alone_acts_on_falls_to_zero():
    """By `strength * rate` a step in its norm, whatever its size."""
    weights = jnp.zeros((1, 1, 8, 4)).at[:, :, 2].set(1.0).at[:, :, 5].set(0.1)
    method = bsj.group_lasso(0.75, schedule=bsj.between(30, 31), strength=0.5, where=one_leaf)
    tx = bsj.sparse(method, optax.sgd(0.1))
    params = {"w": weights}
    state = tx.init(params)
    step = jax.jit(tx.update)
    for _ in range(4):
        updates, state = step({"w": jnp.zeros_like(weights)}, state, params)
        params = optax.apply_updates(params, updates)
    norms = jnp.sqrt(jnp.square(params["w"]).sum((0, 1, 3)))
    np.testing.assert_allclose(norms[jnp.array([2, 5])], [2 - 0.2, 0.2 - 0.2], atol=1e-3)


def test_input_channels_have_a_layout_at_every_count():
    params = {"w": jnp.asarray(kernel_of("random"))}
    method = bsj.group_lasso(0.75, schedule=bsj.between(0, 3), threshold=0.4, where=one_leaf)
    state, kept = method.init(params), []
    for _ in range(4):
        _, state = method.update(params, state, params)
        layout = bsj.get_layouts(state)["w"]
        np.testing.assert_array_equal(bsj.layout_to_mask(layout), bsj.get_masks(state)["w"])
        kept.append(layout.packed_shape[1])
    assert kept[-1] == 2
    assert kept[0] > 2


def test_a_whole_layer_is_penalised_and_goes_where_depth_allows_it():
    """Its norm is one more group; the threshold holds for its kept weights."""
    weights = {name: kernel_of("random", seed) for seed, name in enumerate(("branch", "other"))}
    params = jax.tree.map(jnp.asarray, weights)
    method = bsj.group_lasso(
        0.5,
        schedule=bsj.between(1, 3),
        strength=0.3,
        threshold=0.05,
        depth=lambda name, leaf: name == "branch",
        where=one_leaf,
    )
    zeros = jax.tree.map(jnp.zeros_like, params)
    state, update = method.init(params), jax.jit(method.update)
    updates, state = update(zeros, state, params)
    for name, kernel in weights.items():
        expected = ref.group_lasso_gradient(kernel, "channel", 0.3)
        if name == "branch":
            expected = expected + 0.3 * kernel / np.sqrt(np.square(kernel).sum() + 1e-8)
        np.testing.assert_allclose(updates[name], expected, atol=2e-5)
    for size, counts in ((1.0, (7, 7)), (0.02, (0, 4)), (1.0, (0, 4))):
        # the channels' sizes rise evenly: at 1 the first is below the threshold, at 0.02 all are
        params = {name: jnp.asarray(size * kernel) for name, kernel in weights.items()}
        _, state = update(zeros, state, bsj.apply_masks(params, bsj.get_masks(state)))
        masks = bsj.get_masks(state)
        assert tuple(int(m.any((0, 1, 3)).sum()) for m in masks.values()) == counts
    assert bsj.get_layouts(state)["branch"].packed_shape[1] == 0
    np.testing.assert_array_equal(bsj.layout_to_mask(bsj.get_layouts(state)["branch"]), False)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pattern": P.n_of_m(2, 4)}, "pattern: expected sets of weights that a sparsity leaves"),
        ({"pattern": P.block()}, "pattern: expected sets of weights that a sparsity leaves"),
        ({"also": (P.n_of_m(2, 4),)}, "also: expected sets of weights that a sparsity leaves"),
        ({"strength": -1.0}, "strength: expected a number of at least 0"),
        ({"threshold": float("nan")}, "threshold: expected a number of at least 0"),
        ({"sparsity": 1.0}, "sparsity: expected a number in"),
        ({"schedule": bsj.every(3)}, "schedule"),
    ],
)
def test_bad_arguments(options, message):
    options = {"sparsity": 0.5, "schedule": bsj.between(0, 1)} | options
    with pytest.raises(ValueError, match=message):
        bsj.group_lasso(options.pop("sparsity"), **options)


def test_depth_must_choose_a_sparse_leaf():
    method = bsj.group_lasso(0.5, schedule=bsj.between(0, 1), depth=lambda name, leaf: False)
    with pytest.raises(ValueError, match="depth: chooses none of the sparse leaves"):
        method.init({"w": jnp.ones(SHAPE)})
