"""`prepare` converts the original files of a data set to the TFDS layout, which `load` reads."""

import contextlib
import dataclasses
import http.client
import sys
import time
import urllib.request
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from blocksparse_jax._checks import choice
from experiments.data import shown_name
from experiments.data.sources import open_source
from experiments.data.specs import SPECS
from experiments.data.tfds_layout import prepared_versions, write
from experiments.data.work_folder import work_folder

T = TypeVar("T")


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


def prepare(
    name: str,
    data_dir: Path,
    *,
    source: Path | None = None,
    overwrite: bool = False,
    shown: str | None = None,
) -> Summary:
    """Converts a data set; downloads it first where no source is given.

    Args:
      name: of the data set.
      data_dir: the TFDS folder to write into.
      source: the original archive, folder or .npz of arrays; None downloads the official archive.
      overwrite: whether to replace an existing copy.
      shown: what tables call this copy, where it is not the official one.

    Returns:
      The folder, the number of examples, the size and the duration.

    Raises:
      ValueError: the data set is unknown, the source is wrong or corrupted, a prepared copy exists
        already, or another process prepares it.
      FileNotFoundError: the source, or a part of it, is missing.
    """
    choice("dataset", name, [key for key in SPECS if SPECS[key].source])
    versions = prepared_versions(name, data_dir)
    if versions and not overwrite:
        raise ValueError(
            f"data_dir: {str(versions[-1])!r} exists already; pass --overwrite to replace it"
        )
    start = time.perf_counter()
    with contextlib.ExitStack() as stack:
        if source is None:
            work = stack.enter_context(work_folder(data_dir / f".{name}.download"))
            source = _download(name, work)
        opened = stack.enter_context(open_source(name, source))
        examples = _progress(opened.examples, opened.total, name)
        folder, counts = write(name, data_dir, examples, opened.class_names, overwrite=overwrite)
    shown_file = folder.parent / shown_name.FILE
    shown_file.unlink(missing_ok=True)  # of the copy before
    if shown:
        shown_file.write_text(f"{shown}\n")
    megabytes = sum(file.stat().st_size for file in folder.iterdir()) / 1e6
    return Summary(folder, counts, megabytes, time.perf_counter() - start)


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
        except (OSError, http.client.HTTPException) as error:
            raise FileNotFoundError(
                f"source: {url} cannot be fetched ({error}); fetch it yourself and pass --source"
            ) from error
    return folder / urls[0].rpartition("/")[2] if len(urls) == 1 else folder
