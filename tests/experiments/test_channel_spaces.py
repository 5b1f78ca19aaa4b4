"""Channel spaces of the zoo: networks compute the same function with their channels reordered,
training starts with an order, and the benchmark of orders writes its table.
"""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from sparse_methods import slow_unless

import blocksparse_jax as bsj
from blocksparse_jax import tree
from blocksparse_jax.grouping.channel_spaces import (
    channel_orders,
    checked_spaces,
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


@pytest.mark.parametrize(
    "name", [slow_unless(name in ("cnn", "resnet20", "mobilenet_v1"), name) for name in SMALL]
)
def test_a_folded_network_is_the_same_function(name):
    model, variables, images = variables_of(name, **SMALL[name])
    params, stats = variables["params"], variables["batch_stats"]
    spaces = channel_spaces(params)
    sizes = checked_spaces(spaces, [params, stats])
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
    orders = shuffled(spaces, checked_spaces(spaces, [params, stats]))

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
    # There are no batch statistics here.
    in_params = {path_name(path) for path, _ in jax.tree.leaves_with_path(params)}
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
    assert kept[1] > 1.001 * kept[0], "random weights gain little, but they gain"
    assert {
        layout.channel_block
        for layout in jax.tree.leaves(ordered.layouts, is_leaf=bsj.is_layout)
        if layout != bsj.Dense()
    } == {16}
    for wrong in ({"channel_block": 1}, {"scores": "random"}):
        options = Hrbp(**{"channel_block": 8, "channel_order": True} | wrong)
        with pytest.raises(ValueError, match="channel_order: it serves runs of channels"):
            resolve(TrainConfig(model="cnn", sparsity=0.9, options=options))


def test_another_network_than_those_of_the_zoo_is_refused():
    with pytest.raises(ValueError, match="those of a network of the zoo"):
        channel_spaces({"a": jnp.ones((3, 3, 3, 8)), "b": jnp.ones((3, 3, 8, 16))})


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
