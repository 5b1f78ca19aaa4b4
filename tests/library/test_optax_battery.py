"""Every method under what optax users do to a transformation."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from sparse_methods import EXCHANGING, HARD, KINDS, METHODS, chain, kinds_first, noise, slow_unless

import blocksparse_jax as bsj

OPTIMIZERS = {
    "sgd": lambda: optax.sgd(0.1, momentum=0.9, nesterov=True),
    "adamw": lambda: optax.adamw(1e-2, weight_decay=1e-2),
    "lion": lambda: optax.lion(1e-3),
    "lamb": lambda: optax.lamb(1e-3),
    "scheduled": lambda: optax.sgd(optax.piecewise_constant_schedule(0.1, {3: 0.1}), momentum=0.9),
}
_apply = jax.jit(optax.apply_updates)


@functools.cache
def _with_optimizer(name, optimizer):
    """A transformation, its jitted update and a list that grows when that is traced; shared, so
    that tests do not compile again.
    """
    traces = []
    tx = bsj.keep_zeros(chain(name, optax.add_decayed_weights(1e-2), OPTIMIZERS[optimizer]()))

    def update(grads, state, params):
        traces.append(name)
        return tx.update(grads, state, params)

    return tx, jax.jit(update), traces


def _train(tx, params, steps, start=0, state=None, update=None):
    update = jax.jit(tx.update) if update is None else update
    state = tx.init(params) if state is None else state
    for step in range(start, start + steps):
        updates, state = update(noise(params, step), state, params)
        params = _apply(params, updates)
    return params, state


def _assert_zeros(params, masks):
    for p, m in zip(jax.tree.leaves(params), jax.tree.leaves(masks), strict=True):
        assert not np.any(np.asarray(p)[~np.broadcast_to(m, p.shape)])


@pytest.mark.parametrize(
    ("dtype", "name"),
    [
        slow_unless(dtype == jnp.float32 or name in KINDS, dtype, name, id=f"{short}-{name}")
        for short, dtype in (("fp32", jnp.float32), ("bf16", jnp.bfloat16))
        for name in METHODS
    ],
)
def test_an_update_keeps_dtypes_and_never_recompiles(name, dtype, params):
    """Over two updates of the masks."""
    params = jax.tree.map(lambda p: p.astype(dtype), params)
    tx, update, traces = _with_optimizer(name, "adamw")
    state = first = tx.init(params)
    update(noise(params, 0), state, params)
    traced = len(traces)
    for step in range(7):
        grads = noise(params, step)
        updates, new_state = update(grads, state, params)
        chex.assert_trees_all_equal_dtypes(updates, params)
        chex.assert_trees_all_equal_shapes_and_dtypes(new_state, first)
        params, state = _apply(params, updates), new_state
    assert len(traces) == traced
    chex.assert_trees_all_equal_structs(bsj.get_masks(state), params)


# What moves masks lies in `lax.cond`, which eager updates compile too: one method of each kind.
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", kinds_first(METHODS))
def test_an_eager_update_is_the_jitted_one(name, dtype, params):
    """At the step that moves the masks."""
    params = jax.tree.map(lambda p: p.astype(dtype), params)
    tx, update, _ = _with_optimizer(name, "adamw")
    params, state = _train(tx, params, 3, update=update)
    grads = noise(params, 3)
    (updates, state), (expected, after) = (
        tx.update(grads, state, params),
        update(grads, state, params),
    )
    tolerance = 1e-6 if dtype == jnp.float32 else 1e-2
    chex.assert_trees_all_close(updates, expected, rtol=tolerance, atol=tolerance)
    chex.assert_trees_all_equal(bsj.get_masks(state), bsj.get_masks(after))


@pytest.mark.parametrize(
    ("name", "optimizer"),
    [(n, o) for n in HARD for o in OPTIMIZERS if o == "adamw" or n in ("rigl", "fixed")],
)
def test_zeros_are_exact_after_noisy_steps(name, optimizer, params):
    """200 steps of full noise through momentum, Adam and weight decay, 60 where the method is one
    of a kind that others show; zeros are checked every 20 steps.
    """
    tx, update, _ = _with_optimizer(name, optimizer)
    state = None
    for start in range(0, 200 if name in KINDS else 60, 20):
        params, state = _train(tx, params, 20, start, state, update)
        masks = bsj.get_masks(state)
        _assert_zeros(params, masks)
        assert any(not bool(m.all()) for m in jax.tree.leaves(masks))


GROWING = [*EXCHANGING, "subp-hard", "gradual"]


@pytest.mark.parametrize(
    ("name", "optimizer"),
    [(n, o) for n in GROWING for o in OPTIMIZERS if o == "adamw" or n == "rigl"],
)
def test_moments_of_pruned_and_regrown_weights_are_reset(name, optimizer, params):
    tx, update, _ = _with_optimizer(name, optimizer)
    state = tx.init(params)
    grown_ever = 0
    for step in range(10):
        before = bsj.get_masks(state)
        updates, state = update(noise(params, step), state, params)
        params = _apply(params, updates)
        for path, moment in jax.tree.leaves_with_path(state[2]):
            keys = [k for k in ("conv1", "conv2") if k in jax.tree_util.keystr(path)]
            if not keys or "kernel" not in jax.tree_util.keystr(path):
                continue
            was, now = (np.asarray(t[keys[0]]["kernel"]) for t in (before, bsj.get_masks(state)))
            grown_ever += int((now & ~was).sum())
            assert not np.any(np.asarray(moment)[~(was & now)])
            assert np.any(np.asarray(moment)[was & now]) or step == 0
    assert grown_ever > 0 or name == "gradual"


@pytest.mark.parametrize(
    ("name", "optimizer"), [*(("rigl", o) for o in OPTIMIZERS), ("hrbp-dynamic", "adamw")]
)
def test_a_topology_step_applies_no_gradient(name, optimizer, params):
    """Weights that stay do not move, nor do their moments, whatever momentum and weight decay would
    do; dense leaves too.
    """
    tx, update, _ = _with_optimizer(name, optimizer)
    params, state = _train(tx, params, 3, update=update)
    updates, after = update(noise(params, 3), state, params)
    assert bool(after[0].skip_gradient)
    expected = jax.tree.map(lambda p, m: jnp.where(m, 0, -p), params, bsj.get_masks(after))
    chex.assert_trees_all_equal(updates, expected)
    assert not np.any(updates["stem"]["kernel"])
    for path, old in jax.tree.leaves_with_path(state[2]):
        if old.ndim and "stem" in jax.tree_util.keystr(path):
            new = dict(jax.tree.leaves_with_path(after[2]))[path]
            np.testing.assert_array_equal(old, new)


@pytest.mark.parametrize("name", kinds_first(METHODS))
def test_inject_hyperparams_inside_with_a_schedule(name, params):
    schedule = optax.piecewise_constant_schedule(0.1, {3: 0.1})
    injected = optax.inject_hyperparams(optax.sgd)(learning_rate=schedule, momentum=0.9)
    tx = bsj.keep_zeros(
        optax.chain(METHODS[name](params), optax.add_decayed_weights(1e-2), injected)
    )
    plain, update, _ = _with_optimizer(name, "scheduled")
    (a, state), (b, _) = _train(tx, params, 6), _train(plain, params, 6, update=update)
    chex.assert_trees_all_close(a, b, rtol=1e-6, atol=1e-6)
    assert float(state[2].hyperparams["learning_rate"]) == pytest.approx(0.01)
    if name in HARD:
        _assert_zeros(a, bsj.get_masks(state))


@pytest.mark.parametrize("name", kinds_first(METHODS))
def test_multi_steps_outside(name, params):
    """Gradients accumulated over two micro-steps equal one step on their mean; masks are read
    through the wrapper.
    """
    tx, update, _ = _with_optimizer(name, "scheduled")
    multi = optax.MultiSteps(tx, every_k_schedule=2)
    params_multi, state_multi = _train(multi, params, 10)
    state = tx.init(params)
    plain, current = params, params
    for step in range(0, 10, 2):
        # MultiSteps' parameters are those of its last real step, so both micro-gradients have the
        # same dtype and shape only.
        grads = jax.tree.map(
            lambda a, b: (a + b) / 2, noise(current, step), noise(current, step + 1)
        )
        updates, state = update(grads, state, plain)
        plain = _apply(plain, updates)
    chex.assert_trees_all_close(params_multi, plain, rtol=1e-5, atol=1e-5)
    chex.assert_trees_all_equal(bsj.get_masks(state_multi), bsj.get_masks(state))


@pytest.mark.parametrize("name", ["rigl", "subp"])
def test_multi_steps_inside_keep_zeros(name, params):
    """Gradients accumulated inside of keep_zeros grow and move the same weights as outside."""
    inner = chain(name, optax.sgd(0.1))
    outside = optax.MultiSteps(bsj.keep_zeros(inner), every_k_schedule=2)
    inside = bsj.keep_zeros(optax.MultiSteps(inner, every_k_schedule=2).gradient_transformation())
    (a, state_a), (b, state_b) = _train(outside, params, 12), _train(inside, params, 12)
    chex.assert_trees_all_equal(bsj.get_masks(state_a), bsj.get_masks(state_b))
    chex.assert_trees_all_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "name", kinds_first(n for n in METHODS if n not in ("fixed", "random-channel"))
)
def test_multi_transform_outside(name, params):
    """Two labels, two optimizers: the method sees only the leaves of its label, and masks come back
    for the whole tree.
    """
    labels = {"stem": "plain", "conv1": "sparse", "conv2": "sparse", "classifier": "plain"}
    inner = bsj.keep_zeros(optax.chain(METHODS[name](params), optax.adam(1e-2)))
    tx = optax.multi_transform({"sparse": inner, "plain": optax.sgd(0.1)}, labels)
    params, state = _train(tx, params, 8)
    masks = bsj.get_masks(state)
    assert masks["conv1"]["kernel"].shape == (3, 3, 16, 32)
    assert masks["stem"].shape == ()  # multi_transform hides the whole subtree
    chex.assert_trees_all_equal_shapes(bsj.apply_masks(params, masks), params)
    assert "classifier/kernel" in str(bsj.summarize(params, state))
    values, _ = bsj.pack_tree(params, state, bsj.get_layouts(state), drop_pruned=name == "subp")
    chex.assert_trees_all_equal(values["stem"], params["stem"])
    chex.assert_trees_all_equal_shapes(bsj.masked(params, state), params)
    if name in HARD:
        _assert_zeros(
            {k: params[k] for k in ("conv1", "conv2")}, {k: masks[k] for k in ("conv1", "conv2")}
        )


def test_two_methods_in_multi_transform_merge(params):
    def only(layer):
        return lambda name, leaf: name.startswith(layer)

    def chain(method):
        return bsj.keep_zeros(optax.chain(method, optax.sgd(0.1)))

    transforms = {
        "a": chain(bsj.rigl(0.5, until=9, where=only("conv1/kernel"))),
        "b": chain(bsj.sr_ste(2, 4, where=only("conv2"))),
    }
    tx = optax.multi_transform(
        transforms | {"c": optax.sgd(0.1)},
        {"stem": "c", "conv1": "a", "conv2": "b", "classifier": "c"},
    )
    params, state = _train(tx, params, 3)
    masks = bsj.get_masks(state)
    assert masks["conv1"]["kernel"].mean() == pytest.approx(0.5, abs=1e-3)
    assert masks["conv2"]["kernel"].mean() == 0.5
    forward = bsj.masked(params, state)
    np.testing.assert_array_equal(forward["conv1"]["kernel"], params["conv1"]["kernel"])
    assert np.mean(np.asarray(forward["conv2"]["kernel"]) == 0) == 0.5


@pytest.mark.parametrize("name", kinds_first(METHODS))
def test_extra_args_pass_through(name, params):
    """A transformation behind the method gets its extra argument; `params` may be a keyword."""
    tx = bsj.keep_zeros(
        optax.chain(
            METHODS[name](params), optax.scale_by_backtracking_linesearch(max_backtracking_steps=2)
        )
    )
    state = tx.init(params)

    def loss(p):
        return sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(p))

    value, grads = jax.value_and_grad(loss)(params)
    update = jax.jit(
        lambda grads, state, params, value: tx.update(
            grads, state, params=params, value=value, grad=grads, value_fn=loss
        )
    )
    updates, _ = update(grads, state, params, value)
    chex.assert_trees_all_equal_shapes(updates, params)


@pytest.mark.parametrize("name", kinds_first(HARD))
def test_chain_order_does_not_break_zeros(name, params):
    """The method behind the optimizer's transformations: other numbers, but zeros all the same."""
    tx = bsj.keep_zeros(
        optax.chain(
            optax.clip_by_global_norm(1.0),
            optax.trace(0.9),
            METHODS[name](params),
            optax.scale(-0.1),
        )
    )
    params, state = _train(tx, params, 12)
    _assert_zeros(params, bsj.get_masks(state))


@pytest.mark.parametrize("name", kinds_first(METHODS))
def test_params_are_required(name, params):
    for tx in (METHODS[name](params), bsj.keep_zeros(METHODS[name](params))):
        with pytest.raises(ValueError, match="params: "):
            tx.update(params, tx.init(params))


# A jitted init holds the whole search for groups: that of hrbp stands for all.
SAME_SEARCH = ("hrbp-dynamic", "hrbp-gradient")


@pytest.mark.parametrize("name", [slow_unless(name not in SAME_SEARCH, name) for name in METHODS])
def test_init_and_update_trace_abstractly(name, params):
    tx = bsj.keep_zeros(optax.chain(METHODS[name](params), optax.adam(1e-3)))
    shapes, state = jax.eval_shape(tx.init, params), tx.init(params)
    chex.assert_trees_all_equal_shapes_and_dtypes(shapes, state)
    jitted = jax.jit(tx.init)(params)
    chex.assert_trees_all_equal(bsj.get_masks(jitted), bsj.get_masks(state))


NAN_CASES = [
    slow_unless((part == "gradient") == np.isnan(bad), part, name, bad)
    for part in ("gradient", "weights")
    for bad in (np.nan, np.inf)
    for name in (*EXCHANGING, "hrbp-gradient", "gradual", "subp-hard")
]


@pytest.mark.parametrize(("part", "name", "bad"), NAN_CASES)
def test_masks_stay_where_values_that_decide_them_are_not_finite(part, name, bad, params):
    """One value is enough; such updates are counted. Methods that do not read gradients go on."""
    tx, update, _ = _with_optimizer(name, "adamw")
    state = tx.init(params)
    first, spec = bsj.get_masks(state), bsj.get_spec(state)
    masks, weights, reads = first, params, part == "weights" or spec.grows_by_gradient
    place = (0, 0, 0, 0)
    if spec.on_proposed is not None:  # a kept weight takes its gradient into the proposed one
        place, reads = tuple(np.argwhere(first["conv1"]["kernel"])[0]), True
    for step in range(6):
        grads = noise(params, step)
        spoilt = weights if part == "weights" else grads
        spoilt["conv1"]["kernel"] = spoilt["conv1"]["kernel"].at[place].set(bad)
        _, state = update(grads, state, weights)
        masks = bsj.get_masks(state)
        if reads:
            chex.assert_trees_all_equal(masks, first)
    due = sum(spec.changes(step) for step in range(6))
    assert due > 0
    assert int(state[0].nonfinite_updates) == (due if reads else 0)
    assert reads or float(bsj.sad(first, masks).total) > 0


def test_masks_are_the_same_for_the_same_key(params):
    for make in (
        lambda k: bsj.rigl(0.5, until=9, key=k),
        lambda k: bsj.hrbp_prune(0.7, group_size=16, scores="random", key=k),
    ):
        a, b, c = (bsj.get_masks(make(jax.random.key(k)).init(params)) for k in (1, 1, 2))
        chex.assert_trees_all_equal(a, b)
        assert float(bsj.sad(a, c).total) > 0.1


def test_a_gradient_masking_transform_alone_would_not_do(params):
    """What keep_zeros is for: without it momentum moves weights that a topology step has just
    pruned.
    """
    tx = optax.chain(METHODS["rigl"](params), optax.sgd(0.1, momentum=0.9))
    params, state = _train(tx, params, 30)
    masks = bsj.get_masks(state)
    pruned = np.asarray(params["conv1"]["kernel"])[~np.asarray(masks["conv1"]["kernel"])]
    assert np.mean(pruned != 0) > 0.5
