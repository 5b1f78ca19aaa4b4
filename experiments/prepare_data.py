"""Converts the original files of a data set to the TFDS layout, which training reads.

    python -m experiments.prepare_data --dataset cifar10 --source cifar-10-python.tar.gz
    python -m experiments.prepare_data --dataset mnist --source FOLDER --data-dir data

CIFAR and MNIST take seconds, tiny_imagenet a minute, imagenet2012 hours and 150 GB. Without
--source the official archive is downloaded (mnist, cifar10, cifar100, tiny_imagenet). TensorFlow is
not needed.
"""

import dataclasses
import sys
from pathlib import Path
from typing import Literal

import tyro

from experiments.data.prepare import Summary, prepare
from experiments.data.specs import SPECS


@dataclasses.dataclass(frozen=True)
class Config:
    """The data set to convert, its source and its destination."""

    dataset: Literal["mnist", "cifar10", "cifar100", "tiny_imagenet", "imagenet2012"]
    """name of the data set"""
    source: Path | None = None
    """the original archive, folder or .npz of arrays; without it the official archive is
    downloaded"""
    data_dir: Path = Path("data")
    """the TFDS folder to write into; training takes the same --data-dir"""
    overwrite: bool = False
    """whether to replace an existing copy"""
    name: str | None = None
    """what tables call this copy, where it is not the official one: 'CIFAR-10 (q75)'"""


def main(config: Config) -> Summary:
    """Converts a data set.

    Args:
      config: the data set, its source and its destination.

    Returns:
      The folder, the number of examples, the size and the duration.

    Raises:
      ValueError: the data set is unknown, the source is wrong or corrupted, or a prepared copy
        exists already.
      FileNotFoundError: the source, or a part of it, is missing.
    """
    summary = prepare(
        config.dataset,
        config.data_dir,
        source=config.source,
        overwrite=config.overwrite,
        shown=config.name,
    )
    _print_summary(config.dataset, summary)
    return summary


def _print_summary(name: str, summary: Summary) -> None:
    print(f"{name}: {summary.folder}, {summary.megabytes:.1f} MB, {summary.seconds:.1f} s")
    for (split, count), official in zip(summary.counts.items(), SPECS[name].sizes, strict=True):
        note = "" if count == official else f" (the official set has {official:,})"
        print(f"  {split:<11}{count:>10,} examples{note}")


def cli(args: list[str] | None = None) -> None:
    """Runs the command line.

    Wrong arguments or sources and unwritable folders end it with one line and exit code 2, Ctrl-C
    with one line and 130.

    Args:
      args: the arguments; None takes those of the process.
    """
    config = tyro.cli(
        Config, args=args, prog="python -m experiments.prepare_data", description=__doc__
    )
    try:
        main(config)
    except (ValueError, OSError) as error:
        print("error:", " ".join(str(error).split()), file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        print(f"stopped: nothing was written into {config.data_dir}", file=sys.stderr)
        raise SystemExit(130) from None


if __name__ == "__main__":
    cli()
