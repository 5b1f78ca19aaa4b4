"""The frame of the methods: the spec, the hook on proposed weights, extra arguments, memory."""

import dataclasses
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import references as ref

import blocksparse_jax as bsj
from blocksparse_jax import patterns as P
from blocksparse_jax.schedules import Always, AnyOf, Between, Every, Never, Through
from blocksparse_jax.transforms import sparse_transformation

SHAPE = (3, 3, 16, 32)


def kernel(seed, shape=SHAPE):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape).astype(np.float32))


@pytest.fixture
def params():
    return {"conv": kernel(0), "bias": jnp.ones(32)}


def test_the_contract_runs_as_written():
    params = {"conv": kernel(0, (3, 3, 64, 64)), "bias": jnp.ones(64)}
    scores = jax.tree.map(jnp.abs, params)
    masks = bsj.masks_from_scores(scores, 0.9, pattern=P.unstructured(), budget="global")
    assert int(masks["conv"].sum()) == round(0.1 * masks["conv"].size)
    assert (
        float(bsj.masks_from_scores(scores, 0.9, pattern=P.kernel())["conv"].mean()) == 410 / 4096
    )
    for pattern, density in ((P.one_by_n(16), 6 / 64), (P.channel("output"), 6 / 64)):
        with pytest.warns(UserWarning, match="sparsity: density 0.1000 cannot be reached"):
            masks = bsj.masks_from_scores(scores, 0.9, pattern=pattern)
        assert float(masks["conv"].mean()) == density
    with pytest.warns(UserWarning, match="sparsity"):
        bsj.masks_from_scores(scores, 0.9, pattern=P.window())
    with pytest.warns(UserWarning, match="sparsity"):
        bsj.masks_from_scores(scores, 0.9, pattern=P.n_of_m(2, 4))
    pattern = P.block(group_size=32, block_density=1 / 3, channel_block=1)
    layouts = bsj.layouts_from_scores(scores, 0.9, pattern=pattern)
    assert layouts["conv"].packed_shape == (2, 19, 3, 32)
    for tx in (
        bsj.sparse(
            bsj.drop_and_grow(
                0.9,
                pattern=P.kernel(),
                drop="magnitude",
                grow="gradient",
                fraction=0.3,
                schedule=bsj.every(100, until=75_000),
                budget="erk",
            ),
            optax.sgd(0.1, momentum=0.9),
        ),
        bsj.sparse(
            bsj.gradual(
                0.9,
                pattern=P.block(group_size=32),
                schedule=bsj.between(0, 10_000, every=100),
            ),
            optax.adam(1e-3),
        ),
        bsj.sparse(bsj.set_(0.9, schedule=bsj.every(100)), optax.sgd(0.1)),
        bsj.sparse(bsj.snfs(0.9, schedule=bsj.every(100)), optax.sgd(0.1)),
    ):
        spec = bsj.get_spec(tx.init(params))
        assert spec.changes(100) is True
        assert spec.changes(150) is False
        assert isinstance(spec.dense_gradient(100), bool)
        assert not spec.straight_through
        assert isinstance(spec.resizes, bool)
        assert isinstance(spec.has_layout, bool)
    scores = bsj.snip(lambda p, x: jnp.sum(p["conv"] * x) + p["bias"].sum(), params, 1.0)
    assert jax.tree.structure(scores) == jax.tree.structure(params)


# What the methods publish

SPECS = {
    "hrbp": (bsj.hrbp_prune(0.9), Never(), Never(), {"has_layout": True}),
    "hrbp-dynamic": (
        bsj.hrbp_prune(0.9, schedule=bsj.every(4, until=9)),
        Every(4, 0, 9),
        Every(4, 0, 9),
        {"has_layout": True, "skips_gradient": True, "grows_by_gradient": True},
    ),
    "hrbp-gradient": (
        bsj.hrbp_prune(0.9, scores="gradient"),
        Through(0),
        Through(0),
        {"has_layout": True, "grows_by_gradient": True},
    ),
    "hrbp-gradient-dynamic": (
        bsj.hrbp_prune(0.9, scores="gradient", schedule=bsj.every(4)),
        AnyOf((Through(0), Every(4))),
        AnyOf((Through(0), Every(4))),
        {"has_layout": True, "skips_gradient": True, "grows_by_gradient": True},
    ),
    "subp": (
        bsj.subp(0.5, schedule=bsj.between(4, 10, every=4)),
        AnyOf((Through(-1), lambda step: step in (3, 7, 11))),
        Through(11),
        {"has_layout": True, "straight_through": True, "resizes": True},
    ),
    "subp-hard": (
        bsj.subp(0.5, schedule=bsj.between(4, 8, every=4), soft=False, version=1),
        lambda step: step >= 3 and step % 4 == 3,
        Never(),
        {"has_layout": True, "resizes": True},
    ),
    "sr-ste": (bsj.sr_ste(2, 4), Always(), Always(), {"straight_through": True}),
    "rigl": (
        bsj.rigl(0.9, until=9, update_every=4),
        Every(4, 0, 9),
        Every(4, 0, 9),
        {"skips_gradient": True, "grows_by_gradient": True},
    ),
    "gradual": (
        bsj.gradual(0.9, schedule=bsj.between(1, 6, every=2)),
        Between(1, 6, 2),
        Never(),
        {"resizes": True},
    ),
    "magnitude": (bsj.magnitude(0.9), Never(), Never(), {}),
    "magnitude-1xN": (
        bsj.magnitude(0.5, pattern=P.one_by_n(8)),
        Never(),
        Never(),
        {"has_layout": True},
    ),
}
FLAGS = ("straight_through", "resizes", "has_layout", "skips_gradient", "grows_by_gradient")


@pytest.mark.parametrize("name", SPECS)
def test_a_spec_says_what_the_method_does(name, params):
    method, changes, dense_gradient, flags = SPECS[name]
    spec = bsj.get_spec(method.init(params))
    steps = range(20)
    assert [spec.changes(s) for s in steps] == [bool(changes(s)) for s in steps]
    assert [spec.dense_gradient(s) for s in steps] == [bool(dense_gradient(s)) for s in steps]
    assert {flag: getattr(spec, flag) for flag in FLAGS} == dict.fromkeys(FLAGS, False) | flags


@pytest.mark.parametrize("name", [n for n in SPECS if n not in ("sr-ste", "subp", "subp-hard")])
def test_masks_change_only_where_the_spec_says_so(name, params):
    method = SPECS[name][0]
    state, update = method.init(params), jax.jit(method.update)
    spec = bsj.get_spec(state)
    for step in range(14):
        before = np.asarray(state.masks["conv"])
        grads = {"conv": kernel(100 + step), "bias": jnp.ones(32)}
        _, state = update(grads, state, params)
        if not spec.changes(step):
            np.testing.assert_array_equal(before, state.masks["conv"])


def test_several_methods_publish_together(params):
    first = bsj.rigl(0.5, until=9, update_every=4)
    tx = bsj.sparse(first, bsj.magnitude(0.5, pattern=P.one_by_n(8)), optax.sgd(0.1))
    spec = bsj.get_spec(tx.init(params))
    assert spec.method == "rigl + magnitude"
    assert spec.changes(4)
    assert not spec.changes(5)
    assert spec.has_layout


def test_a_spec_is_static_equal_and_can_be_pickled(params):
    subp = bsj.subp(0.5, schedule=bsj.between(0, 9))
    for method in (bsj.rigl(0.9, until=9), bsj.sr_ste(), bsj.hrbp_prune(0.9), subp):
        spec = bsj.get_spec(method.init(params))
        assert pickle.loads(pickle.dumps(spec)) == spec
        assert hash(spec) == hash(dataclasses.replace(spec))
        assert jax.tree.leaves(spec) == []


# The hook on proposed weights


def threshold_method(limit, schedule):
    """Prunes every weight whose proposed value is below a limit, for ever."""

    def prune(step, leaves):
        return {
            name: leaf._replace(mask=leaf.mask & (jnp.abs(leaf.weights) >= limit))
            for name, leaf in leaves.items()
        }

    def draw(chosen):
        return {
            name: P.Kept(jnp.ones(leaf.shape, bool), bsj.Dense()) for name, leaf in chosen.items()
        }

    spec = bsj.Spec("threshold", 0.5, schedule=schedule, on_proposed=prune)
    return sparse_transformation(spec, draw=draw)


@pytest.mark.parametrize("schedule", [Always(), bsj.between(1, 3)], ids=["always", "era"])
def test_a_method_prunes_the_proposed_weights(schedule, params):
    tx = bsj.sparse(threshold_method(0.5, schedule), optax.sgd(0.1, momentum=0.9))
    state, update = tx.init(params), jax.jit(tx.update)
    weights, trace = np.asarray(params["conv"]), np.zeros(SHAPE, np.float32)
    mask = np.ones(SHAPE, bool)
    for step in range(5):
        grads = {"conv": kernel(50 + step), "bias": jnp.ones(32)}
        updates, state = update(grads, state, params)
        params = optax.apply_updates(params, updates)
        trace = np.float32(0.9) * trace + np.where(mask, grads["conv"], 0)
        proposed = weights - np.float32(0.1) * trace
        if schedule(step):
            mask = mask & (np.abs(proposed) >= 0.5)
        weights, trace = np.where(mask, proposed, 0), np.where(mask, trace, 0)
        np.testing.assert_array_equal(bsj.get_masks(state)["conv"], mask)
        np.testing.assert_allclose(params["conv"], weights, rtol=1e-5, atol=1e-6)
        assert not np.asarray(params["conv"])[~mask].any(), "zeros are exact"
        np.testing.assert_allclose(state[1][0].trace["conv"], trace, rtol=1e-5, atol=1e-6)
    assert 0.1 < mask.mean() < 0.9


def test_a_method_changes_the_proposed_weights(params):
    """Clips the proposed weights: what the parameters become is what the method returned."""

    def clip(step, leaves):
        return {
            name: leaf._replace(weights=jnp.clip(leaf.weights, -0.2, 0.2))
            for name, leaf in leaves.items()
        }

    spec = bsj.Spec("clip", 1.0, schedule=Always(), on_proposed=clip)
    method = sparse_transformation(
        spec,
        draw=lambda chosen: {
            name: P.Kept(jnp.ones(leaf.shape, bool), bsj.Dense()) for name, leaf in chosen.items()
        },
    )
    tx = bsj.sparse(method, optax.adam(0.05))
    params["offsets"] = jnp.array([-jnp.inf, 0.0])  # of an attention mask, not trained
    state = tx.init(params)
    grads = {"conv": kernel(7), "bias": jnp.ones(32), "offsets": jnp.zeros(2)}
    updates, state = tx.update(grads, state, params)
    new = optax.apply_updates(params, updates)
    assert float(jnp.abs(new["conv"]).max()) == pytest.approx(0.2, abs=1e-6)
    assert float(new["bias"][0]) == pytest.approx(0.95, abs=1e-3), "dense leaves are not touched"
    np.testing.assert_array_equal(new["offsets"], params["offsets"])


def test_extra_arguments_reach_the_method_and_the_optimizer(params):
    """The method sums up `loss`, and the optimizer behind it needs `value`."""
    names = []

    def remember(step, leaf):
        names.append(sorted(step.extra))
        return leaf.memory + step.extra["loss"]

    method = sparse_transformation(
        bsj.Spec("listener", 1.0),
        draw=lambda chosen: {
            name: P.Kept(jnp.ones(leaf.shape, bool), bsj.Dense()) for name, leaf in chosen.items()
        },
        remember=remember,
    )
    tx = bsj.sparse(method, optax.scale_by_polyak())
    state = tx.init(params)
    for _ in range(2):
        _, state = jax.jit(tx.update)(params, state, params, loss=jnp.float32(3), value=1.0)
    assert names[0] == ["loss", "value"]
    np.testing.assert_array_equal(state[0].memory["conv"], np.full(SHAPE, 6.0))
    assert state[0].memory["bias"].shape == ()


def test_a_penalty_joins_the_gradient_before_the_optimizer(params):
    method = sparse_transformation(
        bsj.Spec("lasso", 1.0),
        draw=lambda chosen: {name: P.Kept(leaf > 0, bsj.Dense()) for name, leaf in chosen.items()},
        penalty=lambda name, leaf: 0.5 * jnp.sign(leaf.weights),
    )
    grads = jax.tree.map(jnp.zeros_like, params)
    updates, _ = method.update(grads, method.init(params), params)
    expected = np.where(np.asarray(params["conv"]) > 0, 0.5, 0)
    np.testing.assert_array_equal(updates["conv"], expected)


def test_the_hook_works_inside_multi_transform_and_multi_steps(params):
    method = threshold_method(0.5, Always())
    chain = optax.MultiSteps(bsj.sparse(method, optax.sgd(0.1)), every_k_schedule=2)
    tx = optax.multi_transform({"s": chain, "d": optax.sgd(0.1)}, {"conv": "s", "bias": "d"})
    state = tx.init(params)
    for step in range(4):
        grads = {"conv": kernel(step), "bias": jnp.ones(32)}
        updates, state = jax.jit(tx.update)(grads, state, params)
        params = optax.apply_updates(params, updates)
    mask = np.asarray(bsj.get_masks(state)["conv"])
    assert 0.1 < mask.mean() < 0.9
    assert not np.asarray(params["conv"])[~mask].any()


# Forgotten keep_zeros


def test_a_chain_without_keep_zeros_is_not_silent(params):
    method = bsj.magnitude(0.9)
    good, bad = bsj.sparse(method, optax.adamw(0.1)), optax.chain(method, optax.adamw(0.1))
    for tx, start, expected in ((good, True, 0), (bad, False, 4147)):
        state, weights = tx.init(params), params
        if start:
            weights = bsj.apply_masks(params, bsj.get_masks(state))
        for _ in range(2):
            updates, state = tx.update(params, state, weights)
            weights = optax.apply_updates(weights, updates)
        summary = bsj.summarize(weights, state)
        assert summary.nonzero_pruned == int(bsj.nonzero_pruned(weights, state)) == expected
        assert (f"{expected:,} pruned weights are not zero" in str(summary)) == bool(expected)


@pytest.mark.parametrize(
    "method",
    [bsj.campfire(0.5, era=(0, 3)), bsj.deep_r(0.5), bsj.dsr(0.5, schedule=bsj.every(1))],
    ids=["campfire", "deep-r", "dsr"],
)
def test_a_method_that_acts_on_proposed_weights_refuses_a_chain_without_keep_zeros(method, params):
    tx = optax.chain(method, optax.sgd(0.1))
    state = tx.init(params)
    with pytest.raises(ValueError, match="only keep_zeros knows them; use sparse"):
        jax.jit(tx.update)(params, state, params)


def test_masks_of_the_next_step_come_without_keep_zeros_from_the_present_weights(params):
    """With a warning: SUBP prunes the channels that are smallest before the update."""
    tx = optax.chain(bsj.subp(0.5, schedule=bsj.between(0, 1)), optax.sgd(1.0))
    weights = {"conv": jnp.arange(1.0, 17.0)[:, None] * jnp.ones(SHAPE), "bias": jnp.ones(32)}
    state, grads = tx.init(weights), jax.tree.map(lambda w: 2 * w, weights)
    with pytest.warns(UserWarning, match="subp sets masks from .* outside of it those before"):
        updates, state = tx.update(grads, state, weights)
    np.testing.assert_array_equal(updates["conv"], -grads["conv"])
    kept = np.asarray(bsj.get_masks(state)["conv"]).all((0, 1, 3))
    assert kept.tolist() == [False] * 8 + [True] * 8


def test_straight_through_methods_promise_no_zeros(params):
    state = bsj.sr_ste(2, 4).init(params)
    assert bsj.summarize(params, state).nonzero_pruned == 0


def test_sparse_refuses_what_is_no_transformation(params):
    with pytest.raises(ValueError, match=r"optimizer\[0\]: expected an optax transformation"):
        bsj.sparse(bsj.rigl(0.5, until=9), 0.1)
    with pytest.raises(ValueError, match="method: expected an optax transformation"):
        bsj.sparse(optax.sgd, optax.sgd(0.1))
    with pytest.raises(ValueError, match="state: expected the state of a chain that holds"):
        bsj.sparse(optax.sgd(0.1), optax.sgd(0.1)).init(params)


# Scores before training


def test_snip_is_the_reference():
    weights = {"a": kernel(1), "b": kernel(2, (4, 5))}
    x = kernel(3, (7, 4))

    def loss(params, batch):
        return jnp.sum(jnp.tanh(batch @ params["b"])) + jnp.sum(params["a"] ** 3)

    grads = jax.grad(loss)(weights, x)
    expected = ref.snip_scores(jax.tree.map(np.asarray, weights), jax.tree.map(np.asarray, grads))
    scores = bsj.snip(loss, weights, x)
    for name in weights:
        np.testing.assert_allclose(scores[name], expected[name], rtol=1e-5)
    assert sum(float(leaf.sum()) for leaf in scores.values()) == pytest.approx(1, abs=1e-5)
    masks = bsj.masks_from_scores(scores, 0.8, budget="global", where=lambda name, leaf: True)
    size = sum(leaf.size for leaf in weights.values())
    assert sum(int(mask.sum()) for mask in masks.values()) == round(0.2 * size)
    with pytest.raises(ValueError, match="loss_fn: expected a loss with finite gradients"):
        bsj.snip(lambda params, batch: jnp.float32(0), weights, x)
    with pytest.raises(ValueError, match=r"loss_fn: expected one scalar, got .* \[\(7, 5\)\]"):
        bsj.snip(lambda params, batch: batch @ params["b"], weights, x)
    with pytest.raises(ValueError, match=r"params\['n'\]: expected floats, got int32"):
        bsj.snip(loss, weights | {"n": jnp.arange(3)}, x)


@pytest.mark.parametrize("pattern", [P.unstructured(), P.kernel(), P.one_by_n(8)], ids=str)
def test_magnitude_prunes_once(pattern, params):
    method = bsj.magnitude(0.75, pattern=pattern, budget="uniform")
    state = method.init(params)
    scores = jax.tree.map(jnp.abs, params)
    expected = bsj.masks_from_scores(scores, 0.75, pattern=pattern)
    np.testing.assert_array_equal(state.masks["conv"], expected["conv"])
    _, later = method.update(jax.tree.map(jnp.ones_like, params), state, params)
    np.testing.assert_array_equal(later.masks["conv"], expected["conv"])
    if pattern == P.unstructured():
        flat = np.abs(np.asarray(params["conv"]))
        np.testing.assert_array_equal(state.masks["conv"], ref.largest(flat, flat.size // 4))


def test_old_spellings_mean_the_new_ones(params):
    pairs = [
        (bsj.rigl(0.9, update_every=3, start=1, until=9), bsj.rigl(0.9, schedule=Every(3, 1, 9))),
        (
            bsj.hrbp_prune(0.9, update=bsj.periodic(3, until=9)),
            bsj.hrbp_prune(0.9, schedule=bsj.every(3, until=9)),
        ),
        (
            bsj.gradual_magnitude(0.9, start=1, end=9, update_every=2),
            bsj.gradual(0.9, schedule=bsj.between(1, 9, every=2)),
        ),
        (
            bsj.subp(0.5, schedule="linear", start=1, end=9, update_every=2),
            bsj.subp(0.5, curve="linear", schedule=bsj.between(1, 9, every=2)),
        ),
    ]
    for old, new in pairs:
        old, new = bsj.keep_zeros(old), bsj.keep_zeros(new)
        old_state, new_state = old.init(params), new.init(params)
        update_old, update_new = jax.jit(old.update), jax.jit(new.update)
        for step in range(10):
            grads = {"conv": kernel(step), "bias": jnp.ones(32)}
            _, old_state = update_old(grads, old_state, params)
            _, new_state = update_new(grads, new_state, params)
        assert bsj.get_spec(old_state) == bsj.get_spec(new_state)
        np.testing.assert_array_equal(old_state.masks["conv"], new_state.masks["conv"])
    with pytest.raises(ValueError, match="update: the deprecated name of `schedule`, got both"):
        bsj.hrbp_prune(0.9, schedule=bsj.every(3), update=bsj.every(3))
    with pytest.raises(ValueError, match="start: deprecated beside `schedule`, got both"):
        bsj.subp(0.5, schedule=bsj.between(0, 4), start=1, end=3)
    with pytest.raises(ValueError, match="update_every: deprecated beside `schedule`, got both"):
        bsj.rigl(0.5, schedule=bsj.every(100), until=30)
