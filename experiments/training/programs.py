"""The compiled steps that the runs of one process share."""

import dataclasses
from typing import Any

from experiments.training.loop import Trainer

# What a program does not depend on.
_UNSEEN: dict[str, Any] = {
    "seed": 0,
    "out": None,
    "data_dir": "",
    "log_every": 1,
    "checkpoint_every": None,
    "keep_checkpoint": None,
}


class Programs:
    """Lets trainers whose configs differ in the seed, or in where things are, share their programs.

    Masks and random keys are arguments of a step, so new ones compile nothing. Campfire, Deep-R and
    DSR are traced anew for each run, since what they do to the proposed weights is a part of their
    state's structure. Runs under the masks of another run share nothing.

    Example:
      programs = Programs()
      for seed in range(3):
          Run(dataclasses.replace(config, seed=seed, out=f"runs/{seed}"), programs=programs).train()
    """

    def __init__(self) -> None:
        self._first: dict[Any, Trainer] = {}

    def share(self, trainer: Trainer) -> None:
        """Gives a trainer the programs of the first one that is like it.

        Args:
          trainer: of any run; before its first step.
        """
        if trainer.config.masks is None:
            trainer.share(self._first.setdefault(_key(trainer), trainer))

    def clear(self) -> None:
        """Forgets all trainers, so that their programs can be freed."""
        self._first.clear()


def _key(trainer: Trainer) -> Any:
    return dataclasses.replace(trainer.config, **_UNSEEN), trainer.length, trainer.image_shape
