"""Converts the original files of a data set to the TFDS layout, which training reads.

    python -m experiments.prepare_data --dataset cifar10 --source cifar-10-python.tar.gz
    python -m experiments.prepare_data --dataset mnist --source FOLDER --data-dir data

CIFAR and MNIST take seconds, tiny_imagenet a minute, imagenet2012 hours and 150 GB. Without
--source the official archive is downloaded (mnist, cifar10, cifar100, tiny_imagenet). TensorFlow is
not needed.
"""

import dataclasses
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Literal, TypeVar

import tyro
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from blocksparse_jax._checks import choice
from experiments.data.sources import open_source
from experiments.data.specs import SPECS
from experiments.data.tfds_layout import prepared_versions, write

T = TypeVar("T")


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


@dataclasses.dataclass(frozen=True)
class Summary:
    """The result of a conversion.

    Attributes:
      folder: the folder of the version.
      counts: number of examples in each split.
      megabytes: size on disk, in units of 10^6 bytes.
      seconds: duration of the conversion.
    """

    folder: Path
    counts: dict[str, int]
    megabytes: float
    seconds: float


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
    name = config.dataset
    choice("dataset", name, [key for key in SPECS if SPECS[key].source])
    versions = prepared_versions(name, config.data_dir)
    if versions and not config.overwrite:
        raise ValueError(
            f"data_dir: {str(versions[-1])!r} exists already; pass --overwrite to replace it"
        )
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as scratch:
        path = config.source or _download(name, Path(scratch))
        with open_source(name, path) as source:
            examples = _progress(source.examples, source.total, name)
            folder, counts = write(
                name, config.data_dir, examples, source.class_names, overwrite=config.overwrite
            )
    megabytes = sum(file.stat().st_size for file in folder.iterdir()) / 1e6
    summary = Summary(folder, counts, megabytes, time.perf_counter() - start)
    _print_summary(name, summary)
    return summary


def _print_summary(name: str, summary: Summary) -> None:
    print(f"{name}: {summary.folder}, {summary.megabytes:.1f} MB, {summary.seconds:.1f} s")
    for (split, count), official in zip(summary.counts.items(), SPECS[name].sizes, strict=True):
        note = "" if count == official else f" (the official set has {official:,})"
        print(f"  {split:<11}{count:>10,} examples{note}")


def _progress(items: Iterable[T], total: int, label: str) -> Iterator[T]:
    """Yields the items and, on a terminal, shows a progress bar."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    console = Console(stderr=True)
    with Progress(*columns, console=console, disable=not sys.stderr.isatty()) as progress:
        yield from progress.track(items, total=total, description=label)


def _download(name: str, folder: Path) -> Path:
    """Downloads the official archive of a data set, or its folder of files, into `folder`."""
    urls = SPECS[name].urls
    if not urls:
        raise ValueError(
            f"source: {name} needs a registration to download; give --source {SPECS[name].source}"
        )
    for url in urls:
        print(f"downloading {url}", file=sys.stderr)
        try:
            urllib.request.urlretrieve(url, folder / url.rpartition("/")[2])
        except OSError as error:
            raise FileNotFoundError(
                f"source: {url} cannot be fetched ({error}); fetch it yourself and pass --source"
            ) from error
    return folder / urls[0].rpartition("/")[2] if len(urls) == 1 else folder


def cli(args: list[str] | None = None) -> None:
    """Runs the command line. Wrong arguments or sources end it with one line and exit code 2.

    Args:
      args: the arguments; None takes those of the process.
    """
    config = tyro.cli(
        Config, args=args, prog="python -m experiments.prepare_data", description=__doc__
    )
    try:
        main(config)
    except (ValueError, FileNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None


if __name__ == "__main__":
    cli()
