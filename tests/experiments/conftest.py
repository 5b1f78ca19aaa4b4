"""What the trainer's tests share: compiled steps, and runs that draw no pictures."""

import pytest

from experiments.training import plots, run
from experiments.training.programs import Programs


@pytest.fixture(scope="session", autouse=True)
def _shared_steps():
    """All runs share their programs, so that one that is stopped and resumed compiles once."""
    shared = Programs()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "Programs", lambda: shared)
        yield


@pytest.fixture
def without_pictures():
    """Runs end without drawing: that takes longer than a tiny run trains."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("learning_curves", "block_structure"):
            patch.setattr(plots, name, lambda *_: None)
        yield
