"""What the trainer's tests share: compiled steps, and runs that draw no pictures."""

import dataclasses

import pytest

from experiments.training import plots, run, seeding


@pytest.fixture(scope="session", autouse=True)
def _shared_steps():
    """Trainers of equal configs share what they compile, as those of `with_execution` do, so that
    a run that is stopped and resumed compiles its steps once. All else is made anew each time.
    """
    first = {}

    def trainer_for(config, data):
        trainer = seeding.trainer_for(config, data)
        if config.masks is None:  # masks of another run are no part of the config
            unseen = {"out": None, "log_every": 1, "checkpoint_every": None}
            key = dataclasses.replace(config, **unseen), trainer.length, data.image_shape
            same = first.setdefault(key, trainer)
            trainer._step, trainer._correct = same._step, same._correct
        return trainer

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "trainer_for", trainer_for)
        yield


@pytest.fixture
def without_pictures():
    """Runs end without drawing: that takes longer than a tiny run trains."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("learning_curves", "block_structure"):
            patch.setattr(plots, name, lambda *_: None)
        yield
