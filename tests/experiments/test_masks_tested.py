"""The test at an epoch's end sees the masks under which the epoch was trained."""

import jax
import numpy as np
import pytest
from tiny_runs import PER_EPOCH, config

from experiments.training.execution import masks_of
from experiments.training.loop import Trainer
from experiments.training.run import Run

SOFT = {"method": "subp", "options": {"update_every": PER_EPOCH, "start": 0, "end": 2 * PER_EPOCH}}


def same(a, b):
    return all(
        np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    )


@pytest.mark.parametrize(
    "execution", ["masked", pytest.param("sparse", marks=pytest.mark.slow), "packed"]
)
def test_subp_is_tested_by_the_masks_of_its_epoch(tmp_path, monkeypatch, execution):
    """The last update of an epoch sets the masks of the next; those of the last epoch are final."""
    tested, trained = [], []
    step, evaluate = Trainer.step, Trainer.evaluate

    def record_step(self, state, number, images, labels):
        if (number + 1) % PER_EPOCH == 0:
            trained.append(masks_of(state))
        return step(self, state, number, images, labels)

    def record_test(self, state, batches):
        tested.append(state)
        return evaluate(self, state, batches)

    monkeypatch.setattr(Trainer, "step", record_step)
    monkeypatch.setattr(Trainer, "evaluate", record_test)
    run = Run(config(tmp_path, execution=execution, **SOFT))
    run.train()

    assert not same(trained[1], trained[2])
    for state, masks in zip(tested, trained, strict=True):
        assert same(masks_of(state), masks)
    assert same(tested[-1].params, run.state.params)
    density = [row["density"] for row in run.folder.metrics() if row["kind"] == "epoch"]
    assert density[0] == 1 > density[1] > density[2]


def test_other_methods_are_tested_as_they_are(tmp_path):
    run = Run(config(tmp_path, method="rigl"))
    assert not run.trainer.spec.ahead
    assert run.trainer.masks_to_test(PER_EPOCH - 1, run.state) == []
