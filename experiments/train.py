r"""Trains one network with one method.

    python -m experiments.train --dataset digits --model cnn --method hrbp --sparsity 0.9 \
        --epochs 5 --out runs/a

`--method list` prints the methods, `--method subp --help` the options of one. Every method and
execution runs in the same loop (training/loop.py). Stop it anywhere and go on with
`--resume --out runs/a`: the run continues from its last checkpoint and ends with the same bits as
without the stop. Ctrl-C and SIGTERM save a checkpoint first. `--resume --out runs/a --epochs 10`
extends the run when it has ended. On 2 CPU cores the command above takes half a minute and reaches
about 97% on digits.
"""

import io
import sys
from typing import Any

from experiments.training import stopping

if __name__ == "__main__":
    stopping.end_at_once(stopping.BEFORE_TRAINING)  # the imports below take seconds

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
      OSError: the folder cannot be written.
      Stopped: Ctrl-C or SIGTERM; a checkpoint is saved, the message says how to go on.

    Example:
      main(TrainConfig(dataset="digits", method="hrbp", epochs=5, out="runs/a"))["test_accuracy"]
    """
    steady_memory()
    result = Run(config, resume).train()
    assert result is not None
    return result


def cli(args: list[str] | None = None) -> None:
    """The command line.

    What goes wrong ends it with one line. The exit code is 2 for wrong arguments, a wrong folder
    or missing data; 1 where training diverges, or the disk becomes full or the data unreadable
    while it runs; 128 + the number of a signal.

    Args:
      args: None takes the process's arguments.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # names that the terminal cannot show
    try:
        with stopping.RaiseSignalled():
            _run(sys.argv[1:] if args is None else args)
    except KeyboardInterrupt as stop:
        began = isinstance(stop, stopping.Stopped)
        print(stop if began else stopping.BEFORE_TRAINING, file=sys.stderr)
        raise SystemExit(128 + stopping.number_of(stop)) from None


def _run(args: list[str]) -> None:
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
        if run.result is not None:
            print(
                f"the run has ended after {config.epochs} epochs; to extend it: "
                f"{run.folder.resume_command} --epochs N"
            )
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    try:
        result = run.train()
    except FloatingPointError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(1) from None
    except OSError as error:
        go_on = f"when that is mended, go on with: {run.folder.resume_command}"
        print(f"error: {error}; {go_on}", file=sys.stderr)
        raise SystemExit(1) from None
    assert result is not None
    name = f"{run.folder.path.name}, {config.method}"
    print(f"{name}: test accuracy {result['test_accuracy']:.2%}, density {result['density']:.4f}")
    if result["parameters"] < result["original_parameters"]:
        before, after = result["original_step_ms_median"], result["step_ms_median"]
        times = f"; a step takes {after:.3g} ms, before {before:.3g} ms" if before and after else ""
        print(
            f"a smaller network: {result['parameters']:,} of {result['original_parameters']:,} "
            f"parameters, {result['kept_flops_fraction']:.1%} of the FLOPs{times}"
        )
    if (summary := summary_of(run.state, config.method, run.trainer.shapes)) is not None:
        print(summary)


if __name__ == "__main__":
    cli()
