"""Channel orders: laws of the search, kept score against all orders by brute force, and networks
that stay the same function.
"""

import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

import blocksparse_jax as bsj
from blocksparse_jax import tree
from blocksparse_jax.grouping import channel_order as module
from blocksparse_jax.grouping.channel_order import Consumer, channel_order, run_ratio
from blocksparse_jax.grouping.channel_spaces import (
    _checked,
    channel_orders,
    fold_channel_orders,
    space_consumers,
)
from blocksparse_jax.tree import conv_kernels, path_name
from experiments.bench import channel_blocks
from experiments.models import create, names
from experiments.models.spaces import channel_spaces
from experiments.reporting import tables
from experiments.training.config import TrainConfig, resolve
from experiments.training.length import Length
from experiments.training.loop import Trainer
from experiments.training.methods import Hrbp

# shape, group_size, kept, kept_taps, channel_block
CASES = [((1, 1, 8, 8), 4, 4, 1, 2), ((3, 3, 16, 16), 8, 8, 3, 4)]


def draw(kind, shape, seed):
    rng = np.random.default_rng(seed)
    noise = np.abs(rng.normal(size=shape)).astype(np.float32)
    if kind == "clusters":  # of channels and of filters, shuffled
        factors = rng.exponential(size=(3, 4)) ** 2
        noise *= factors[
            rng.integers(0, 3, shape[2])[:, None], rng.integers(0, 4, shape[3])
        ].astype(np.float32)
    return {
        "iid": noise,
        "heavy": noise**4,
        "clusters": noise,
        "equal": noise * 0 + 1,
        "zero": noise * 0,
    }[kind]


def planted(shape, group_size, block, seed):
    """Every group of filters wants runs of its own; channels and filters shuffled."""
    rng = np.random.default_rng(seed)
    cin, cout = shape[2:]
    groups, runs = cout // group_size, cin // block
    each = 16 // block
    wants = np.stack(
        [
            np.isin(np.arange(runs), np.arange(each * g, each * (g + 1)) % runs)
            for g in range(groups)
        ],
        1,
    )
    scores = 0.01 + wants[np.arange(cin) // block][:, np.arange(cout) // group_size]
    shuffled = scores[rng.permutation(cin)][:, rng.permutation(cout)]
    return np.broadcast_to(shuffled, shape).astype(np.float32), 16


@settings(max_examples=15, deadline=None)
@given(
    case=st.sampled_from(CASES),
    kind=st.sampled_from(["iid", "heavy", "clusters", "equal", "zero"]),
    seed=st.integers(0, 2**16),
)
def test_an_order_is_a_permutation_the_same_each_time_and_never_worse_than_none(case, kind, seed):
    shape, group_size, kept, kept_taps, block = case
    consumers = [
        Consumer(draw(kind, shape, seed + i), group_size, kept, kept_taps)
        for i in range(1 + seed % 2)
    ]
    order = channel_order(consumers, channel_block=block)
    assert np.array_equal(np.sort(order), np.arange(shape[2]))
    assert np.array_equal(order, channel_order(consumers, channel_block=block))
    ratio = run_ratio(consumers, order, channel_block=block)
    assert ratio.ordered >= ratio.unordered
    runs = order.reshape(-1, block)
    assert (np.diff(runs, axis=1) > 0).all()
    assert (np.diff(runs[:, 0]) > 0).all()


def partitions(items, block):
    """All ways to cut the items into runs."""
    if not items:
        yield []
        return
    for rest in itertools.combinations(items[1:], block - 1):
        run = [items[0], *rest]
        for others in partitions([i for i in items if i not in run], block):
            yield run + others


@pytest.mark.parametrize("kind", ["iid", "heavy", "clusters"])
def test_against_every_order_of_eight_channels(kind):
    every = [np.array(p) for p in partitions(list(range(8)), 2)]
    assert len(every) == 105
    group = jax.jit(
        jax.vmap(
            lambda s: bsj.kept_score(
                s, bsj.hrbp_groups(s, group_size=4, kept=4, kept_taps=1, channel_block=2)
            )
        )
    )
    lost = []
    for seed in range(12):
        scores = draw(kind, (1, 1, 8, 8), seed)
        best = float(group(jnp.stack([scores[:, :, order] for order in every])).max())
        order = channel_order([Consumer(scores, 4, 4, 1)], channel_block=2)
        kept = float(group(jnp.asarray(scores[:, :, order])[None])[0])
        assert kept <= best * (1 + 1e-5)
        lost.append(1 - kept / best)
    assert np.mean(lost) < 0.01
    assert np.max(lost) < 0.05


@pytest.mark.parametrize("block", [4, 8])
def test_planted_runs_are_found(block):
    scores, kept = planted((1, 1, 64, 64), 16, block, seed=block)
    consumers = [Consumer(scores, 16, kept, 1)]
    ratio = run_ratio(consumers, channel_order(consumers, channel_block=block), channel_block=block)
    assert ratio.ordered == pytest.approx(1, abs=1e-5)
    assert ratio.unordered < 0.7


def test_every_consumer_of_a_space_counts_by_its_score():
    strong, kept = planted((1, 1, 64, 64), 16, 8, seed=0)
    other, _ = planted((1, 1, 64, 64), 16, 8, seed=1)
    alone = channel_order([Consumer(strong, 16, kept, 1)], channel_block=8)
    both = channel_order(
        [Consumer(other * 1e-5, 16, kept, 1), Consumer(strong, 16, kept, 1)], channel_block=8
    )
    assert run_ratio(
        [Consumer(strong, 16, kept, 1)], both, channel_block=8
    ).ordered == pytest.approx(1, abs=1e-4)
    assert np.array_equal(
        alone,
        channel_order(
            [Consumer(strong, 16, kept, 1), Consumer(strong * 0, 16, kept, 1)], channel_block=8
        ),
    )
    agreeing = [Consumer(strong, 16, kept, 1), Consumer(strong[..., ::-1], 16, kept, 1)]
    assert run_ratio(
        agreeing, channel_order(agreeing, channel_block=8), channel_block=8
    ).ordered == pytest.approx(1, abs=1e-5)


def test_iid_scores_lose_something_and_half_of_the_loss_is_won_back():
    consumers = [Consumer(draw("iid", (1, 1, 64, 64), 0), 16, 16, 1)]
    ratio = run_ratio(consumers, channel_order(consumers, channel_block=8), channel_block=8)
    assert ratio.unordered < (1 + ratio.unordered) / 2 < ratio.ordered < 1.01


@settings(max_examples=50, deadline=None)
@given(runs=st.integers(1, 6), block=st.integers(1, 5), seed=st.integers(0, 2**16))
def test_exchanges_keep_runs_full_and_gain(runs, block, seed):
    rng = np.random.default_rng(seed)
    benefit, owner = (
        rng.normal(size=(runs * block, runs)),
        rng.permutation(np.repeat(np.arange(runs), block)),
    )
    better, every = module._exchange(benefit, owner, 50), np.arange(runs * block)
    assert (np.bincount(better, minlength=runs) == block).all()
    values = [benefit[every, o].sum() for o in (owner, better)]
    assert values[1] >= values[0]
    for a, b in itertools.combinations(every, 2):  # no exchange of two channels is left that gains
        assert (
            benefit[a, better[b]] + benefit[b, better[a]]
            <= benefit[a, better[a]] + benefit[b, better[b]] + 1e-5
        )


def test_corrupted_scores_still_give_an_order():
    scores = draw("iid", (3, 3, 16, 16), 0)
    scores[0, 0, 3, :], scores[1, 1, :, 2] = np.nan, np.inf
    assert np.array_equal(
        np.sort(channel_order([Consumer(scores, 8, 8, 3)], channel_block=4)), np.arange(16)
    )


def test_one_channel_in_a_run_and_all_channels_kept_need_no_order():
    scores = draw("clusters", (1, 1, 8, 8), 0)
    for kept, block in ((4, 1), (8, 4)):
        assert channel_order([Consumer(scores, 4, kept, 1)], channel_block=block).tolist() == list(
            range(8)
        )


# --- the zoo ---

SMALL = {
    "cnn": {"width": 0.25},
    "resnet20": {},
    "vgg19": {"width": 0.125},
    "resnet50": {"width": 0.125},
    "mobilenet_v1": {"width": 0.25},
}


def variables_of(name, *, size=16, channels=3, **options):
    """Random parameters and statistics: no norm is the identity, no two channels are alike."""
    model = create(name, num_classes=10, **options)
    images = jax.random.normal(jax.random.key(1), (2, size, size, channels))
    shapes = jax.eval_shape(model.init, jax.random.key(0), images)
    rng = np.random.default_rng(0)

    def values(path, leaf):
        array = rng.normal(size=leaf.shape).astype(np.float32)
        if leaf.ndim > 1:
            return jnp.asarray(array / np.sqrt(np.prod(leaf.shape[:-1])))
        return jnp.asarray(np.abs(array) + 0.5 if path_name(path).endswith("var") else array)

    return model, jax.tree.map_with_path(values, shapes), images


def shuffled(spaces, sizes, seed=3):
    rng = np.random.default_rng(seed)
    return {space: rng.permutation(sizes[space]) for space in spaces}


@pytest.mark.parametrize("name", SMALL)
def test_a_folded_network_is_the_same_function(name):
    model, variables, images = variables_of(name, **SMALL[name])
    params, stats = variables["params"], variables["batch_stats"]
    spaces = channel_spaces(params)
    sizes = _checked(spaces, [params, stats])
    orders = shuffled(spaces, sizes)
    moved, moved_stats = fold_channel_orders(spaces, orders, params, stats)
    logits = jax.jit(model.apply)
    expected = logits({"params": params, "batch_stats": stats}, images)
    np.testing.assert_allclose(
        logits({"params": moved, "batch_stats": moved_stats}, images),
        expected,
        atol=2e-4 * np.abs(expected).max(),
    )
    assert not np.allclose(
        logits({"params": moved, "batch_stats": stats}, images),
        expected,
        atol=0.05 * np.abs(expected).max(),
    )
    back = fold_channel_orders(
        spaces, {space: np.argsort(order) for space, order in orders.items()}, moved, moved_stats
    )
    assert jax.tree.all(jax.tree.map(np.array_equal, back, (params, stats)))


@pytest.mark.parametrize("name", names())
def test_the_spaces_name_every_axis_of_channels_once(name):
    model, images = create(name, num_classes=10), jnp.ones((1, 16, 16, 3))
    variables = jax.eval_shape(model.init, jax.random.key(0), images)
    spaces = channel_spaces(variables["params"])
    listed = [entry for entries in spaces.values() for entry in entries]
    expected = []
    for path, leaf in jax.tree.leaves_with_path((variables["params"], variables["batch_stats"])):
        leaf_name = path_name(path).split("/", 1)[1]
        if leaf_name == "classifier/bias":
            continue  # logits
        axes = [0] if leaf.ndim < 4 else [3] if leaf.shape[2] in (1, 3) else [2, 3]
        expected += [(leaf_name, axis) for axis in axes]
    assert sorted(listed) == sorted(expected)


def test_training_commutes_with_folding():
    model, variables, images = variables_of("cnn", size=8, channels=1, width=0.25)
    params, stats = variables["params"], variables["batch_stats"]
    spaces = channel_spaces(params)
    orders = shuffled(spaces, _checked(spaces, [params, stats]))

    @jax.jit
    def gradient(params, stats):
        def loss(params):
            logits, _ = model.apply(
                {"params": params, "batch_stats": stats},
                images,
                train=True,
                mutable=["batch_stats"],
            )
            return optax.softmax_cross_entropy_with_integer_labels(logits, jnp.array([1, 7])).mean()

        return jax.grad(loss)(params)

    expected, _ = fold_channel_orders(spaces, orders, gradient(params, stats), stats)
    actual = gradient(*fold_channel_orders(spaces, orders, params, stats))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4 * np.abs(b).max() + 1e-6),
        actual,
        expected,
    )


def clustered_cnn():
    return jax.tree.map(jnp.asarray, channel_blocks.draw("cnn:clustered", 0))


@pytest.mark.slow
def test_hrbp_keeps_more_of_a_folded_network():
    params = clustered_cnn()
    in_params = {
        path_name(path) for path, _ in jax.tree.leaves_with_path(params)
    }  # this test has no statistics
    spaces = {
        space: [entry for entry in entries if entry[0] in in_params]
        for space, entries in channel_spaces(params).items()
    }
    orders = channel_orders(params, spaces, 0.9, channel_block=16)
    assert set(orders) == {"stem", "conv1", "conv2"}  # nobody sparse reads conv3
    kept = []
    for weights in (params, *fold_channel_orders(spaces, orders, params)):
        state = bsj.hrbp_prune(0.9, channel_block=16).init(weights)
        masks, layouts = bsj.get_masks(state), bsj.get_layouts(state)
        kept.append(
            sum(
                float(jnp.abs(weights[name]["kernel"] * masks[name]["kernel"]).sum())
                for name in ("conv1", "conv2", "conv3")
            )
        )
        for named in space_consumers(params, spaces, 0.9, channel_block=16).values():
            for name, consumer in named.items():
                layout = layouts[name.split("/")[0]]["kernel"]
                sizes = (consumer.group_size, consumer.kept, consumer.kept_taps)
                assert sizes == (
                    layout.filters.shape[1],
                    layout.channels.shape[1],
                    layout.taps.shape[1],
                )
                assert layout.channel_block == 16
    assert kept[1] > 1.15 * kept[0]


def test_a_run_orders_its_channels_before_training():
    def start(**options):
        hrbp = Hrbp(channel_block=16, **options)
        config = resolve(TrainConfig(model="cnn", execution="sparse", sparsity=0.9, options=hrbp))
        return Trainer(config, (8, 8, 1), 10, Length(4, 8)).init()

    plain, ordered = start(), start(channel_order=True)
    kept = [
        sum(float(jnp.abs(leaf).sum()) for leaf in tree.choose(None, state.params).values())
        for state in (plain, ordered)
    ]
    assert kept[1] > 1.001 * kept[0]  # random weights gain little
    assert {
        layout.channel_block
        for layout in jax.tree.leaves(ordered.layouts, is_leaf=bsj.is_layout)
        if layout != bsj.Dense()
    } == {16}
    for wrong in ({"channel_block": 1}, {"scores": "random"}):
        with pytest.raises(ValueError, match="channel_order: it serves runs of channels"):
            Hrbp(**{"channel_block": 8, "channel_order": True} | wrong).check()


def test_a_user_network_of_nnx_folds_by_its_own_names():
    class Net(nnx.Module):
        def __init__(self, rngs):
            self.first, self.norm = nnx.Conv(3, 8, (3, 3), rngs=rngs), nnx.BatchNorm(8, rngs=rngs)
            self.second = nnx.Conv(8, 4, (3, 3), rngs=rngs)

        def __call__(self, x):
            return self.second(nnx.relu(self.norm(self.first(x), use_running_average=True)))

    net, x = Net(nnx.Rngs(0)), jax.random.normal(jax.random.key(0), (2, 6, 6, 3))
    net.first.bias[...] = net.norm.mean[...] = net.norm.scale[...] = jnp.arange(8.0)
    before, graph, state = net(x), *nnx.split(net)
    hidden = [
        ("first/kernel", -1),
        ("first/bias", 0),
        ("second/kernel", -2),
        *((f"norm/{n}", 0) for n in ("scale", "bias", "mean", "var")),
    ]
    (state,) = fold_channel_orders({"hidden": hidden}, {"hidden": np.roll(np.arange(8), 3)}, state)
    folded = nnx.merge(graph, state)
    np.testing.assert_allclose(folded(x), before, atol=1e-4)
    assert folded.norm.mean[...].tolist() == [5, 6, 7, 0, 1, 2, 3, 4]


def test_errors_name_the_argument_and_the_fix():
    params = {"a": jnp.ones((3, 3, 3, 8)), "b": jnp.ones((3, 3, 8, 16))}
    good, order = {"s": [("a", 3), ("b", 2)]}, np.arange(8)
    for spaces, orders, message in [
        ({"s": [("a", 3), ("c", 2)]}, {}, r"spaces\['s'\]: no tree has a leaf 'c'"),
        ({"s": [("a", 3), ("b", 4)]}, {}, r"axis 4 of 'b' is out of range"),
        ({"s": [("a", 3), ("b", 3)]}, {}, r"has 16 channels, expected 8"),
        ({"s": [("a", 3)], "t": [("a", -1)]}, {}, r"is in 's' too"),
        (good, {"x": order}, r"orders: 'x' is no channel space"),
        (good, {"s": np.arange(7)}, r"orders\['s'\]: expected a permutation of 0..7"),
        (good, {"s": np.zeros(8, int)}, r"expected a permutation"),
    ]:
        with pytest.raises(ValueError, match=message):
            fold_channel_orders(spaces, orders, params)
    for kind in ("gradient", "random"):
        with pytest.raises(
            ValueError, match=f"scores: expected 'magnitude' or a tree of arrays, got '{kind}'"
        ):
            channel_orders(params, good, 0.5, channel_block=4, scores=kind)
    consumer = Consumer(np.ones((1, 1, 8, 8), np.float32), 4, 4, 1)
    with pytest.raises(ValueError, match="consumers: expected at least one"):
        channel_order([], channel_block=2)
    with pytest.raises(ValueError, match="same input channels"):
        channel_order([consumer, Consumer(np.ones((1, 1, 4, 8)), 4, 4, 1)], channel_block=2)
    with pytest.raises(ValueError, match="channel_block: 3 must divide"):
        channel_order([consumer], channel_block=3)
    with pytest.raises(ValueError, match="order: expected a permutation"):
        run_ratio([consumer], np.zeros(8), channel_block=2)
    with pytest.raises(ValueError, match="those of a network of the zoo"):
        channel_spaces(params)


def test_the_command_writes_its_table(tmp_path, capsys):
    config = channel_blocks.Config(
        networks=("cnn:clustered",),
        channel_blocks=(16,),
        sparsities=(0.9,),
        out=str(tmp_path / "channel_blocks.json"),
    )
    report = channel_blocks.main(config)
    assert json.loads((tmp_path / "channel_blocks.json").read_text()) == json.loads(
        json.dumps(report)
    )
    (row,) = report["rows"]
    assert row["chance"] < row["unordered"] < row["worst"] <= row["ordered"] < 1.05
    ordered, unordered, chance = (f"{row[name]:.3f}" for name in ("ordered", "unordered", "chance"))
    assert ordered in capsys.readouterr().out
    report["rows"].append(row | {"channel_block": 32, "sparsity": 0.8})
    (tmp_path / "channel_blocks.json").write_text(json.dumps(report))
    text = tables.table("channel_blocks", tmp_path)
    assert f"| cnn, clustered weights | 16 | — | **{ordered}** ({unordered}, {chance}) |" in text
    assert f"| cnn, clustered weights | 32 | **{ordered}** ({unordered}, {chance}) | — |" in text
    with pytest.raises(ValueError, match="networks: expected"):
        channel_blocks.draw("vgg19:trained", 1)


def test_the_sparse_layers_of_the_zoo_are_read_through_a_space():
    variables = jax.eval_shape(
        create("resnet50", num_classes=10).init, jax.random.key(0), jnp.ones((1, 16, 16, 3))
    )
    sparse = [
        n
        for path, leaf in jax.tree.leaves_with_path(variables["params"])
        if conv_kernels(n := path_name(path), leaf)
    ]
    read = [
        name
        for entries in channel_spaces(variables["params"]).values()
        for name, axis in entries
        if axis == 2
    ]
    assert sorted(sparse) == sorted(read)
