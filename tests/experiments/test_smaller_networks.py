"""Networks of the zoo with channels removed: the smaller network computes the same function, and
runs that remove channels report it and resume.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sparse_methods import slow_unless
from tiny_runs import PER_EPOCH, assert_same_run, config

import blocksparse_jax as bsj
from blocksparse_jax.tree import path_name
from experiments import attack, evaluate
from experiments.models import create, widths_of
from experiments.models.spaces import channel_spaces, inner_spaces, with_branch_factors
from experiments.training import execution, network_size
from experiments.training.methods.channels import largest_for
from experiments.training.run import Run

# The shallow ResNets have shortcuts with and without a convolution.
NETWORKS = {
    "cnn": {"width": 0.25},
    "resnet20": {"blocks": (2, 1, 1)},
    "resnet50": {"width": 0.125, "blocks": (2, 1, 1, 1)},
    "vgg19": {"width": 0.125},
    "mobilenet_v1": {"width": 0.25},
}


def network(name, *, widths=None, blocks=None, **options):
    model = create(name, num_classes=10, widths=widths, **options)
    return model if blocks is None else model.clone(blocks=blocks)


def random_variables(model, images):
    """No norm is the identity, no two channels are alike."""
    shapes = jax.eval_shape(model.init, jax.random.key(0), images)
    rng = np.random.default_rng(0)

    def values(path, leaf):
        array = rng.normal(size=leaf.shape).astype(np.float32)
        if leaf.ndim > 1:
            return jnp.asarray(array / np.sqrt(np.prod(leaf.shape[:-1])))
        return jnp.asarray(np.abs(array) + 0.5 if path_name(path).endswith("var") else array)

    return jax.tree.map_with_path(values, shapes)


def kept_channels(params):
    """About two thirds of each space, a number that no other space has by chance."""
    spaces, sizes, rng = channel_spaces(params), {}, np.random.default_rng(1)
    leaves = {path_name(path): leaf for path, leaf in jax.tree.leaves_with_path(params)}
    for space, ((name, axis), *_) in spaces.items():
        sizes[space] = leaves[name].shape[axis]
    return spaces, {
        space: np.arange(n) == rng.integers(n) if n < 3 else rng.permutation(n) < -(-2 * n // 3)
        for space, n in sizes.items()
    }


def silenced(tree, spaces, kept, ends):
    """The tree with zeros at the removed channels of the leaves and axes that `ends` accepts."""
    gone = {}
    for space, entries in spaces.items():
        for name, axis in entries:
            if ends(name, axis):
                gone.setdefault(name, []).append((axis, kept[space]))

    def zero(path, leaf):
        for axis, keeps in gone.get(path_name(path), ()):
            leaf = leaf * jnp.expand_dims(keeps, [a for a in range(leaf.ndim) if a != axis])
        return leaf

    return jax.tree.map_with_path(zero, tree)


def reads(name, axis):
    """A kernel's input axis: no layer reads the channel."""
    return name.endswith("kernel") and axis != 3


def norms(name, axis):
    """A norm's factor and shift: no layer of a stream writes to the channel."""
    return name.endswith(("scale", "bias"))


@pytest.mark.parametrize("silent", [reads, norms], ids=["nothing_reads", "nothing_writes"])
@pytest.mark.parametrize(
    "name", [slow_unless(name in ("cnn", "resnet20"), name) for name in NETWORKS]
)
def test_the_smaller_network_computes_the_function_of_the_larger_one(name, silent):
    """With zero channels, in training mode (statistics and gradients too) and at inference."""
    size = 32 if name in ("vgg19", "mobilenet_v1") else 16  # their last norms need more values
    images = jax.random.normal(jax.random.key(1), (4, size, size, 3))
    large = network(name, **NETWORKS[name])
    variables = random_variables(large, images)
    params, stats = variables["params"], variables["batch_stats"]
    spaces, kept = kept_channels(params)
    params = silenced(params, spaces, kept, silent)
    fewer, fewer_stats = bsj.remove_channels(spaces, kept, params, stats)
    small = network(name, widths=widths_of(fewer), **NETWORKS[name])

    def run(model, params, stats):
        def loss(params):
            logits, changed = model.apply(
                {"params": params, "batch_stats": stats},
                images,
                train=True,
                mutable=["batch_stats"],
            )
            return jnp.sum(jnp.sin(logits)), (logits, changed["batch_stats"])

        (_, (trained, new_stats)), grads = jax.value_and_grad(loss, has_aux=True)(params)
        inferred = model.apply({"params": params, "batch_stats": stats}, images, train=False)
        return {"train": trained, "eval": inferred}, new_stats, grads

    quick = {"xla_backend_optimization_level": 0}  # runs once: compiling counts
    jitted = jax.jit(run, static_argnums=0, compiler_options=quick)
    logits, new_stats, grads = jitted(large, params, stats)
    fewer_logits, *fewer_trees = jitted(small, fewer, fewer_stats)
    for mode, expected in logits.items():
        np.testing.assert_allclose(fewer_logits[mode], expected, rtol=2e-4, atol=2e-4)
    cut_grads, cut_stats = bsj.remove_channels(spaces, kept, grads, new_stats)
    for expected, actual in ((cut_stats, fewer_trees[0]), (cut_grads, fewer_trees[1])):
        for a, b in zip(jax.tree.leaves(expected), jax.tree.leaves(actual), strict=True):
            np.testing.assert_allclose(b, a, rtol=1e-2, atol=2e-3 * max(1, np.abs(a).max()))


@pytest.mark.parametrize("name", NETWORKS)
def test_a_network_made_for_the_widths_has_exactly_the_smaller_parameters(name):
    """Down to one channel in each space; an init gives the shapes, so shortcuts keep their form."""
    images = jax.ShapeDtypeStruct((2, 16, 16, 3), jnp.float32)
    large = network(name, **NETWORKS[name])
    shapes = jax.eval_shape(large.init, jax.random.key(0), images)
    zeros = jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float32), shapes)
    spaces, kept = kept_channels(zeros["params"])
    one = {space: np.arange(keeps.size) == 0 for space, keeps in kept.items()}
    for keeps in (kept, one):
        fewer = bsj.remove_channels(spaces, keeps, zeros["params"], zeros["batch_stats"])
        small = network(name, widths=widths_of(fewer[0]), **NETWORKS[name])
        made = jax.eval_shape(small.init, jax.random.key(0), images)
        found = made["params"], made["batch_stats"]
        assert jax.tree.map(jnp.shape, found) == jax.tree.map(jnp.shape, tuple(fewer))
    assert widths_of(zeros["params"]) == widths_of(shapes["params"])
    assert set(widths_of(fewer[0]).values()) == {1}


@pytest.mark.parametrize("silent", ["kernel", "factor"])
def test_a_branch_that_adds_nothing_goes_and_the_function_stays(silent):
    """A layer of zeros, or a factor of zero: the block is its shortcut."""
    images = jax.random.normal(jax.random.key(1), (4, 16, 16, 3))
    options = NETWORKS["resnet20"]
    large = network("resnet20", **options)
    variables = random_variables(large, images)
    stats = variables["batch_stats"]
    params = with_branch_factors(variables["params"])
    block, spaces = params["stage1_block2"], channel_spaces(params)
    inner = inner_spaces(params)
    assert inner == [f"{name}/conv1" for name in params if "block" in name]
    if silent == "factor":
        block["factor"] = jnp.zeros(())
        gone = "stage1_block2/conv1"
        kept = {gone: np.zeros(16, bool)}
    else:
        block["conv2"]["kernel"] *= 0
        block["norm2"]["bias"] *= 0
        stats["stage1_block2"]["norm2"]["mean"] *= 0
        kept = bsj.used_channels(spaces, params, vanishing=inner)
        assert [space for space, keeps in kept.items() if not keeps.all()] == [inner[1]]
    with pytest.raises(
        ValueError, match=r"keeps none of 16 channels.*name the space in `vanishing`"
    ):
        bsj.remove_channels(spaces, kept, params, stats)
    fewer, fewer_stats = bsj.remove_channels(spaces, kept, params, stats, vanishing=inner)
    small = network("resnet20", widths=widths_of(fewer), **options)

    def run(model, params, stats, train):
        variables = {"params": params, "batch_stats": stats}
        return model.apply(variables, images, train=train, mutable=["batch_stats"])

    jitted = jax.jit(run, static_argnums=(0, 3))
    for train in (False, True):
        expected = jitted(large, params, stats, train)
        actual = jitted(small, fewer, fewer_stats, train)
        np.testing.assert_allclose(actual[0], expected[0], rtol=1e-5, atol=1e-5)
        (cut,) = bsj.remove_channels(
            {inner[1]: [e for e in spaces[inner[1]] if e[0].endswith(("mean", "var"))]},
            {inner[1]: np.zeros(16, bool)},
            expected[1]["batch_stats"],
            vanishing=inner,
        )
        assert jax.tree.map(jnp.shape, cut) == jax.tree.map(jnp.shape, actual[1]["batch_stats"])


# Runs that remove channels


def settings(tmp_path, method, options, **fields):
    fields = {"lr_schedule": "constant", "sparsity": None} | fields
    return config(tmp_path, method=method, options=options, epochs=2, **fields)


@pytest.mark.parametrize(
    ("method", "options", "fields"),
    [
        slow_unless(False, "slimming", {}, {"sparsity": 0.8}),
        slow_unless(False, "prune-train", {"every": 1, "threshold": 0.3}, {}),
        slow_unless(
            False, "sss", {"every": 1, "penalty": 2.0, "momentum": 0.0}, {"sparsity": None}
        ),
        slow_unless(False, "slimming", {}, {"sparsity": 0.8, "model": "resnet20"}),
        ("group-lasso", {}, {"sparsity": 0.8, "execution": "packed"}),
        slow_unless(
            False,
            "group-lasso",
            {"depth": True, "strength": 0.1, "threshold": 0.1},
            {"sparsity": 0.8, "execution": "packed", "model": "resnet20"},
        ),
        slow_unless(
            False,
            "sss",
            {"every": 1, "penalty": 2.0, "momentum": 0.0},
            {"model": "resnet20"},
        ),
    ],
    ids=[
        *("slimming", "prune-train", "sss", "slimming-resnet20"),
        *("group-lasso", "group-lasso-depth", "sss-blocks"),
    ],
)
def test_a_run_shrinks_reports_it_and_resumes_to_the_same_bits(method, options, fields, tmp_path):
    """Stopped before the removal and after it; the result has both networks, side by side."""
    first = settings(tmp_path, method, options, **fields)
    whole = Run(dataclasses.replace(first, out=str(tmp_path / "whole")))
    result = whole.train()
    original = network_size.parameters(whole.trainer.shapes)
    left = network_size.parameters(execution.dense_shapes(whole.state))
    assert result["parameters"] == left < original == result["original_parameters"]
    assert 0 < result["kept_flops_fraction"] < 1
    assert 0 < result["density"] < 1
    assert whole._history.density() == pytest.approx(result["density"], rel=1e-6)
    if method == "group-lasso":
        assert result["density"] == pytest.approx(density_of(whole), rel=1e-6)
    assert result["step_ms_median"] > 0
    assert result["original_step_ms_median"] > 0
    if method == "slimming":
        assert result["density"] == pytest.approx(0.2, abs=0.05)
        assert result["density"] <= 0.2
    for stop in (PER_EPOCH // 2, PER_EPOCH + 3):
        assert Run(first, resume=stop > PER_EPOCH).train(stop_after=stop) is None
    resumed = Run(first, resume=True)
    assert execution.widths_of(resumed.state) == execution.widths_of(whole.state)
    again = resumed.train()
    assert_same_run(resumed, whole)
    assert again["parameters"] == result["parameters"]
    assert again["original_step_ms_median"] is None or again["original_step_ms_median"] > 0
    tested = evaluate.main(evaluate.EvaluateConfig(run=first.out))
    assert tested["test_accuracy"] == result["test_accuracy"]
    if "model" in fields and method != "slimming":
        assert 0 in execution.widths_of(whole.state).values(), "a branch is gone"
    if method == "group-lasso":
        attacked = attack.main(attack.AttackConfig(run=first.out, epsilons=(0.0,)))
        assert attacked["rows"][0]["accuracy"] == result["test_accuracy"]
        with pytest.raises(ValueError, match=r"masks: .* is a run whose network lost channels"):
            Run(dataclasses.replace(first, masks=first.out, out=str(tmp_path / "other")))
        longer = Run(dataclasses.replace(first, epochs=3), resume=True)
        assert longer.train()["parameters"] == left
    shapes = [row["parameters"] for row in whole.folder.metrics() if row["kind"] == "epoch"]
    assert shapes[-1] == left


def density_of(run):
    """The kept weights over all of the layers that the method prunes, those too that are gone."""
    named = [
        {path_name(path): leaf for path, leaf in jax.tree.leaves_with_path(params)}
        for params in (run.trainer.shapes, execution.dense_shapes(run.state))
    ]
    masks = jax.tree.leaves_with_path(execution.masks_of(run.state))
    left = {path_name(path): mask for path, mask in masks}
    pruned = execution.masks_of(run.trainer.init())
    of = kept = 0
    for path, mask in jax.tree.leaves_with_path(pruned):
        if mask.ndim:
            name = path_name(path)
            of += np.prod(named[0][name].shape)
            kept += left[name].sum() if left[name].ndim else np.prod(named[1][name].shape)
    return float(kept / of)


def test_prune_train_finds_the_channels_that_no_kernel_of_a_stream_uses():
    """Those whose removal the test above shows to leave the function as it is."""
    images = jax.ShapeDtypeStruct((2, 16, 16, 3), jnp.float32)
    params = random_variables(network("resnet20", **NETWORKS["resnet20"]), images)["params"]
    spaces, kept = kept_channels(params)
    silent = silenced(params, spaces, kept, lambda name, axis: name.endswith("kernel"))
    found = bsj.channels_above(spaces, silent)
    assert {name: keeps.tolist() for name, keeps in found.items()} == {
        name: keeps.tolist() for name, keeps in kept.items()
    }
    heard = jax.tree.map(jnp.copy, silent)
    stem, block = np.flatnonzero(~kept["stem"])[0], "stage1_block2"
    heard[block]["conv2"]["kernel"] = heard[block]["conv2"]["kernel"].at[0, 0, 0, stem].set(1e-3)
    assert bsj.channels_above(spaces, heard)["stem"][stem], "one writer to the stream is enough"


def test_the_removal_takes_the_asked_fraction_of_the_weights():
    model, images = create("cnn", num_classes=10), jnp.ones((1, 8, 8, 1))
    params = jax.eval_shape(model.init, jax.random.key(0), images)["params"]
    params = jax.tree.map(lambda leaf: np.zeros(leaf.shape), params)
    spaces, rng = channel_spaces(params), np.random.default_rng(0)
    scores = {space: rng.random(64 if space == "stem" else 128) for space in spaces}
    scores["conv3"] = rng.random(256)
    for sparsity in (0.0, 0.5, 0.9):
        kept = largest_for(scores, spaces, params, sparsity)
        spaces_of_params = {
            space: [entry for entry in entries if not entry[0].endswith(("mean", "var"))]
            for space, entries in spaces.items()
        }
        (smaller,) = bsj.remove_channels(spaces_of_params, kept, params)
        masks = jax.tree.map(lambda leaf: jnp.asarray(True), params)
        density = network_size.density(masks, smaller, params)
        assert density <= 1 - sparsity
        assert density > (1 - sparsity) * 0.93
