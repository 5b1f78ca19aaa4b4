r"""Trains one network with one method.

    python -m experiments.train --dataset digits --model cnn --method hrbp --sparsity 0.9 \
        --epochs 5 --out runs/a

`--method list` prints the methods, `--method subp --help` the options of one. Every method and
execution runs in the same loop (training/loop.py). Stop it anywhere and go on with
`--resume --out runs/a`: the run continues from its last checkpoint and ends with the same bits as
without the stop. On 2 CPU cores the command above takes half a minute and reaches about 97% on
digits.
"""

import sys
from typing import Any

from rich.console import Console

from experiments.measuring.environment import device
from experiments.measuring.memory import steady_memory
from experiments.reporting import markdown
from experiments.reporting.reports import methods
from experiments.training import command_line
from experiments.training.config import TrainConfig
from experiments.training.execution import summary_of
from experiments.training.run import Run


def main(config: TrainConfig, resume: bool = False) -> dict[str, Any]:
    """Trains to the end.

    Args:
      config: what to train.
      resume: go on with the run in `config.out`.

    Returns:
      The result, as in result.json.

    Raises:
      ValueError: a field, the folder or a checkpoint is wrong.
      FileNotFoundError: the data set is not prepared.
      FloatingPointError: training diverged.

    Example:
      main(TrainConfig(dataset="digits", method="hrbp", epochs=5, out="runs/a"))["test_accuracy"]
    """
    steady_memory()
    result = Run(config, resume).train()
    assert result is not None
    return result


def cli(args: list[str] | None = None) -> None:
    """The command line.

    Wrong arguments, a wrong folder or missing data end it with one line and exit code 2, diverging
    with 1.

    Args:
      args: None takes the process's arguments.
    """
    args = sys.argv[1:] if args is None else args
    try:
        if command_line.method_of(args) == "list":
            markdown.show(methods.table())
            return
        config, resume = command_line.parse(args)
        print(
            f"{config.method} on {config.dataset}: {config.model}, {config.epochs} epochs of "
            f"batches of {config.batch_size}, "
            f"{config.execution}, {config.precision}; {device()}; run folder {config.out}",
            flush=True,
        )
        run = Run(config, resume)
    except (ValueError, FileNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    try:
        result = run.train()
    except FloatingPointError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(1) from None
    assert result is not None
    name = f"{run.folder.path.name}, {config.method}"
    Console().print(
        f"{name}: test accuracy {result['test_accuracy']:.2%}, density {result['density']:.4f}"
    )
    if (summary := summary_of(run.state, config.method)) is not None:
        print(summary)


if __name__ == "__main__":
    cli()
