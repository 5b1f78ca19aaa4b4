"""The command line of `experiments.train`: the run's flags and the chosen method's own."""

import argparse
import dataclasses
import difflib
from pathlib import Path
from typing import Annotated, Any

import tyro

from experiments.training.config import TrainConfig, resolve
from experiments.training.methods import Options
from experiments.training.registry import METHODS, method
from experiments.training.run_folder import RunFolder

_PROGRAM = "python -m experiments.train"


def parse(args: list[str]) -> tuple[TrainConfig, bool]:
    """What to train.

    With `--resume` the run's own config stands for the flags that are not given, with `--masks`
    that of the run which has the masks.

    Args:
      args: of the process, without its name.

    Returns:
      The resolved config, and whether to resume.

    Raises:
      ValueError: a wrong value; the message names the field.
      SystemExit: an unknown flag, or `--help`.
    """
    folder = _resumed_folder(args)
    if folder is None:
        config, resume = _parse(args, _defaults(args))
    else:
        config, resume = _parse(args, dataclasses.replace(folder.config(), out=str(folder.path)))
        folder.continued(config)  # before `resolve`, which would not know what was given
    return resolve(config), resume


def _defaults(args: list[str]) -> TrainConfig:
    """The config of the run whose masks are used; without one the usual defaults."""
    masks = _scan(args).masks
    if masks is None or not (Path(masks) / "config.json").exists():
        return TrainConfig()
    own = {"out": None, "keep_checkpoint": None, "rewind": None, "mask_epochs": None}
    return dataclasses.replace(RunFolder(masks).config(), masks=masks, **own)


def _resumed_folder(args: list[str]) -> RunFolder | None:
    """The folder of the run that goes on; None where there is none, or no `--resume`."""
    scanned = _scan(args)
    if not scanned.resume:
        return None
    folder = RunFolder(scanned.out or str(resolve(_parse(args, _defaults(args))[0]).out))
    return folder if (folder.path / "config.json").exists() else None


def method_of(args: list[str]) -> str | None:
    """The value of `--method`; None where it is not given."""
    return _scan(args).method


def _scan(args: list[str]) -> argparse.Namespace:
    """What decides which flags there are, before they are parsed."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--method")
    parser.add_argument("--out")
    parser.add_argument("--masks")
    parser.add_argument("--resume", action="store_true")
    return parser.parse_known_args(args)[0]


def _parse(args: list[str], default: TrainConfig) -> tuple[TrainConfig, bool]:
    name = method_of(args) or default.method
    options = method(name).options
    if default.options is not None and name == default.method:
        options = default.options
    _refuse_other_methods(args, name)
    # What tyro says about a wrong flag sends the reader to the help of this method.
    program = f"{_PROGRAM} --method {name}" if method_of(args) or default.options else _PROGRAM
    arguments: Any = tyro.cli(_arguments(name, options, default), args=args, prog=program)
    config = dataclasses.replace(arguments.config, options=getattr(arguments, "options", options))
    return config, arguments.resume


def _arguments(name: str, options: Options, default: TrainConfig) -> type:
    """The flags: those of the run without a prefix, those of the method behind its name."""
    config = Annotated[TrainConfig, tyro.conf.arg(name="")]
    fields: list[tuple[str, Any, Any]] = [("config", config, dataclasses.field(default=default))]
    if dataclasses.fields(options):
        prefixed = Annotated[type(options), tyro.conf.arg(name=name)]
        fields.append(("options", prefixed, dataclasses.field(default=options)))
    fields.append(("resume", bool, False))
    arguments = dataclasses.make_dataclass("Arguments", fields, frozen=True)
    arguments.__doc__ = """Trains one network with one method; `--method list` prints all methods.

    Attributes:
      resume: go on with the run in --out, from its last checkpoint and with its config; flags that
        are given must agree with it, but --epochs may extend a run that has ended.
    """
    return arguments


def _refuse_other_methods(args: list[str], name: str) -> None:
    """ValueError where a flag is another method's, or would be if it were spelt right."""
    for flag in (arg.partition("=")[0] for arg in args if arg.startswith("--")):
        other, _, option = flag.removeprefix("--").replace("_", "-").partition(".")
        if not option or other not in METHODS or other == name:
            continue
        fields = dataclasses.fields(METHODS[other].options)
        options = [field.name.replace("_", "-") for field in fields]
        if option.removeprefix("no-") in options:
            raise ValueError(
                f"{flag}: an option of {other}, and the method is {name}; add --method {other}, or "
                f"leave the option out"
            )
        nearest = difflib.get_close_matches(option, options, n=1)
        hint = f", did you mean --{other}.{nearest[0]}?" if nearest else ""
        raise ValueError(
            f"{flag}: {other} has no such option{hint}; all of them: {_PROGRAM} --method {other} "
            "--help"
        )
