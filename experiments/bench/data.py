"""Times the path of ImageNet's data: images per second of a core, beside those of decoding alone.

`python -m experiments.bench.data` takes about a minute on 2 CPU cores. Without `--data-dir` the
images are synthetic JPEGs of ImageNet's usual size, 500x375 pixels, in memory. Decoding alone, and
decoding with the random crop, run in one thread; the pipeline of training runs in a thread on each
core, or with `--workers` in as many processes, and ends with normalised batches on the device.
"""

import dataclasses
import os
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import cv2
import jax
import numpy as np

from experiments.bench import command
from experiments.data.streaming import ImageNet, decoded, train_example
from experiments.data.tfds_layout import Example, open_split
from experiments.measuring.environment import origin
from experiments.measuring.timing import median_iqr
from experiments.reporting import markdown, results
from experiments.reporting.reports import data as report_tables

DISTINCT = 64  # synthetic images
HEIGHT, WIDTH, QUALITY = 375, 500, 90


@dataclasses.dataclass(frozen=True)
class Config:
    """What is timed.

    Attributes:
      images: of each repetition, in one thread.
      batches: of each repetition of the pipeline.
      batch_size: images in a batch.
      repetitions: of each row, in turn.
      workers: processes of the pipeline; 0 for threads of one.
      data_dir: a folder with a prepared ImageNet, to read its files; None makes images.
      out: JSON file; None is experiments/results/bench_data_cpu.json.
      quick: few small batches; writes a file only if `out` is given.
    """

    images: int = 256
    batches: int = 24
    batch_size: int = 64
    repetitions: int = 5
    workers: int = 0
    data_dir: str | None = None
    out: str | None = None
    quick: bool = False


class Synthetic(Sequence[Example]):
    """Examples of JPEGs that are made once; each is there many times.

    Args:
      length: number of examples.
    """

    def __init__(self, length: int):
        self._length = length
        rng = np.random.default_rng(0)
        self._files = [_jpeg(rng) for _ in range(min(DISTINCT, length))]

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: Any) -> Any:
        number = index % len(self._files)
        return {"image": self._files[number], "label": number, "file_name": b"%d.JPEG" % number}


def _jpeg(rng: np.random.Generator) -> bytes:
    """Smooth shapes with some noise: about 100 KB, as ImageNet's files have."""
    coarse = rng.integers(0, 256, (12, 16, 3), np.uint8)
    shapes = cv2.resize(coarse, (WIDTH, HEIGHT), interpolation=cv2.INTER_CUBIC)
    noise = rng.normal(0, 12, shapes.shape)
    pixels = np.clip(shapes + noise, 0, 255).astype(np.uint8)
    return cv2.imencode(".jpg", pixels, [cv2.IMWRITE_JPEG_QUALITY, QUALITY])[1].tobytes()


def main(config: Config) -> dict[str, Any]:
    """Times the path, prints the table and writes the JSON file.

    Args:
      config: what is timed.

    Returns:
      The report: a row for each part of the path, device, versions and commit.
    """
    if config.quick:
        config = dataclasses.replace(config, images=8, batches=6, batch_size=4, repetitions=2)
    cores = len(os.sched_getaffinity(0))
    threads = 1 if config.workers else cores
    ahead = threads * max(config.workers, 1)  # batches that are ready when the first one is
    count = config.batch_size * (config.batches + ahead + 1)
    if config.data_dir is None:
        examples: Sequence[Example] = Synthetic(count)
    else:
        examples = open_split("imagenet2012", config.data_dir, "train")
    data = ImageNet(examples, examples, threads=threads, workers=config.workers)
    used = min(cores, ahead)
    calls: dict[str, tuple[int, Callable[[], float]]] = {
        "decode": (1, lambda: _alone(lambda example, rng: decoded(example), examples, config)),
        "decode, crop": (1, lambda: _alone(train_example, examples, config)),
        "decode, crop, batch, normalise on the device": (
            used,
            lambda: _pipeline(data, config, ahead),
        ),
    }
    speeds: dict[str, list[float]] = {what: [] for what in calls}
    for _ in range(config.repetitions):
        for what, (busy, call) in calls.items():
            speeds[what].append(call() / busy)
    floor = float(np.median(speeds["decode"]))
    report = origin() | {
        "config": results.settings(config),
        "image": "synthetic" if config.data_dir is None else "imagenet2012",
        "kilobytes": round(float(np.mean([len(examples[i]["image"]) for i in range(64)])) / 1e3, 1),
        "rows": [
            {
                "what": what,
                "cores": calls[what][0],
                "images_per_second_and_core": median_iqr(values, 1)[0],
                "iqr": median_iqr(values, 1)[1],
                "of_the_floor": round(float(np.median(values)) / floor, 3),
            }
            for what, values in speeds.items()
        ],
    }
    markdown.show(report_tables.table(report))
    if config.out or not config.quick:
        results.write(report, config.out or results.RESULTS / "bench_data_cpu.json")
    return report


def _alone(
    work: Callable[[Example, np.random.Generator], Any],
    examples: Sequence[Example],
    config: Config,
) -> float:
    """Images per second of one thread."""
    rng = np.random.default_rng(0)
    start = time.perf_counter()
    for row in range(config.images):
        work(examples[row], rng)
    return config.images / (time.perf_counter() - start)


def _pipeline(data: ImageNet, config: Config, ahead: int) -> float:
    """Images per second of all cores, once threads and processes run."""
    batches = data.train_batches(0, config.batch_size, seed=0)
    jax.block_until_ready(next(batches))
    start = time.perf_counter()
    for _ in range(config.batches + ahead):
        batch = next(batches)
    jax.block_until_ready(batch)
    return config.batch_size * config.batches / (time.perf_counter() - start)


def cli(arguments: Sequence[str]) -> int:
    """Runs the command.

    Args:
      arguments: without the program's name.

    Returns:
      The exit status.
    """
    return command.run(Config, main, "experiments.bench.data", __doc__, arguments)


if __name__ == "__main__":
    raise SystemExit(cli(sys.argv[1:]))
