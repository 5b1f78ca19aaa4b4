"""Every public name is run: one small call and what it must give.

A new public name needs a function here that is named after it, `.` written `__`. The test looks
whether that function really executes the code behind the name.
"""

# ruff: noqa: N802  checks are named after what they check

import dataclasses
import functools
import inspect
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx
from sparse_methods import noise

import blocksparse_jax as bsj

# Modules among the public names, and what of them is for users.
OF_MODULES = {
    "linen": [
        "BatchNormAct",
        "BlockSparseConv",
        "BlockSparseLinear",
        "VariationalConv",
        "VariationalDense",
        "capture_inputs",
        "use_layouts",
        "use_variational_dropout",
    ],
    "metrics": [
        "Eliminated",
        "density",
        "eliminated_inputs",
        "ever_active",
        "itop",
        "kept_flops",
        "nonzero_pruned",
        "sad",
        "step_flops",
        "training_flops",
    ],
    "nnx": [
        "BatchNormAct",
        "BlockSparseConv",
        "BlockSparseLinear",
        "Optimizer",
        "VariationalConv",
        "VariationalDense",
        "executions",
        "set_layouts",
        "sparsify",
    ],
    "patterns": bsj.patterns.__all__,
    "transforms": bsj.transforms.__all__,
}
NAMES = [name for name in bsj.__all__ if not inspect.ismodule(getattr(bsj, name))]
NAMES += [f"{module}.{name}" for module, names in OF_MODULES.items() for name in names]
SHAPE = (3, 3, 16, 32)
CHECKS = {}


def check(function):
    """Registers a check under the public name for which the name of the function stands."""
    CHECKS[function.__name__.replace("__", ".")] = function
    return function


def test_every_public_name_has_a_check():
    modules = {name for name in bsj.__all__ if inspect.ismodule(getattr(bsj, name))}
    assert modules == set(OF_MODULES)
    missing = sorted(set(NAMES) - set(CHECKS))
    assert not missing, f"write a check for each of {missing} in {__name__}"
    assert not sorted(set(CHECKS) - set(NAMES)), "these are no public names"


@pytest.mark.parametrize("name", NAMES)
def test_a_public_name_does_what_it_says(name):
    value = functools.reduce(getattr, name.split("."), bsj)
    executed = set()

    def record(frame, event, argument):
        if event == "call":
            executed.add(frame.f_code)

    before = sys.getprofile()
    sys.setprofile(record)
    try:
        CHECKS[name]()
    finally:
        sys.setprofile(before)
    if codes := codes_of(value):
        assert codes & executed, f"the check of {name} does not run it"


def codes_of(value):
    """The code objects of which one runs when a function is called or a class is used; none for a
    class that defines no method.
    """
    value = inspect.unwrap(value)
    if not inspect.isclass(value):
        return {value.__code__}
    members = [inspect.unwrap(member) for member in vars(value).values() if callable(member)]
    return {member.__code__ for member in members if inspect.isfunction(member)}


def kernel(seed=0, shape=SHAPE):
    return jax.random.normal(jax.random.key(seed), shape)


def params():
    return {"conv": kernel(), "bias": jnp.ones(32)}


@functools.cache
def layout():
    """Two groups that keep 4 of 16 channels and 3 of 9 taps."""
    return bsj.random_groups(jax.random.key(1), SHAPE, group_size=16, kept=4, kept_taps=3)


def kept(tree):
    return int(bsj.get_masks(tree)["conv"].sum())


def trained(method, steps=1):
    """Parameters and state of the method after some steps of SGD under `sparse`."""
    tx, weights = bsj.sparse(method, optax.sgd(0.1)), params()
    state = tx.init(weights)
    for step in range(steps):
        updates, state = tx.update(noise(weights, step), state, weights)
        weights = optax.apply_updates(weights, updates)
    return weights, state


def assert_prunes(method, density, steps=1):
    """The method keeps a fraction of the conv kernel and leaves zeros elsewhere."""
    weights, state = trained(method, steps)
    assert np.mean(weights["conv"] != 0) == pytest.approx(density, abs=0.01)
    assert bsj.get_masks(state)["conv"].mean() == pytest.approx(density, abs=0.01)
    return state


# Layouts


@check
def BlockLayout():
    index = (jnp.array([[0, 1]]), jnp.array([[1]]), jnp.array([[0]]))
    one = bsj.BlockLayout(*index, shape=(1, 1, 4, 2))
    assert one.packed_shape == (1, 1, 1, 2)
    assert one.density == 0.25


@check
def native_calls():
    one = bsj.mask_to_layout(jnp.ones((1, 1, 2, 2), bool))
    infer = jax.jit(lambda x: bsj.conv(x, jnp.ones((1, 1, 2, 2)), one))
    exported = jax.export.export(infer, disabled_checks=bsj.native_calls())(jnp.ones((1, 1, 1, 2)))
    assert exported.call(jnp.ones((1, 1, 1, 2))).tolist() == [[[[2.0, 2.0]]]]


@check
def ColumnBlocks():
    blocks = bsj.ColumnBlocks((1, 1, 3, 4), ((np.array([0, 2]), np.array([1])),))
    assert blocks.mask()[0, 0].tolist() == [[0, 0, 0, 0], [1, 0, 1, 0], [0, 0, 0, 0]]


@check
def ConsecutiveGroups():
    mask = jnp.zeros((1, 1, 2, 4), bool).at[0, 0, 0, :2].set(True).at[0, 0, 1, 2:].set(True)
    read = bsj.ConsecutiveGroups(2).read(mask)
    assert read.filters.tolist() == [[0, 1], [2, 3]]
    assert read.channels.tolist() == [[0], [1]]


@check
def Dense():
    assert bsj.Dense() == bsj.Dense()
    assert jax.tree.leaves({"bias": bsj.Dense()}) == []


@check
def FilterGroups():
    mask = jnp.zeros((1, 1, 4, 2), bool).at[0, 0, 2:, 0].set(True).at[0, 0, :2, 1].set(True)
    read = bsj.FilterGroups(jnp.array([[1], [0]]), channel_block=2).read(mask)
    assert read.channels.tolist() == [[0, 1], [2, 3]]
    assert read.channel_block == 2


@check
def is_layout():
    assert bsj.is_layout(layout())
    assert bsj.is_layout(bsj.Dense())
    assert not bsj.is_layout(jnp.ones(3))


@check
def layout_to_mask():
    mask = bsj.layout_to_mask(layout())
    assert mask.shape == SHAPE
    assert int(mask.sum()) == 2 * 4 * 3 * 16


@check
def mask_to_layout():
    mask = bsj.layout_to_mask(layout())
    read = bsj.mask_to_layout(mask, layout().filters)
    np.testing.assert_array_equal(read.channels, layout().channels)
    np.testing.assert_array_equal(read.taps, layout().taps)


@check
def with_plans():
    planned = bsj.with_plans({"kernel": layout(), "bias": bsj.Dense()})
    assert planned["bias"] == bsj.Dense()
    np.testing.assert_array_equal(
        planned["kernel"].plan.rows[:, :16], planned["kernel"].filters, strict=True
    )


@check
def Plan():
    plan = bsj.with_plans(layout()).plan
    assert isinstance(plan, bsj.Plan)
    assert int((plan.forward >= 0).sum()) == 2 * 4 * 3
    assert_convolves(bsj.conv(images(), kernel(), layout(), plan=plan), kernel())
    other = dataclasses.replace(plan, rows=plan.rows[1:])
    with pytest.raises(ValueError, match=r"plan\.rows: expected int32"):
        bsj.conv(images(), kernel(), layout(), plan=other)


@check
def validate():
    assert bsj.validate(layout()) is layout()
    with pytest.raises(ValueError, match="strictly ascending"):
        bsj.validate(dataclasses.replace(layout(), taps=layout().taps[:, ::-1]))


@check
def block_fill():
    assert bsj.block_fill(layout()) == (1.0, 1.0)


# Grouping


@check
def hrbp_groups():
    """Even filters score even channels, odd ones odd channels."""
    scores = jnp.eye(2)[jnp.arange(8)[:, None] % 2, jnp.arange(8) % 2][None, None]
    groups = bsj.hrbp_groups(scores, group_size=4, kept=4, kept_taps=1)
    assert groups.filters.tolist() == [[0, 2, 4, 6], [1, 3, 5, 7]]
    assert groups.channels.tolist() == groups.filters.tolist()


@check
def random_groups():
    groups = bsj.random_groups(jax.random.key(0), SHAPE, group_size=8, kept=4, kept_taps=2)
    assert bsj.validate(groups).packed_shape == (4, 4, 2, 8)


@check
def kept_score():
    assert float(bsj.kept_score(jnp.ones(SHAPE), layout())) == 2 * 4 * 3 * 16


@check
def rumi_groups():
    mask = np.zeros((1, 1, 8, 20), bool)
    mask[0, 0, [2, 5]] = True
    ((rows, columns),) = bsj.rumi_groups(mask, clusters=1).blocks
    assert rows.tolist() == list(range(20))
    assert columns.tolist() == [2, 5]


@check
def dsb_groups():
    weights = np.ones((1, 1, 32, 16))
    weights[0, 0, ::2] = 2
    blocks = bsj.dsb_groups(weights, sparsity=0.5)
    assert blocks.mask()[0, 0].all(1).tolist() == [True, False] * 16


@check
def channel_orders():
    spaces = {"hidden": [("first", 3), ("second", 2)]}
    weights = {"first": kernel(0, (3, 3, 3, 16)), "second": kernel(1)}
    orders = bsj.channel_orders(weights, spaces, 0.75, channel_block=4, group_size=16)
    assert sorted(orders["hidden"].tolist()) == list(range(16))


@check
def fold_channel_orders():
    spaces = {"hidden": [("first", 3), ("second", 2)]}
    weights = {"first": kernel(0, (3, 3, 3, 16)), "second": kernel(1)}
    order = np.arange(16)[::-1]
    (folded,) = bsj.fold_channel_orders(spaces, {"hidden": order}, weights)
    np.testing.assert_array_equal(folded["first"], weights["first"][..., ::-1])
    np.testing.assert_array_equal(folded["second"], weights["second"][:, :, ::-1])


@check
def remove_channels():
    spaces = {"hidden": [("first", 3), ("second", 2)]}
    weights = {"first": kernel(0, (3, 3, 3, 16)), "second": kernel(1)}
    kept, state = np.arange(16) % 2 == 0, optax.adam(0.1).init(weights)
    smaller, state = bsj.remove_channels(spaces, {"hidden": kept}, weights, state)
    np.testing.assert_array_equal(smaller["first"], weights["first"][..., ::2])
    np.testing.assert_array_equal(smaller["second"], weights["second"][:, :, ::2])
    assert state[0].nu["second"].shape == smaller["second"].shape


@check
def channels_above():
    """A channel that one kernel uses stays."""
    spaces = {"hidden": [("first", 3), ("second", 2)]}
    weights = {"first": jnp.ones(SHAPE).at[..., 2:].set(0), "second": kernel(1).at[:, :, 3:].set(0)}
    kept = bsj.channels_above(spaces | {"hidden": [("first", 2), ("second", 2)]}, weights)
    assert kept["hidden"].all()
    kept = bsj.channels_above({"hidden": [("second", 2)]}, weights)["hidden"]
    assert kept.tolist() == [True] * 3 + [False] * 13


@check
def used_channels():
    """Channel 1 is read by a filter that nobody reads; channel 2 is not made."""
    spaces = {"a": [("first", 1), ("second", 0)], "b": [("second", 1), ("third", 0)]}
    weights = {
        "first": jnp.array([[1.0, 1.0, 0.0]]),
        "second": jnp.array([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0]]),
        "third": jnp.array([[1.0], [0.0]]),
    }
    kept = bsj.used_channels(spaces, weights)
    assert kept["a"].tolist() == [True, False, False]
    assert kept["b"].tolist() == [True, False]
    dead = weights | {"second": jnp.zeros((3, 2))}
    assert [int(v.sum()) for v in bsj.used_channels(spaces, dead).values()] == [1, 1]
    kept = bsj.used_channels(spaces, dead, vanishing=["a"])
    assert [int(v.sum()) for v in kept.values()] == [0, 1]


GROWING = {"s": [("first", 1), ("second", 0)]}


def with_a_dormant_channel():
    weights = {"first": jnp.array([[2.0, 0.0]]), "second": jnp.array([[3.0], [0.0]])}
    return weights, jax.tree.map(lambda leaf: leaf != 0, weights)


@check
def dormant_channels():
    """The channels that nothing makes and nothing reads; none are known of a dense layer."""
    weights, masks = with_a_dormant_channel()
    assert bsj.dormant_channels(weights, masks, GROWING)["s"].tolist() == [False, True]
    masks["second"] = jnp.asarray(True)
    assert bsj.dormant_channels(weights, masks, GROWING) == {}


@check
def grow_channels():
    """The candidate of the lowest loss."""
    weights, masks = with_a_dormant_channel()

    def loss(weights, batch):
        return (batch @ weights["first"] @ weights["second"]).sum()

    arguments = loss, weights, jnp.ones((1, 1)), masks, GROWING, {"s": 1}
    grown = [bsj.grow_channels(*arguments, candidates=n).params for n in (1, 9)]
    losses = [float(loss(params, jnp.ones((1, 1)))) for params in grown]
    assert losses[1] < min(6.0, losses[0])


@check
def GrownChannels():
    weights, masks = with_a_dormant_channel()
    grown = bsj.grow_channels(lambda *_: 0.0, weights, None, masks, GROWING, {"s": 1})
    assert isinstance(grown, bsj.GrownChannels)
    assert jax.tree.all(jax.tree.map(jnp.all, grown.masks))


@check
def channel_maxima():
    weights = {"a": jnp.array([[1.0, -5.0], [2.0, 3.0]]), "b": jnp.array([4.0, 0.0])}
    spaces = {"s": [("a", 1), ("b", 0)]}
    maxima = bsj.channel_maxima(spaces, weights, where=lambda name, leaf: True)
    assert maxima["s"].tolist() == [4.0, 5.0]


@check
def largest_channels():
    kept = bsj.largest_channels({"a": np.array([3.0, 1.0]), "b": np.array([0.5, 2.0])}, 0.5)
    assert kept["a"].tolist() == [True, False]
    assert kept["b"].tolist() == [False, True]


@check
def prune_train():
    """The first loss sets the strength, which stays."""
    weights = {"w": jnp.full((1, 4), 2.0)}
    tx = bsj.prune_train({"s": [("w", 1)]}, ratio=0.2)
    state = tx.init(weights)
    for loss in (8.0, 100.0):
        updates, state = tx.update({"w": jnp.zeros((1, 4))}, state, weights, value=loss)
        np.testing.assert_allclose(updates["w"], 0.2 * 8 / (8 * 0.8), rtol=1e-6)


@check
def norm_scales():
    assert bsj.norm_scales("block1/norm1/scale", jnp.ones(4))
    assert not bsj.norm_scales("block1/norm1/bias", jnp.ones(4))
    assert not bsj.norm_scales("upscale/kernel", jnp.ones((3, 3, 4, 4)))


@check
def branch_factors():
    assert bsj.branch_factors("stage1_block1/factor", jnp.ones(()))
    assert not bsj.branch_factors("stage1_block1/factor", jnp.ones(3))
    assert not bsj.branch_factors("factor/bias", jnp.ones(()))


@check
def scaling_factors():
    assert bsj.scaling_factors("block1/factor", jnp.ones(()))
    assert bsj.scaling_factors("block1/norm1/scale", jnp.ones(4))
    assert not bsj.scaling_factors("block1/conv1/kernel", jnp.ones((3, 3, 4, 4)))


@check
def slimming():
    weights = {"norm": {"scale": jnp.array([2.0, -2.0]), "bias": jnp.ones(2)}}
    tx = bsj.slimming(0.5, until=1)
    first, state = tx.update(weights, tx.init(weights), weights)
    second, _ = tx.update(weights, state, weights)
    assert first["norm"]["scale"].tolist() == [2.5, -2.5]
    assert second["norm"]["scale"].tolist() == [2.0, -2.0]
    assert first["norm"]["bias"].tolist() == [1.0, 1.0]


@check
def sss():
    """Small factors become exactly zero; other leaves are the optimizer's."""
    weights = {"scale": jnp.array([1.0, 0.05]), "w": jnp.ones((1, 2))}
    tx = bsj.sss(optax.sgd(0.5), 0.1, penalty=1.0)
    updates, _ = tx.update(
        jax.tree.map(jnp.zeros_like, weights) | {"w": jnp.ones((1, 2))}, tx.init(weights), weights
    )
    moved = optax.apply_updates(weights, updates)
    np.testing.assert_allclose(moved["scale"], [0.9 - 0.09, -0.045], rtol=1e-5)
    assert moved["w"].tolist() == [[0.5, 0.5]]


# Channels of trained networks


CHAIN = {"in": [("a", 0)], "hidden": [("a", 1), ("b", 0)]}


def chain():
    return {"a": jnp.array([[1.0, 0.1, -2.0]] * 2), "b": jnp.array([[1.0], [3.0], [2.0]])}


def chain_inputs():
    return {"b": bsj.LayerInput(jnp.array([[1.0, 0.1, 0.0], [0.0, 0.1, 2.0], [3.0, 0.1, 1.0]]))}


@check
def channel_counts():
    weights, spaces = {"a": kernel(0, (3, 3, 3, 16)), "b": kernel(1)}, {"s": [("a", 3), ("b", 2)]}
    assert bsj.channel_counts(weights, spaces, 0.0) == {"s": 16}
    assert bsj.channel_counts(weights, spaces, 0.75) == {"s": 4}


@check
def channel_masks():
    masks = bsj.channel_masks(chain(), CHAIN, {"hidden": np.array([True, False, True])})
    assert masks["a"].tolist() == [[True, False, True]] * 2
    assert masks["b"].tolist() == [[True], [False], [True]]


@check
def l1_filters():
    assert bsj.l1_filters(chain(), CHAIN, {"hidden": 1})["hidden"].tolist() == [False, False, True]


@check
def thinet():
    kept, weights = bsj.thinet(chain(), CHAIN, {"hidden": 2}, chain_inputs())
    assert kept["hidden"].tolist() == [True, False, True]
    assert weights["b"][1] == 0


@check
def lasso_channels():
    kept, weights = bsj.lasso_channels(chain(), CHAIN, {"hidden": 2}, chain_inputs())
    assert kept["hidden"].tolist() == [True, False, True]
    assert weights["b"][1] == 0


@check
def pfa():
    """The channel that never changes goes first."""
    kept = bsj.pfa(chain(), {"hidden": CHAIN["hidden"]}, chain_inputs(), energy=1.0)
    assert kept["hidden"].tolist() == [True, False, True]


@check
def LayerInput():
    given = bsj.LayerInput(jnp.ones((1, 4, 4, 2)), strides=2)
    assert len(jax.tree.leaves(given)) == 1
    assert jax.tree.map(lambda x: x, given).strides == 2


@check
def Reconstruction():
    assert bsj.Reconstruction({}, chain())._fields == ("kept", "params")


@check
def linen__capture_inputs():
    model, x = nn.Dense(2), jnp.arange(6.0).reshape(2, 3)
    captured = bsj.linen.capture_inputs(model, model.init(jax.random.key(0), x), x)
    np.testing.assert_array_equal(captured["kernel"].x, x)


# Scores and masks


@check
def masks_from_scores():
    masks = bsj.masks_from_scores({"conv": jnp.arange(4608.0).reshape(SHAPE)}, 0.75)
    np.testing.assert_array_equal(masks["conv"].ravel(), np.arange(4608) >= 3456)


@check
def layouts_from_scores():
    pattern = bsj.patterns.one_by_n(16)
    scores = jnp.arange(16.0)[:, None] * jnp.ones(SHAPE)
    layouts = bsj.layouts_from_scores({"conv": scores}, 0.75, pattern=pattern)
    assert layouts["conv"].channels.tolist() == [[12, 13, 14, 15]] * 2


@check
def snip():
    scores = bsj.snip(lambda p, x: jnp.sum(p * x), jnp.array([1.0, -2.0]), jnp.array([3.0, 1.0]))
    np.testing.assert_allclose(scores, [0.6, 0.4], rtol=1e-6)


@check
def grasp():
    """Of `sum w^2 x`, cut in two: g = 2 w sum(x), Hg = 2 sum(x) g, with its sign."""
    w, x = jnp.array([1.0, -2.0, 0.5]), jnp.array([[1.0], [-3.0]])
    scores = bsj.grasp(lambda p, x: jnp.sum(p**2 * x), w, x)
    np.testing.assert_allclose(scores, 16 * w**2, rtol=1e-6)
    scores = bsj.grasp(lambda p, x: -jnp.sum(p**4 * x), w, x)
    np.testing.assert_allclose(scores, 4 * 48 * w**6, rtol=1e-5)


@check
def synflow():
    """The path of the larger weights survives; the scores of the others are 0."""
    w = {"a": jnp.array([[-1.0, 2.0]]), "b": jnp.array([[3.0], [1.0]])}
    scores = bsj.synflow(
        lambda p, x: jnp.sum(x @ p["a"] @ p["b"]),
        w,
        jnp.ones((1, 1)),
        sparsity=0.5,
        rounds=5,
        where=lambda name, leaf: True,
    )
    assert scores["a"].tolist() == [[3, 0]]
    assert scores["b"].tolist() == [[3], [0]]


@check
def rumi_masks():
    masks = bsj.random_masks(jax.random.key(0), params(), 0.9)
    regrouped = bsj.rumi_masks(masks, clusters=2, min_rows=4)
    expected = bsj.rumi_groups(masks["conv"], clusters=2, min_rows=4).mask()
    np.testing.assert_array_equal(regrouped["conv"], expected)
    assert regrouped["bias"].ndim == 0
    unchanged = bsj.rumi_masks(masks, min_rows=33)  # no cluster has as many filters
    np.testing.assert_array_equal(unchanged["conv"], masks["conv"])


@check
def dsb_masks():
    masks = bsj.dsb_masks(params(), 0.75, block=8)
    expected = bsj.dsb_groups(params()["conv"], sparsity=0.75, block=8).mask()
    np.testing.assert_array_equal(masks["conv"], expected)
    assert masks["bias"].ndim == 0


@check
def lottery_sparsities():
    np.testing.assert_allclose(bsj.lottery_sparsities(0.7, 0.5), [0.5, 0.7])
    assert bsj.lottery_sparsities(0.0) == ()


@check
def lottery_ticket():
    masks = bsj.lottery_ticket(params(), None, 0.5)
    assert int(masks["conv"].sum()) == kernel().size // 2
    again = bsj.lottery_ticket(bsj.apply_masks(params(), masks), masks, 0.75)
    assert int(again["conv"].sum()) == kernel().size // 4
    assert not np.any(np.asarray(again["conv"] & ~masks["conv"]))


@check
def apply_masks():
    masks = {"a": jnp.array([True, False]), "b": jnp.asarray(True)}
    masked = bsj.apply_masks({"a": jnp.ones(2), "b": jnp.ones(3)}, masks)
    assert masked["a"].tolist() == [1, 0]
    assert masked["b"].tolist() == [1, 1, 1]


@check
def random_masks():
    masks = bsj.random_masks(jax.random.key(0), params(), 0.5)
    assert int(masks["conv"].sum()) == 2304
    assert masks["bias"].ndim == 0


@check
def random_channel_layouts():
    layouts = bsj.random_channel_layouts(jax.random.key(0), params(), 0.75)
    assert layouts["conv"].packed_shape == (1, 4, 9, 32)
    assert layouts["bias"] == bsj.Dense()


# Schedules


@check
def every():
    assert [step for step in range(10) if bsj.every(3, until=9)(step)] == [3, 6]


@check
def between():
    assert [step for step in range(10) if bsj.between(2, 7, every=3)(step)] == [2, 5, 7]


@check
def periodic():
    assert bsj.periodic(3, start=1) == bsj.every(3, start=1)


# Methods


@check
def hrbp_prune():
    state = assert_prunes(bsj.hrbp_prune(0.75, group_size=16, block_density=1.0), 0.25)
    assert bsj.get_layouts(state)["conv"].packed_shape == (2, 4, 9, 16)


@check
def rigl():
    state = assert_prunes(bsj.rigl(0.75, update_every=1, until=9), 0.25)
    assert bsj.get_spec(state).method == "rigl"


@check
def set_():
    state = assert_prunes(bsj.set_(0.75, schedule=bsj.every(1)), 0.25)
    assert not bsj.get_spec(state).dense_gradient(1)


@check
def snfs():
    state = assert_prunes(bsj.snfs(0.75, schedule=bsj.every(1, until=9)), 0.25)
    assert bsj.get_spec(state).dense_gradient(0)


@check
def drop_and_grow():
    pattern = bsj.patterns.kernel()
    method = bsj.drop_and_grow(0.75, pattern=pattern, schedule=bsj.every(1), fraction=0.5)
    first = bsj.get_masks(method.init(params()))["conv"]
    _, state = trained(method, steps=2)
    moved = np.asarray(first != bsj.get_masks(state)["conv"])
    assert moved.all((0, 1)).any()
    np.testing.assert_array_equal(moved.all((0, 1)), moved.any((0, 1)))


@check
def gradual():
    method = bsj.gradual(0.75, schedule=bsj.between(0, 2))
    assert [kept(trained(method, steps)[1]) for steps in (0, 1, 2, 3)] == [4608, 4608, 1584, 1152]


@check
def gradual_magnitude():
    assert_prunes(bsj.gradual_magnitude(0.75, start=0, end=1, update_every=1), 0.25, steps=2)


@check
def campfire():
    method = bsj.campfire(0.75, era=(0, 2))
    assert [kept(trained(method, steps)[1]) for steps in (0, 1, 2, 3)] == [
        4608,
        4608,
        4 * 371,
        4 * 288,
    ]


@check
def magnitude():
    state = assert_prunes(bsj.magnitude(0.75), 0.25)
    size = np.abs(kernel())
    np.testing.assert_array_equal(bsj.get_masks(state)["conv"], size >= np.sort(size, None)[3456])


@check
def one_shot():
    scores = {"conv": jnp.arange(4608.0).reshape(SHAPE)}
    state = bsj.one_shot(0.75, scores=scores).init(params())
    np.testing.assert_array_equal(bsj.get_masks(state)["conv"].ravel(), np.arange(4608) >= 3456)


@check
def deep_r():
    _, state = trained(bsj.deep_r(0.75, temperature=1.0), steps=2)
    assert kept(state) == 1152


@check
def dsr():
    _, state = trained(bsj.dsr(0.75, schedule=bsj.every(1), threshold=0.5), steps=2)
    assert kept(state) == 1152


@check
def granet():
    assert_prunes(bsj.granet(0.75, schedule=bsj.between(0, 1)), 0.25, steps=2)


@check
def srigl():
    _, state = trained(bsj.srigl(0.75, schedule=bsj.every(1)), steps=2)
    assert set(bsj.get_masks(state)["conv"].sum((0, 1, 2)).tolist()) == {36}


@check
def mest():
    _, state = trained(bsj.mest(0.75, schedule=bsj.between(1, 4)), steps=2)
    assert kept(state) == 1152


@check
def nest():
    _, state = trained(bsj.nest(0.75, schedule=bsj.between(0, 1), grow_until=0), steps=2)
    assert kept(state) == 1152


@check
def narang():
    assert_prunes(bsj.narang(0.75, schedule=bsj.between(0, 1)), 0.25, steps=2)


@check
def group_lasso():
    assert_prunes(bsj.group_lasso(0.75, schedule=bsj.between(0, 2)), 0.25, steps=3)


@check
def brain_damage():
    assert_prunes(bsj.brain_damage(0.75, schedule=bsj.between(0, 2)), 0.25, steps=3)


@check
def external_masks():
    """All is kept until the loop sets masks; these then mask the gradient, and have a layout."""
    pattern = bsj.patterns.one_by_n(16)
    method, weights = bsj.external_masks(0.75, pattern=pattern), params()
    tx = bsj.sparse(method, optax.sgd(0.1))
    state = tx.init(weights)
    assert kept(state) == kernel().size
    masks = bsj.masks_from_scores(weights, 0.75, pattern=pattern)
    state = bsj.replace_masks(state, masks)
    updates, state = tx.update(weights, state, bsj.apply_masks(weights, masks))
    assert not np.any(np.asarray(updates["conv"])[~np.asarray(masks["conv"])])
    assert bsj.get_layouts(state)["conv"].packed_shape == (2, 4, 9, 16)
    assert not bsj.get_spec(state).changes(3)


@check
def variational_dropout():
    """Masks that the loop sets prune the evaluated network, and every weight trains on."""
    weights = bsj.with_log_variances({"conv": {"kernel": kernel()}})
    tx = bsj.sparse(bsj.variational_dropout(), optax.sgd(0.1))
    masks = {"conv": {"kernel": kernel() > 0, "log_sigma2": True}}
    state = bsj.replace_masks(tx.init(weights), masks)
    updates, state = tx.update(weights, state, weights)
    np.testing.assert_allclose(updates["conv"]["kernel"], -0.1 * kernel(), rtol=1e-6)
    pruned = bsj.masked(weights, state)["conv"]
    np.testing.assert_array_equal(pruned["kernel"], jnp.maximum(kernel(), 0))
    np.testing.assert_array_equal(pruned["log_sigma2"], -10)


@check
def with_log_variances():
    wide = bsj.with_log_variances({"a": {"kernel": kernel(), "bias": jnp.ones(3)}}, initial=-4)
    assert list(wide["a"]) == ["kernel", "bias", "log_sigma2"]
    np.testing.assert_array_equal(wide["a"]["log_sigma2"], np.full(SHAPE, -4))


def certain(rate):
    """Parameters of a log alpha."""
    return {"kernel": jnp.ones(SHAPE), "log_sigma2": jnp.full(SHAPE, rate)}


@check
def variational_dropout_kl():
    assert bsj.variational_dropout_kl(certain(7.9)) < 2 < bsj.variational_dropout_kl(certain(0.0))


@check
def variational_masks():
    params = {"a": certain(3.5), "b": certain(2.5)}
    masks = bsj.variational_masks(params)
    assert not masks["a"]["kernel"].any()
    assert masks["b"]["kernel"].all()


@check
def deep_compression():
    method = bsj.deep_compression(0.75, schedule=bsj.between(0, 1, every=1))
    assert_prunes(method, 0.25, steps=2)


@check
def share_weights():
    shared = bsj.share_weights(params(), conv_bits=3)
    assert np.unique(shared.params["conv"]).size == 8
    assert int(shared.clusters["conv"].max()) == 7


@check
def SharedWeights():
    shared = bsj.share_weights(params(), conv_bits=1)
    assert isinstance(shared, bsj.SharedWeights)
    assert shared._fields == ("params", "clusters")


@check
def shared_weights():
    tx = bsj.shared_weights(optax.sgd(1.0))
    state = bsj.set_clusters(tx.init(params()), {"conv": np.zeros(SHAPE, int), "bias": -1})
    updates, _ = tx.update(params(), state)
    np.testing.assert_allclose(updates["conv"], -np.full(SHAPE, kernel().sum()), rtol=1e-4)
    np.testing.assert_array_equal(updates["bias"], -1)


@check
def set_clusters():
    state = bsj.shared_weights(optax.sgd(1.0)).init(params())
    assert int(state.clusters["conv"].max()) == -1
    state = bsj.set_clusters((state,), {"conv": np.full(SHAPE, 3), "bias": -1})[0]
    assert int(state.clusters["conv"].min()) == 3


@check
def compress():
    compressed = bsj.compress(bsj.share_weights(params(), conv_bits=2).params)
    assert 8 < compressed.rate < 16


@check
def Compressed():
    assert bsj.Compressed(b"1234", {"uncoded": 32}, 320).rate == 10


@check
def decompress():
    decoded = bsj.decompress(bsj.compress(params()).data)
    np.testing.assert_array_equal(decoded["conv"], kernel())


@check
def replace_masks():
    state = bsj.external_masks(0.5).init(params())
    masks = {"conv": kernel() > 0, "bias": True}
    np.testing.assert_array_equal(
        bsj.get_masks(bsj.replace_masks(state, masks))["conv"], masks["conv"]
    )
    with pytest.raises(ValueError, match="masks: expected a bool mask of shape"):
        bsj.replace_masks(state, {"conv": kernel(), "bias": True})
    with pytest.raises(ValueError, match=r"'hrbp.*' draws its own"):
        bsj.replace_masks(bsj.hrbp_prune(0.75, group_size=16).init(params()), masks)


@check
def fixed_masks():
    masks = bsj.random_masks(jax.random.key(0), params(), 0.75)
    state = assert_prunes(bsj.fixed_masks(masks), 0.25)
    np.testing.assert_array_equal(bsj.get_masks(state)["conv"], masks["conv"])


@check
def subp():
    method = bsj.subp(0.75, schedule=bsj.between(0, 1), soft=False)
    state = assert_prunes(method, 0.25, steps=2)
    assert bsj.get_layouts(state)["conv"].packed_shape == (2, 4, 9, 16)


@check
def sr_ste():
    """The weights that the mask removes are pulled towards zero."""
    method = bsj.sr_ste(2, 4, decay=0.5)
    state, zeros = method.init(params()), jax.tree.map(jnp.zeros_like, params())
    updates, state = method.update(zeros, state, params())
    pruned = ~np.asarray(bsj.get_masks(state)["conv"])
    np.testing.assert_allclose(updates["conv"], 0.5 * pruned * np.asarray(kernel()))


@check
def ste():
    method = bsj.ste(2, 4)
    updates, state = method.update(params(), method.init(params()), params())
    np.testing.assert_array_equal(updates["conv"], kernel())
    assert kept(state) == 2304


@check
def keep_zeros():
    tx = bsj.keep_zeros(optax.chain(bsj.magnitude(0.5), optax.adamw(0.1, weight_decay=0.1)))
    updates, state = tx.update(params(), tx.init(params()), params())
    assert bsj.nonzero_pruned(optax.apply_updates(params(), updates), state) == 0


@check
def sparse():
    tx = bsj.sparse(bsj.magnitude(0.5), optax.sgd(0.1))
    updates, _ = tx.update(params(), tx.init(params()), params())
    assert np.mean(optax.apply_updates(params(), updates)["conv"] == 0) == 0.5


# What an optimizer state holds


@check
def SparseState():
    state = bsj.magnitude(0.5).init(params())
    assert isinstance(state, bsj.SparseState)
    assert isinstance(bsj.SparseState(*state), bsj.SparseState)
    assert int(state.count) == 0


@check
def Spec():
    spec = bsj.Spec("half", 0.5, schedule=bsj.every(2))
    assert spec.changes(2)
    assert not spec.changes(3)
    assert not spec.dense_gradient(2)


@check
def get_masks():
    masks = bsj.get_masks(bsj.rigl(0.5, until=9).init(params()))
    assert int(masks["conv"].sum()) == 2304
    assert bool(masks["bias"])


@check
def get_layouts():
    layouts = bsj.get_layouts(bsj.fixed_masks(layouts={"conv": layout()}).init({"conv": kernel()}))
    np.testing.assert_array_equal(layouts["conv"].channels, layout().channels)


@check
def get_spec():
    spec = bsj.get_spec(bsj.rigl(0.5, until=9, update_every=2).init(params()))
    assert [step for step in range(9) if spec.changes(step)] == [2, 4, 6, 8]


@check
def masked():
    state = bsj.ste(1, 2).init(params())
    forward = bsj.masked(params(), state)["conv"]
    assert np.mean(forward == 0) == 0.5
    assert bsj.masked(params(), bsj.magnitude(0.5).init(params()))["conv"] is not None


@check
def summarize():
    state = bsj.magnitude(0.75).init(params())
    summary = bsj.summarize(bsj.apply_masks(params(), bsj.get_masks(state)), state)
    assert summary.density == 0.25
    assert "3x3x16x32" in str(summary)


@check
def sad():
    a, b = {"w": jnp.array([True, False])}, {"w": jnp.array([True, True])}
    assert float(bsj.sad(a, b).total) == 0.5


@check
def metrics__sad():
    a, b = {"w": jnp.array([True, False])}, {"w": jnp.array([False, True])}
    assert float(bsj.metrics.sad(a, b).layers["w"]) == 1.0


@check
def nonzero_pruned():
    state = bsj.magnitude(0.75).init(params())
    assert int(bsj.nonzero_pruned(params(), state)) == 3456
    zeroed = bsj.apply_masks(params(), bsj.get_masks(state))
    assert int(bsj.nonzero_pruned(zeroed, state)) == 0


@check
def metrics__nonzero_pruned():
    nonzero_pruned()


@check
def metrics__density():
    masks = {"w": jnp.array([True, False, False, False]), "b": jnp.asarray(True)}
    assert float(bsj.metrics.density(masks)) == 0.25


@check
def metrics__kept_flops():
    masks = {"a": jnp.array([True, False]), "b": jnp.asarray(True)}
    weights = {"a": jnp.ones(2), "b": jnp.ones(2)}
    assert bsj.metrics.kept_flops(masks, weights, {"a": 9, "b": 1}) == pytest.approx(11 / 20)


@check
def metrics__step_flops():
    assert bsj.metrics.step_flops(2, 10) == 6
    assert bsj.metrics.step_flops(2, 10, dense_gradient=True) == 14


@check
def metrics__training_flops():
    """Two dense steps, one with half of the forward pass, and one of these with all gradients."""
    assert bsj.metrics.training_flops([1.0] * 4) == 1
    kept = [10, 10, 5, 5]
    assert bsj.metrics.training_flops(kept, 10, lambda step: step == 3) == 95 / 120


@check
def metrics__ever_active():
    masks = [{"w": jnp.arange(4) == i, "b": jnp.asarray(True)} for i in (1, 2)]
    assert bsj.metrics.ever_active(*masks)["w"].tolist() == [False, True, True, False]


@check
def metrics__itop():
    masks = [{"w": jnp.arange(4) == i, "b": jnp.asarray(True)} for i in (1, 2)]
    assert [float(bsj.metrics.itop(*some)) for some in (masks[:1], masks)] == [0.25, 0.5]
    assert float(bsj.metrics.itop({"w": jnp.asarray(True)})) == 1


@check
def metrics__Eliminated():
    assert bsj.metrics.Eliminated(inputs=2, weights=3) == (2, 3)


@check
def metrics__eliminated_inputs():
    masks = {"conv": jnp.ones((1, 1, 2, 4), bool).at[..., 1].set(False), "fc": jnp.zeros((8, 3))}
    masks["fc"] = masks["fc"].at[5].set(1) > 0
    assert bsj.metrics.eliminated_inputs(masks, {"fc": "conv"})["fc"] == (2, 3)


# Packing


@check
def pack():
    values = bsj.pack(kernel(), layout())
    filters, channels, taps = (
        index[0, 0] for index in (layout().filters, layout().channels, layout().taps)
    )
    assert values.shape == layout().packed_shape
    assert values[0, 0, 0, 0] == kernel()[taps // 3, taps % 3, channels, filters]


@check
def unpack():
    mask = np.asarray(bsj.layout_to_mask(layout()))
    back = bsj.unpack(bsj.pack(kernel(), layout()), layout())
    np.testing.assert_array_equal(back, np.where(mask, kernel(), 0))


@check
def pack_tree():
    weights, state = trained(bsj.fixed_masks(layouts={"conv": layout(), "bias": bsj.Dense()}))
    values, _ = bsj.pack_tree(weights, state, bsj.get_layouts(state))
    np.testing.assert_array_equal(values["conv"], bsj.pack(weights["conv"], layout()))
    assert values["bias"] is weights["bias"]


@check
def unpack_tree():
    weights, state = trained(bsj.fixed_masks(layouts={"conv": layout(), "bias": bsj.Dense()}))
    layouts = bsj.get_layouts(state)
    back, _ = bsj.unpack_tree(*bsj.pack_tree(weights, state, layouts), layouts)
    np.testing.assert_array_equal(back["conv"], weights["conv"])


# The convolution and its layers


def images():
    return jax.random.normal(jax.random.key(9), (2, 6, 6, 16))


def masked_dense(x, weights):
    weights = jnp.where(bsj.layout_to_mask(layout()), weights, 0)
    return jax.lax.conv_general_dilated(
        x, weights, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"), precision="highest"
    )


def assert_convolves(y, weights):
    np.testing.assert_allclose(y, masked_dense(images(), weights), rtol=1e-4, atol=1e-4)


@check
def conv():
    assert_convolves(bsj.conv(images(), kernel(), layout()), kernel())


def sums_of(z):
    return jnp.stack([z.sum((0, 1, 2)), (z * z).sum((0, 1, 2))])


def normalised(z, shortcut=0.0):
    """Batch norm with scale 2 and bias 1, a shortcut and a ReLU."""
    z = (z - z.mean((0, 1, 2))) / jnp.sqrt(z.var((0, 1, 2)) + 1e-5)
    return jnp.maximum(2 * z + 1 + shortcut, 0)


NORM = (jnp.full(16, 2.0), jnp.ones(16))


@check
def conv_with_sums():
    z, sums = bsj.conv_with_sums(images(), kernel(), layout())
    assert_convolves(z, kernel())
    np.testing.assert_allclose(sums, sums_of(z), rtol=1e-4, atol=1e-3)


@check
def norm_act_conv():
    z, sums = bsj.norm_act_conv(images(), sums_of(images()), *NORM, kernel(), layout())
    np.testing.assert_allclose(z, masked_dense(normalised(images()), kernel()), atol=1e-3)
    np.testing.assert_allclose(sums, sums_of(z), rtol=1e-4, atol=1e-2)


@check
def norm_add_act_conv():
    x, z, sums = bsj.norm_add_act_conv(
        images(), sums_of(images()), *NORM, images(), kernel(), layout()
    )
    np.testing.assert_allclose(x, normalised(images(), images()), atol=1e-4)
    np.testing.assert_allclose(z, masked_dense(x, kernel()), atol=1e-3)
    np.testing.assert_allclose(sums, sums_of(z), rtol=1e-4, atol=1e-2)


@check
def norm_act_apply():
    x = bsj.norm_act_apply(images(), sums_of(images()), *NORM)
    np.testing.assert_allclose(x, normalised(images()), atol=1e-4)


def pending():
    """`relu(norm(images()) + images())`, not computed yet."""
    return bsj.PendingActivations(images(), sums_of(images()), *NORM, images())


@check
def PendingActivations():
    np.testing.assert_allclose(pending().value(), normalised(images(), images()), atol=1e-4)
    assert pending().shape == images().shape


@check
def activations():
    expected = normalised(images(), images())
    np.testing.assert_allclose(bsj.activations(pending()), expected, atol=1e-4)
    assert bsj.activations(expected) is expected


@check
def RawOutput():
    layer = bsj.linen.BlockSparseConv(8, 3)
    y, variables = layer.init_with_output(jax.random.key(0), images(), with_sums=True)
    assert isinstance(y, bsj.RawOutput)
    np.testing.assert_array_equal(y.z, layer.apply(variables, images()))
    np.testing.assert_allclose(y.sums, sums_of(y.z), rtol=1e-4, atol=1e-3)


@check
def max_pool():
    expected = nn.max_pool(images(), (2, 2), strides=(2, 2))
    np.testing.assert_array_equal(bsj.max_pool(images()), expected)


@check
def mean_and_variance():
    mean, variance = bsj.mean_and_variance(sums_of(images()), 2 * 6 * 6)
    np.testing.assert_allclose(mean, images().mean((0, 1, 2)), atol=1e-5)
    np.testing.assert_allclose(variance, images().var((0, 1, 2)), rtol=1e-4)


def assert_normalises(y, x):
    """`y` is the ReLU of x, normalised over all axes but the first."""
    axes = tuple(range(1, x.ndim))
    expected = (x - x.mean(axes, keepdims=True)) / x.std(axes, keepdims=True)
    np.testing.assert_allclose(y, jnp.maximum(expected, 0), rtol=1e-3, atol=1e-4)


@check
def norm_act():
    y, mean, variance = bsj.norm_act(images())
    assert_normalises(y, images())
    np.testing.assert_allclose(mean, images().mean((1, 2, 3)), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(variance, images().var((1, 2, 3)), rtol=1e-4)


@check
def linen__BatchNormAct():
    layer = bsj.linen.BatchNormAct(use_running_average=False, axis=0)
    assert_normalises(layer.init_with_output(jax.random.key(0), images())[0], images())


@check
def nnx__BatchNormAct():
    layer = bsj.nnx.BatchNormAct(images().shape[0], axis=0, rngs=nnx.Rngs(0))
    assert_normalises(layer(images()), images())


@check
def dense_kernel_gradient():
    """The gradient of the sum of one output channel is the sum of what each weight reads."""
    dy = jnp.zeros((2, 6, 6, 32)).at[..., 5].set(1.0)
    gradient = bsj.dense_kernel_gradient(images(), dy, (3, 3))
    np.testing.assert_allclose(gradient[1, 1, :, 5], images().sum((0, 1, 2)), rtol=1e-4, atol=1e-4)
    assert not np.any(gradient[..., 6])


@check
def available_implementations():
    assert bsj.available_implementations()["xla"] is None
    assert bsj.available_implementations()["dense"] is None


@check
def choose_implementation():
    choice = bsj.choose_implementation(images(), layout())
    assert bsj.available_implementations()[choice.implementation] is None


@check
def linen__BlockSparseConv():
    layer = bsj.linen.BlockSparseConv(32, (3, 3), use_bias=False)
    variables = {"params": {"kernel": kernel()}, "layouts": {"kernel": layout()}}
    assert_convolves(layer.apply(variables, images()), kernel())


def dense_layout():
    mask = jnp.zeros((16, 32), bool).at[:8, :16].set(True).at[8:, 16:].set(True)
    return bsj.mask_to_layout(mask)


def assert_multiplies(y, weights):
    expected = images() @ jnp.where(bsj.layout_to_mask(dense_layout()), weights, 0)
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-4)


@check
def linen__BlockSparseLinear():
    layer, weights = bsj.linen.BlockSparseLinear(32, use_bias=False), kernel(shape=(16, 32))
    variables = {"params": {"kernel": weights}, "layouts": {"kernel": dense_layout()}}
    assert_multiplies(layer.apply(variables, images()), weights)


@check
def linen__use_layouts():
    with bsj.linen.use_layouts({"kernel": layout()}) as executions:
        y = nn.Conv(32, (3, 3), use_bias=False).apply({"params": {"kernel": kernel()}}, images())
    assert executions == {"kernel": "block-sparse"}
    assert_convolves(y, kernel())


@check
def linen__use_variational_dropout():
    params = bsj.with_log_variances({"kernel": kernel()})
    layer = nn.Conv(32, (3, 3), use_bias=False)
    with bsj.linen.use_variational_dropout(jax.random.key(0)):
        noisy = layer.apply({"params": params}, images())
    difference = noisy - layer.apply({"params": params}, images())
    assert 0 < float(jnp.abs(difference).max()) < 1


@check
def linen__VariationalConv():
    layer = bsj.linen.VariationalConv(32, (3, 3), use_bias=False, deterministic=True)
    noise = jnp.where(kernel() > 0, -30.0, 20.0)  # keeps the weights above zero
    y = layer.apply({"params": {"kernel": kernel(), "log_sigma2": noise}}, images())
    kept = {"params": {"kernel": jnp.maximum(kernel(), 0)}}
    expected = nn.Conv(32, (3, 3), use_bias=False).apply(kept, images())
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-4)


@check
def linen__VariationalDense():
    layer, weights = bsj.linen.VariationalDense(32, use_bias=False), kernel(shape=(16, 32))
    params = {"params": {"kernel": weights, "log_sigma2": jnp.where(weights > 0, -30.0, 20.0)}}
    y = layer.apply(params, images(), deterministic=True)
    np.testing.assert_allclose(y, images() @ jnp.maximum(weights, 0), rtol=1e-4, atol=1e-4)


def assert_keeps_what_is_certain(layer, expected):
    weights = layer.kernel[...]
    layer.log_sigma2[...] = jnp.where(weights > 0, -30.0, 20.0)
    layer.eval()
    y = layer(images())
    np.testing.assert_allclose(y, expected(jnp.maximum(weights, 0)), rtol=1e-4, atol=1e-4)
    layer.train()
    assert not np.array_equal(layer(images()), layer(images()))


@check
def nnx__VariationalConv():
    layer = bsj.nnx.VariationalConv(16, 32, (3, 3), use_bias=False, rngs=nnx.Rngs(0))
    plain = nn.Conv(32, (3, 3), use_bias=False)
    assert_keeps_what_is_certain(
        layer, lambda weights: plain.apply({"params": {"kernel": weights}}, images())
    )


@check
def nnx__VariationalDense():
    layer = bsj.nnx.VariationalDense(16, 32, use_bias=False, rngs=nnx.Rngs(0))
    assert_keeps_what_is_certain(layer, lambda weights: images() @ weights)


@check
def nnx__BlockSparseLinear():
    layer = bsj.nnx.BlockSparseLinear(16, 32, use_bias=False, rngs=nnx.Rngs(0))
    bsj.nnx.set_layouts(layer, {"kernel": dense_layout()})
    assert_multiplies(layer(images()), layer.kernel[...])


@check
def nnx__sparsify():
    layer = nnx.Conv(16, 32, (3, 3), use_bias=False, rngs=nnx.Rngs(0))
    assert bsj.nnx.sparsify(layer) is layer
    bsj.nnx.set_layouts(layer, {"kernel": layout()})
    assert_convolves(layer(images()), layer.kernel[...])


@check
def nnx__executions():
    assert bsj.nnx.executions(sparse_layer()) == {"kernel": "block-sparse"}


@check
def cancel_transposes():
    def rows_last_and_back(x):
        return jnp.sin(x.transpose(3, 1, 2, 0)).transpose(3, 1, 2, 0)

    moved = bsj.cancel_transposes(rows_last_and_back)
    np.testing.assert_allclose(moved(images()), jnp.sin(images()), rtol=1e-6)
    assert "transpose" in str(jax.make_jaxpr(rows_last_and_back)(images()))
    assert "transpose" not in str(jax.make_jaxpr(moved)(images()))


def sparse_layer():
    layer = bsj.nnx.BlockSparseConv(16, 32, 3, use_bias=False, rngs=nnx.Rngs(0))
    bsj.nnx.set_layouts(layer, {"kernel": layout()})
    return layer


@check
def nnx__BlockSparseConv():
    layer = sparse_layer()
    assert_convolves(layer(images()), layer.kernel[...])


@check
def nnx__set_layouts():
    np.testing.assert_array_equal(sparse_layer().layout.get_value().channels, layout().channels)


@check
def nnx__Optimizer():
    layer = nnx.Conv(16, 32, (3, 3), rngs=nnx.Rngs(0))
    tx = bsj.sparse(bsj.magnitude(0.75), optax.sgd(0.1))
    optimizer = bsj.nnx.Optimizer(layer, tx, wrt=nnx.Param)
    optimizer.update(layer, nnx.grad(lambda model: (model(images()) ** 2).sum())(layer))
    assert np.mean(layer.kernel[...] != 0) == 0.25


# Patterns


def mask_by(pattern, sparsity=0.75):
    return np.asarray(
        bsj.masks_from_scores({"conv": jnp.abs(kernel())}, sparsity, pattern=pattern)["conv"]
    )


@check
def patterns__unstructured():
    assert mask_by(bsj.patterns.unstructured()).sum() == 1152


@check
def patterns__kernel():
    mask = mask_by(bsj.patterns.kernel())
    np.testing.assert_array_equal(mask.any((0, 1)), mask.all((0, 1)))
    assert mask.sum() == 1152


@check
def patterns__fan_in():
    assert set(mask_by(bsj.patterns.fan_in()).sum((0, 1, 2)).tolist()) == {36}


@check
def patterns__channel_tap():
    mask = mask_by(bsj.patterns.channel_tap(), 0.5)
    assert (mask.any(-1) == mask.all(-1)).all()


@check
def patterns__window():
    mask = mask_by(bsj.patterns.window(), 2 / 3)
    assert (mask.sum((0, 1)) == 3).all()


@check
def patterns__vector():
    mask = mask_by(bsj.patterns.vector(), 2 / 3)
    np.testing.assert_array_equal(mask.any(1), mask.all(1))
    assert mask.any(1).sum() == 16 * 32


@check
def patterns__one_by_n():
    mask = mask_by(bsj.patterns.one_by_n(8)).reshape(9, 16, 4, 8)
    np.testing.assert_array_equal(mask.any((0, 3)), mask.all((0, 3)))
    assert (mask.any((0, 3)).sum(0) == 4).all()


@check
def linear():
    """The product with the kept weights alone."""
    weights = jax.random.normal(jax.random.key(0), (16, 32))
    layouts = bsj.layouts_from_scores(
        jnp.abs(weights), 0.5, pattern=bsj.patterns.one_by_n(8), where=lambda name, leaf: True
    )
    x = jax.random.normal(jax.random.key(1), (5, 16))
    expected = x @ jnp.where(bsj.layout_to_mask(layouts), weights, 0)
    np.testing.assert_allclose(bsj.linear(x, weights, layouts), expected, rtol=1e-5, atol=1e-5)


@check
def patterns__channel():
    mask = mask_by(bsj.patterns.channel("output"))
    assert sorted(set(mask.sum((0, 1, 2)))) == [0, 9 * 16]
    assert mask.any((0, 1, 2)).sum() == 8


@check
def patterns__n_of_m():
    mask = mask_by(bsj.patterns.n_of_m(1, 4), None)
    assert (mask.reshape(9, 4, 4, 32).sum(2) == 1).all()


@check
def patterns__block():
    mask = mask_by(bsj.patterns.block(group_size=16, block_density=1.0))
    assert bsj.mask_to_layout(jnp.asarray(mask)).density == 0.25


@check
def patterns__Kept():
    scores = jnp.abs(kernel())
    pattern = bsj.patterns.one_by_n(8)
    one = pattern.draw(scores, 4)
    assert isinstance(one, bsj.patterns.Kept)
    assert isinstance(bsj.patterns.Kept(*one), bsj.patterns.Kept)
    np.testing.assert_array_equal(one.mask, bsj.layout_to_mask(one.layout))


@check
def patterns__Pattern():
    pattern = bsj.patterns.kernel()
    assert isinstance(pattern, bsj.patterns.Pattern)
    assert pattern.sparsity(0.75) == 0.75
    units = pattern.units(SHAPE)
    assert units.rows * units.sets * units.weights == kernel().size
    with pytest.raises(TypeError, match="abstract"):
        bsj.patterns.Pattern()


# The frame of the methods


def half(chosen):
    """Keeps the first half of the filters of every leaf."""
    masks = {
        name: jnp.arange(leaf.shape[-1]) < leaf.shape[-1] // 2 for name, leaf in chosen.items()
    }
    return {
        name: bsj.patterns.Kept(jnp.broadcast_to(mask, chosen[name].shape), bsj.Dense())
        for name, mask in masks.items()
    }


@check
def transforms__sparse_transformation():
    method = bsj.transforms.sparse_transformation(bsj.Spec("half", 0.5), draw=half)
    assert_prunes(method, 0.5)


@check
def transforms__draw():
    """The largest weights of every layer, in blocks that the layouts name."""
    pattern, scores = bsj.patterns.block(group_size=16), {"conv": jnp.abs(kernel())}
    for name, kept in bsj.transforms.draw(pattern, scores, 0.75, "uniform").items():
        np.testing.assert_array_equal(kept.mask, bsj.layout_to_mask(kept.layout))
        density = float(kept.mask.mean())
        assert abs(density - 0.25) < 0.02
        assert float((scores[name] * kept.mask).sum() / scores[name].sum()) > density


@check
def transforms__Kept():
    """A method without a layout keeps what its mask says."""
    mask = kernel() > 0

    def draw(weights):
        return {name: bsj.transforms.Kept(mask, bsj.Dense()) for name in weights}

    method = bsj.transforms.sparse_transformation(bsj.Spec("positive", 0.5), draw=draw)
    np.testing.assert_array_equal(bsj.get_masks(method.init(params()))["conv"], mask)


@check
def transforms__Leaf():
    """A new method whose penalty sees a leaf: it pulls weights towards zero."""

    def pull(name, leaf):
        assert name == "conv"
        assert isinstance(leaf, bsj.transforms.Leaf)
        assert isinstance(bsj.transforms.Leaf(*leaf), bsj.transforms.Leaf)
        return 2 * leaf.weights

    spec = bsj.Spec("half", 0.5)
    method = bsj.transforms.sparse_transformation(spec, draw=half, penalty=pull)
    zeros = jax.tree.map(jnp.zeros_like, params())
    updates, _ = method.update(zeros, method.init(params()), params())
    np.testing.assert_allclose(updates["conv"][..., :16], 2 * kernel()[..., :16])
    assert not np.any(updates["conv"][..., 16:])


@check
def transforms__Step():
    """A new method that counts updates and reads an extra argument."""

    def remember(step, leaf):
        assert isinstance(bsj.transforms.Step(*step), bsj.transforms.Step)
        return leaf.memory + step.count + step.extra["loss"]

    spec = bsj.Spec("half", 0.5)
    method = bsj.transforms.sparse_transformation(spec, draw=half, remember=remember)
    state = method.init(params())
    for _ in range(3):
        _, state = method.update(params(), state, params(), loss=1.0)
    assert np.all(np.asarray(state.memory["conv"]) == 0 + 1 + 2 + 3)
