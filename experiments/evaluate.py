"""Tests a trained network again.

`python -m experiments.evaluate --run runs/a` prints its test accuracy and a table of its layers.
"""

import dataclasses
import sys
from typing import Any

import tyro

from experiments.training import stopping

if __name__ == "__main__":
    stopping.end_at_once()  # Ctrl-C: nothing is written, so nothing is lost

from experiments.training.execution import summary_of
from experiments.training.restored import restore


@dataclasses.dataclass(frozen=True)
class EvaluateConfig:
    """Which run to test.

    Attributes:
      run: its folder.
      step: of the checkpoint; None takes the last.
      data_dir: where the data sets are; None takes the run's.
    """

    run: str
    step: int | None = None
    data_dir: str | None = None


def main(config: EvaluateConfig) -> dict[str, Any]:
    """Restores a checkpoint, tests it and prints what it finds.

    Args:
      config: which run.

    Returns:
      `{"step": ..., "test_accuracy": ...}`.

    Raises:
      ValueError: the folder is not a run's, or its checkpoint cannot be read.
      FileNotFoundError: the data set is not prepared.
    """
    train, data, trainer, state, step = restore(config.run, config.step, config.data_dir)
    accuracy = trainer.evaluate(state, data.test_batches(train.batch_size))
    print(f"{train.method} on {train.dataset}, step {step}: test accuracy {accuracy:.2%}")
    if (summary := summary_of(state, train.method, trainer.shapes)) is not None:
        print(summary)
    return {"step": step, "test_accuracy": accuracy}


if __name__ == "__main__":
    try:
        main(tyro.cli(EvaluateConfig, prog="python -m experiments.evaluate"))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
