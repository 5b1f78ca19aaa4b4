"""The network of a run folder, read from one of its checkpoints."""

from typing import NamedTuple

from experiments.data import load
from experiments.data.batches import Data
from experiments.training.config import TrainConfig
from experiments.training.execution import State
from experiments.training.loop import Trainer
from experiments.training.run_folder import RunFolder
from experiments.training.seeding import restored


class Restored(NamedTuple):
    """A network at a step of its training.

    Attributes:
      config: of the run.
      data: its data set.
      trainer: its steps.
      state: in the form of the checkpoint.
      step: training steps done.
    """

    config: TrainConfig
    data: Data
    trainer: Trainer
    state: State
    step: int


def restore(run: str, step: int | None = None, data_dir: str | None = None) -> Restored:
    """Restores the network of a run.

    Args:
      run: its folder.
      step: of the checkpoint; None takes the last.
      data_dir: where the data sets are; None takes the run's.

    Returns:
      The network, and what it was trained with.

    Raises:
      ValueError: the folder is not a run's, or its checkpoint cannot be read.
      FileNotFoundError: the data set is not prepared.
    """
    folder = RunFolder(run)
    config = folder.config()
    data = load(config.dataset, data_dir or config.data_dir, examples=config.examples)
    step = folder.latest() if step is None else step
    trainer, state = restored(folder, config, data, step)
    assert step is not None
    return Restored(config, data, trainer, state, step)
