"""Attacks a trained network with its own gradients (FGSM).

`python -m experiments.attack --run runs/a --epsilons 0.05 0.1` prints the accuracy on test images
whose every pixel moved by epsilon so that the loss rises, where 1 is the brightest pixel. It writes
attack.json and attack.png into the run folder.
"""

import dataclasses
import sys
from pathlib import Path
from typing import Any

import tyro

from experiments.training import stopping

if __name__ == "__main__":
    stopping.end_at_once()  # Ctrl-C: what is written comes at the end, so nothing is lost

from blocksparse_jax import _checks
from experiments.training import plots
from experiments.training.fgsm import attack
from experiments.training.files import write_json
from experiments.training.restored import restore


@dataclasses.dataclass(frozen=True)
class AttackConfig:
    """Which run to attack, and how hard.

    Attributes:
      run: its folder.
      epsilons: how far a pixel moves, in [0, 1], of images whose brightest pixel is 1 and darkest
        0, where they stay inside.
      step: of the checkpoint; None takes the last.
      data_dir: where the data sets are; None takes the run's.
    """

    run: str
    epsilons: tuple[float, ...] = (0.05, 0.1, 0.15, 0.2, 0.25, 0.3)
    step: int | None = None
    data_dir: str | None = None


def main(config: AttackConfig) -> dict[str, Any]:
    """Restores a checkpoint, attacks it, writes and prints what it finds.

    Args:
      config: which run.

    Returns:
      What attack.json holds: the run, `test_accuracy` and `rows` of epsilon and accuracy.

    Raises:
      ValueError: an epsilon is wrong, the folder is not a run's, or its checkpoint cannot be read.
      FileNotFoundError: the data set is not prepared.
      OSError: the folder cannot be written.
    """
    if not config.epsilons:
        raise ValueError("epsilons: expected numbers in [0, 1] such as 0.05 0.1, got none")
    for epsilon in config.epsilons:
        _checks.fraction("epsilons", epsilon, high_open=False)
    train, data, trainer, state, step = restore(config.run, config.step, config.data_dir)
    report = attack(trainer, state, data, step, config.epsilons)
    clean, rows = report["test_accuracy"], report["rows"]
    folder = Path(config.run)
    write_json(folder / "attack.json", report)
    drawn = sorted({0.0: clean, **{row["epsilon"]: row["accuracy"] for row in rows}}.items())
    title = f"{train.method}: {train.model} on {train.dataset}, fast gradient sign method"
    plots.attack(*zip(*drawn, strict=True), folder / "attack.png", title)
    print(f"{train.method} on {train.dataset}, step {step}: test accuracy {clean:.2%}")
    for row in rows:
        print(f"epsilon {row['epsilon']:g}: {row['accuracy']:.2%}")
    return report


if __name__ == "__main__":
    try:
        main(tyro.cli(AttackConfig, prog="python -m experiments.attack"))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
