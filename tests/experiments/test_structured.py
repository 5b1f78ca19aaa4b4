"""Channels of trained networks: what the zoo's networks compute when they are gone."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import blocksparse_jax as bsj
from blocksparse_jax.tree import choose
from experiments import models
from experiments.models.spaces import channel_spaces
from experiments.training.length import Length
from experiments.training.methods import Setup
from experiments.training.registry import METHODS

STRUCTURED = ["l1-filters", "thinet", "lasso-channels", "pfa"]


def network(name, image):
    """A network with random parameters and statistics, and images."""
    model = models.create(name, num_classes=5, width=0.25, data_format="NHWC")
    images = np.random.default_rng(1).normal(size=(8, *image)).astype(np.float32)
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), images, train=False))

    def draw(path, leaf):
        seed = sum(map(ord, jax.tree_util.keystr(path)))
        values = np.random.default_rng(seed).normal(size=leaf.shape) / 3
        if len(leaf.shape) > 1:
            values *= 5 / np.sqrt(np.prod(leaf.shape[:-1]))
        return jnp.asarray(values if "kernel" in str(path) else np.abs(values) + 0.5, jnp.float32)

    return model, jax.tree.map_with_path(draw, shapes), images


def setup_of(model, variables, images, sparsity=0.75):
    length = Length(steps_per_epoch=5, total=10)
    params, stats = variables["params"], variables.get("batch_stats", {})
    batch = images, np.arange(len(images)) % 5
    return Setup(sparsity, jax.random.key(3), length, params, None, batch, model, stats)


@pytest.mark.parametrize(
    ("name", "method"),
    [
        ("resnet20", "l1-filters"),
        pytest.param("resnet20", "thinet", marks=pytest.mark.slow),
        pytest.param("mobilenet_v1", "lasso-channels", marks=pytest.mark.slow),
    ],
)
def test_the_smaller_network_computes_what_the_masked_one_does(name, method):
    """With shortcuts, strides and depthwise convolutions, the readers of each space mended."""
    model, variables, images = network(name, (8, 8, 3))
    options = METHODS[method].options
    setup = setup_of(model, variables, images)
    params, kept = options.choose(setup)
    spaces = channel_spaces(params)
    assert set(kept) == set(spaces)
    masked = bsj.apply_masks(params, bsj.channel_masks(params, spaces, kept))
    smaller, stats = bsj.remove_channels(spaces, kept, params, variables["batch_stats"])
    left = sum(w.size for w in jax.tree.leaves(smaller) if w.ndim == 4)
    assert left / sum(w.size for w in jax.tree.leaves(params) if w.ndim == 4) < 0.5
    small = models.create(name, num_classes=5, data_format="NHWC", widths=models.widths_of(smaller))

    def logits(model, params, stats):
        variables = {"params": params, "batch_stats": stats}
        return jax.jit(lambda v, x: model.apply(v, x, train=False))(variables, images)

    expected = logits(model, masked, variables["batch_stats"])
    assert np.ptp(expected) > 0.1
    np.testing.assert_allclose(logits(small, smaller, stats), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("method", STRUCTURED)
def test_a_method_removes_once_what_the_sparsity_says(method):
    model, variables, images = network("cnn", (8, 8, 1))
    options, setup = METHODS[method].options, setup_of(model, variables, images)
    assert list(options.operations(setup)) == [5]
    _, kept = options.choose(setup)
    smaller, *_ = bsj.remove_channels(
        channel_spaces(setup.params), kept, setup.params, setup.batch_stats
    )
    sizes = [
        sum(leaf.size for leaf in choose(None, tree).values()) for tree in (smaller, setup.params)
    ]
    assert sizes[0] / sizes[1] == pytest.approx(0.25, abs=0.02)


@pytest.mark.parametrize("method", STRUCTURED[1:])
def test_methods_that_look_at_activations_need_a_batch(method):
    model, variables, images = network("cnn", (8, 8, 1))
    setup = setup_of(model, variables, images)._replace(batch=None)
    with pytest.raises(ValueError, match="batch: the method looks at the activations of one batch"):
        METHODS[method].options.choose(setup)


def test_channels_go_within_training():
    with pytest.raises(ValueError, match="prune_at: expected a number in"):
        dataclasses.replace(METHODS["pfa"].options, prune_at=1.0).check()
