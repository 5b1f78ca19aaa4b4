"""The learning rate, the weight decay and the loss are those that the config names."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.training.config import TrainConfig, resolve
from experiments.training.length import Length
from experiments.training.loop import Trainer
from experiments.training.optimizer import learning_rate, optimizer

LENGTH = Length(steps_per_epoch=8, total=80)


def dense_config(**fields):
    return resolve(TrainConfig(method="dense", model="cnn", width=0.25, **fields))


@pytest.mark.parametrize(
    ("schedule", "fractions"),
    [
        ("step", {0: 1, 39: 1, 40: 0.1, 59: 0.1, 60: 0.01, 79: 0.01}),
        ("last-quarter", {0: 1, 59: 1, 60: 0.1, 79: 0.1}),
        ("fifths", {0: 1, 23: 1, 24: 0.2, 48: 0.2, 49: 0.04, 72: 0.04, 73: 0.008}),
        ("cosine", {0: 1, 20: 0.853553, 40: 0.5, 60: 0.146447, 80: 0}),
        ("constant", {0: 1, 40: 1, 79: 1}),
    ],
)
def test_the_learning_rate_follows_its_schedule(schedule, fractions):
    rate = learning_rate(dense_config(lr=2.0, lr_schedule=schedule), LENGTH)
    rates = [float(rate(step)) for step in fractions]
    np.testing.assert_allclose(rates, [2 * f for f in fractions.values()], rtol=1e-5, atol=1e-7)


def test_the_learning_rate_rises_before_its_schedule_begins():
    config = dense_config(lr=2.0, lr_schedule="cosine", warmup_epochs=2, epochs=10)
    rate = learning_rate(config, LENGTH)
    rates = [float(rate(step)) for step in (0, 4, 8, 16, 48, 80)]
    np.testing.assert_allclose(rates, [0, 0.5, 1, 2, 1, 0], atol=1e-6)
    with pytest.raises(ValueError, match="warmup_epochs: expected fewer than the run's 2 epochs"):
        dense_config(warmup_epochs=2, epochs=2)


def test_nesterov_momentum_looks_ahead():
    """Of two steps with a gradient of 1, the second moves by 1 + 0.9 * 1.9, not by 1.9."""
    gradient = {"w": jnp.ones((1, 1))}
    for nesterov, moves in ((False, (1, 1.9)), (True, (1.9, 2.71))):
        config = dense_config(lr=1.0, lr_schedule="constant", weight_decay=0.0, nesterov=nesterov)
        tx = optimizer(config, LENGTH)
        state, found = tx.init(gradient), []
        for _ in moves:
            update, state = tx.update(gradient, state, gradient)
            found.append(-float(update["w"][0, 0]))
        assert found == pytest.approx(moves)


def test_weight_decay_leaves_one_dimensional_parameters_alone(params):
    """With a gradient of zeros the update is what the weight decay adds."""
    config = dense_config(
        lr=0.5, lr_schedule="constant", momentum=0.0, weight_decay=0.1, optimizer="sgd"
    )
    tx = optimizer(config, LENGTH)
    zeros = jax.tree.map(jnp.zeros_like, params)
    updates, _ = tx.update(zeros, tx.init(params), params)
    one_dimensional = 0
    for update, param in zip(jax.tree.leaves(updates), jax.tree.leaves(params), strict=True):
        one_dimensional += param.ndim == 1
        expected = 0 * param if param.ndim == 1 else -0.5 * 0.1 * param
        np.testing.assert_allclose(update, expected, rtol=1e-6)
    assert one_dimensional == 1


@pytest.mark.parametrize("smoothing", [0.0, 0.3])
def test_the_loss_is_the_cross_entropy_of_smoothed_labels(smoothing):
    trainer = Trainer(dense_config(label_smoothing=smoothing), (8, 8, 1), 10, LENGTH)
    state = trainer.init()
    images = jax.random.normal(jax.random.key(0), (6, 8, 8, 1))
    labels = jnp.arange(6)
    variables = {"params": state.params, "batch_stats": state.batch_stats}
    model = trainer.network.model("masked")
    logits, _ = model.apply(variables, images, train=True, mutable=["batch_stats"])
    logits = np.asarray(logits, np.float64)
    log_probabilities = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    targets = (1 - smoothing) * np.eye(10)[np.asarray(labels)] + smoothing / 10
    expected = -(targets * log_probabilities).sum(1).mean()
    _, metrics = trainer.step(state, 0, images, labels)
    assert float(metrics.loss) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(
    ("dataset", "model", "decay"),
    [
        ("cifar10", "resnet32", 1e-4),
        ("cifar100", "resnet32", 1e-4),
        ("tiny_imagenet", "resnet32", 1e-4),
        ("cifar10", "resnet56", 1e-4),
        ("cifar10", "vgg19", 5e-4),
        ("tiny_imagenet", "vgg19", 5e-4),
        ("imagenet2012", "resnet50", 1e-4),
        ("digits", "resnet20", 5e-4),
    ],
)
def test_the_weight_decay_of_each_network_is_that_of_its_source(dataset, model, decay):
    assert resolve(TrainConfig(dataset=dataset, model=model)).weight_decay == decay
    given = TrainConfig(dataset=dataset, model=model, weight_decay=3e-4)
    assert resolve(given).weight_decay == 3e-4
