"""Convert the original files of a data set to the TFDS layout, from which training reads; without
TensorFlow.

    python -m experiments.prepare_data --dataset cifar10 --source cifar-10-python.tar.gz --data-dir
    data python -m experiments.prepare_data --dataset mnist --source FOLDER --data-dir data

CIFAR and MNIST take seconds, tiny_imagenet a minute, imagenet2012 hours and 150 GB. Without
--source the official archive is downloaded (mnist, cifar10, cifar100, tiny_imagenet).
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
    """What to convert, from where, to where."""

    dataset: Literal["mnist", "cifar10", "cifar100", "tiny_imagenet", "imagenet2012"]
    """name of the data set"""
    source: Path | None = None
    """the original archive, folder or .npz of arrays; left out: download the official archive"""
    data_dir: Path = Path("data")
    """the TFDS folder to write into, and to name in training"""
    overwrite: bool = False
    """replace an existing copy"""


@dataclasses.dataclass(frozen=True)
class Summary:
    """What was written.

    Args:
        folder: the folder of the version.
        counts: number of examples in each split.
        megabytes: size on disk, 10^6 bytes.
        seconds: time it took.
    """

    folder: Path
    counts: dict[str, int]
    megabytes: float
    seconds: float


def main(config: Config) -> Summary:
    """Convert a data set.

    Args:
        config: what to convert.

    Returns:
        A summary of what was written.

    Raises:
        ValueError: unknown data set, wrong or corrupted source, or a prepared copy is there
          already.
        FileNotFoundError: the source, or a part of it, is missing.
    """
    name = config.dataset
    choice("dataset", name, [key for key in SPECS if SPECS[key].source])
    if (there := prepared_versions(name, config.data_dir)) and not config.overwrite:
        raise ValueError(
            f"data_dir: {str(there[-1])!r} exists already; pass --overwrite to replace it"
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
    _report(name, summary)
    return summary


def _report(name: str, summary: Summary) -> None:
    print(f"{name}: {summary.folder}, {summary.megabytes:.1f} MB, {summary.seconds:.1f} s")
    for (split, count), official in zip(summary.counts.items(), SPECS[name].sizes, strict=True):
        print(
            f"  {split:<11}{count:>10,} examples"
            + ("" if count == official else f" (the official set has {official:,})")
        )


def _progress(items: Iterable[T], total: int, label: str) -> Iterator[T]:
    """The items, with a progress bar on a terminal."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    with Progress(
        *columns, console=Console(stderr=True), disable=not sys.stderr.isatty()
    ) as progress:
        yield from progress.track(items, total=total, description=label)


def _download(name: str, folder: Path) -> Path:
    """Fetch the official archive (or the folder of files) of a data set."""
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
                f"source: {url} cannot be fetched ({error}); fetch it by hand and pass --source"
            ) from error
    return folder / urls[0].rpartition("/")[2] if len(urls) == 1 else folder


def cli(args: list[str] | None = None) -> None:
    """The command line; what is wrong with the arguments or the source ends it with one line and
    exit code 2.

    Args:
        args: None takes the process's arguments.
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
