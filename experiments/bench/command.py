"""How the commands of the benchmarks start and end."""

import itertools
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import tyro

from experiments.bench.gpu.journal import LOST, STOPPED, DeviceLost

Config = TypeVar("Config")


def run(
    config_type: type[Config],
    main: Callable[[Config], Mapping[str, Any]],
    module: str,
    description: str | None,
    arguments: Sequence[str],
) -> int:
    """Runs a command and returns its exit status.

    Args:
      config_type: a dataclass; its fields are the options.
      main: does the work, and returns what `exit_status` expects.
      module: the command's name, as behind `python -m`.
      description: for `--help`.
      arguments: without the program's name.

    Returns:
      The exit status, see `exit_status`.
    """
    config = parse(config_type, module, description, arguments)
    return exit_status(lambda: main(config))


def parse(
    config_type: type[Config], module: str, description: str | None, arguments: Sequence[str]
) -> Config:
    """Reads a command line, see `run` for the arguments; `--help` and a typo end the program."""
    return tyro.cli(
        config_type, prog=f"python -m {module}", description=description, args=arguments
    )


def asks_for_gpu(arguments: Sequence[str]) -> bool:
    """Returns whether a command line says `--device gpu`; the command then has other options.

    Args:
      arguments: without the program's name.

    Example:
      >>> asks_for_gpu(["--device", "gpu", "--quick"]), asks_for_gpu(["--device=cpu"])
      (True, False)
    """
    return "--device=gpu" in arguments or ("--device", "gpu") in itertools.pairwise(arguments)


def exit_status(work: Callable[[], Mapping[str, Any]]) -> int:
    """Runs a command, prints in one line what stopped it, and returns its exit status.

    Args:
      work: returns a report. Where it can stop before its end, "complete" says whether it did not,
        and "failed" holds what failed.

    Returns:
      0; 1 when something failed or a result was wrong; 2 for a wrong argument; `LOST` when the
      device does not answer any more; `STOPPED` when time was up.

    Example:
      >>> exit_status(lambda: {}), exit_status(lambda: {"complete": False, "failed": []})
      (0, 75)
    """
    try:
        report = work()
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except AssertionError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except DeviceLost as error:
        print(
            f"the device was lost at {error}; call the same command again, it goes on after it",
            file=sys.stderr,
        )
        return LOST
    if not report.get("complete", True):
        return STOPPED
    return 1 if report.get("failed") else 0
