"""The network of a run folder, read from one of its checkpoints."""

from typing import NamedTuple

from experiments.data import load
from experiments.data.batches import Data
from experiments.training.config import TrainConfig
from experiments.training.execution import State
from experiments.training.loop import Trainer
from experiments.training.run import checkpoint_like, first_batch, trainer_for
from experiments.training.run_folder import RunFolder


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
    step = folder.latest() if step is None else step
    if step is None:
        raise ValueError(
            f"{folder.path}: has no checkpoint yet; go on with the run: {folder.resume_command}"
        )
    data = load(config.dataset, data_dir or config.data_dir)
    trainer = trainer_for(config, data)
    fresh = trainer.init(first_batch(config, data))
    form = folder.checkpoints.meta(step)["form"]
    state, *_ = folder.checkpoints.restore(step, checkpoint_like(form, fresh))
    return Restored(config, data, trainer, state, step)
