"""Masks before training: what SNIP, GraSP and SynFlow look at in a run, and what they keep."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import optax
import pytest
import references as ref

import blocksparse_jax as bsj
from experiments import models
from experiments.data import load
from experiments.training.config import TrainConfig, resolve
from experiments.training.execution import masks_of
from experiments.training.methods import Grasp, Snip, Synflow
from experiments.training.methods.batches import balanced, first_examples
from experiments.training.seeding import first_batch, trainer_for

SPARSITY = 0.8
LAYERS = ("stem", "conv1", "conv2", "conv3", "classifier")


def started(method, options):
    """The trainer, the batch that it looked at and the masks before the first step."""
    config = TrainConfig(
        method=method, width=0.125, sparsity=SPARSITY, epochs=1, options=options, out="-"
    )
    config, data = resolve(config), load("digits")
    trainer, batch = trainer_for(config, data), first_batch(config, data)
    return trainer, batch, masks_of(trainer.init(batch))


def kernels(tree):
    return {name: np.asarray(tree[name]["kernel"]) for name in LAYERS}


def test_a_balanced_batch_is_ordered_by_class():
    """Each of its batches: a half holds whole classes."""
    images = np.arange(40).reshape(10, 4, 1)
    labels = np.arange(40).reshape(10, 4) % 3
    found, classes = balanced(zip(images, labels, strict=True), 3, per_class=2, count=2)
    assert classes.tolist() == [0, 0, 1, 1, 2, 2] * 2
    assert found[:, 0].tolist() == [0, 3, 1, 4, 2, 5, 6, 9, 7, 10, 8, 11]
    with pytest.raises(ValueError, match="expected 20 examples of every class, and class 0 has 14"):
        balanced(zip(images, labels, strict=True), 3, per_class=10, count=2)


def test_snip_looks_at_one_batch_of_a_hundred_examples():
    """Whatever the batches of training are; a smaller set gives all it has."""
    trainer, (images, labels), masks = started("snip", Snip())
    assert trainer.config.batch_size == 64
    assert len(images) == len(labels) == 100
    scores = kernels(bsj.snip(trainer._setup.loss_fn, trainer._setup.params, (images, labels)))
    size = sum(score.size for score in scores.values())
    expected = ref.global_masks(scores, round(size * (1 - SPARSITY)))
    for name, mask in kernels(masks).items():
        np.testing.assert_array_equal(mask, expected[name])
    whole = [(np.arange(3), np.arange(3)), (np.arange(2), np.arange(2))]
    assert first_examples(whole, 9)[1].tolist() == [0, 1, 2, 0, 1]
    with pytest.raises(ValueError, match="examples: expected an integer of at least 1, got 0"):
        Snip(examples=0).check()


def test_grasp_looks_at_two_halves_of_ten_examples_a_class():
    """The masks of the definition: 10 examples a class, logits over 200, every layer, the cut."""
    trainer, (images, labels), masks = started("grasp", Grasp())
    assert labels.tolist() == [label for label in range(10) for _ in range(10)]
    params, batch_stats = trainer.initial()
    model = models.create("cnn", num_classes=10, width=0.125, data_format="NHWC")

    def loss(params, half):
        variables = {"params": params, "batch_stats": batch_stats}
        logits, _ = model.apply(variables, half[0], train=True, mutable=["batch_stats"])
        return optax.softmax_cross_entropy_with_integer_labels(logits / 200, half[1]).mean()

    scores = kernels(bsj.grasp(loss, params, (images, labels)))
    size = sum(score.size for score in scores.values())
    expected = ref.global_masks(scores, ref.grasp_count(size, SPARSITY))
    kept = kernels(masks)
    assert sum(mask.sum() for mask in kept.values()) == ref.grasp_count(size, SPARSITY)
    for name in LAYERS:
        np.testing.assert_array_equal(kept[name], expected[name])


def test_synflow_needs_no_data_and_keeps_every_layer():
    trainer, batch, masks = started("synflow", Synflow(rounds=20))
    assert batch is None
    kept = kernels(masks)
    size = sum(mask.size for mask in kept.values())
    assert sum(mask.sum() for mask in kept.values()) == round(size * (1 - SPARSITY))
    params, batch_stats = trainer.initial()
    model = models.create("cnn", num_classes=10, width=0.125, data_format="NHWC")
    scores = bsj.synflow(
        lambda p, x: model.apply({"params": p, "batch_stats": batch_stats}, x, train=False).sum(),
        params,
        jnp.ones((1, 8, 8, 1)),
        sparsity=SPARSITY,
        rounds=20,
        where=lambda name, leaf: leaf.ndim > 1,
    )
    expected = ref.global_masks(kernels(scores), round(size * (1 - SPARSITY)))
    for name in LAYERS:
        np.testing.assert_array_equal(kept[name], expected[name])


@pytest.mark.parametrize(
    ("options", "dense"),
    [
        (Snip(), set()),
        (Snip(layers="inner"), {"stem", "classifier"}),
        (Snip(pattern="kernel"), {"stem", "classifier"}),
    ],
)
def test_scores_are_those_of_every_layer_unless_the_pattern_cannot_divide_it(options, dense):
    *_, masks = started("snip", options)
    assert {name for name, mask in kernels(masks).items() if mask.ndim == 0} == dense


def test_options_that_exclude_each_other_are_refused():
    config = TrainConfig(method="snip", options=Snip(pattern="kernel", layers="all"))
    with pytest.raises(ValueError, match="layers: 'all' takes stem and classifier too"):
        resolve(config)
    with pytest.raises(ValueError, match=r"layers: expected one of 'inner', 'all', got 'al'"):
        resolve(dataclasses.replace(config, options=Snip(layers="al")))
    with pytest.raises(ValueError, match="examples_per_class"):
        resolve(TrainConfig(method="grasp", options=Grasp(examples_per_class=0)))
