"""Variational dropout in a run: what the noise of training may not change."""

import jax
import numpy as np
import pytest

from experiments.data import load
from experiments.training.config import TrainConfig, resolve
from experiments.training.run import Run
from experiments.training.seeding import trainer_for


def test_statistics_are_those_of_the_network_that_is_tested():
    """Of the masked means, without noise; with it the running variances would be larger."""
    config = resolve(TrainConfig(method="variational-dropout", width=0.125, sparsity=0.8, out="-"))
    data = load("digits")
    trainer = trainer_for(config, data)
    state = trainer.init()
    images, labels = next(data.train_batches(0, config.batch_size, 0))
    before = jax.tree.map(np.array, state)
    after, _ = trainer.step(state, 0, images, labels)
    variables = {"params": before.params, "batch_stats": before.batch_stats}
    _, expected = trainer.network.model("masked").apply(
        variables, images, train=True, mutable=["batch_stats"]
    )
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6),
        after.batch_stats,
        expected["batch_stats"],
    )


@pytest.mark.slow
def test_nine_weights_of_ten_can_go_in_ten_epochs(tmp_path):
    """With statistics of the noisy network, 3 of 10 images were right."""
    settings = TrainConfig(
        method="variational-dropout", sparsity=0.9, epochs=10, width=0.5, out=str(tmp_path / "run")
    )
    result = Run(settings).train()
    assert result["density"] == pytest.approx(0.1, abs=1e-3)
    assert result["test_accuracy"] >= 0.9
