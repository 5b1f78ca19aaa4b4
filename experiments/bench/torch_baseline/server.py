"""Answers a benchmark's requests: load a job, run a call once, hand over what a call returns.

Runs in the Python that has PyTorch, as `python -m experiments.bench.torch_baseline.server`. It
reads one JSON object per line and answers with one; `process.py` is its other end. It measures each
call itself, with PyTorch at its best (channels_last, an allocator that keeps its memory), and
answers only when its threads sleep: while the other side is timed, nothing runs here.
"""

import json
import os
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from experiments.bench.torch_baseline import convolution, gpu_training, inference, training
from experiments.bench.torch_baseline.job import Job
from experiments.measuring.memory import steady_memory

JOBS: dict[str, Callable[..., Job]] = {
    "convolution": convolution.load,
    "gpu_training": gpu_training.load,
    "inference": inference.load,
    "training": training.load,
}
IDLE_SECONDS = 2e-4  # of processor time in one look: with less, all threads sleep
LOOK_SECONDS = 2e-3  # between two looks


def main() -> None:
    """Answers requests until standard input ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a library prints is not taken for an answer
    warnings.filterwarnings("ignore")
    steady_memory(one_arena=False)
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    server = Server()
    print(json.dumps({"torch": torch.__version__}), file=answers, flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        try:
            answer = getattr(server, request.pop("command"))(**request)
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), file=answers, flush=True)


class Server:
    """Holds one job; every method is a command."""

    def __init__(self) -> None:
        self._job = Job({}, list)

    def load(self, job: str, folder: str, **options: Any) -> dict[str, Any]:
        """Loads the arrays of a job, in the place of the former one.

        Args:
          job: one of `JOBS`.
          folder: of the arrays.
          options: of the job.

        Returns:
          The names of its calls.
        """
        self._job = JOBS[job](folder, **options)
        return {"names": list(self._job.calls)}

    def run(self, name: str) -> dict[str, Any]:
        """Runs a call and returns its milliseconds, once the threads sleep again."""
        start = time.perf_counter()
        self._job.calls[name]()
        elapsed = time.perf_counter() - start
        _wait_for_threads()
        return {"ms": 1e3 * elapsed}

    def results(self, name: str, folder: str) -> dict[str, Any]:
        """Runs a call and writes what it returns as 0.npy, 1.npy, ...

        Args:
          name: of the call.
          folder: of the files.

        Returns:
          How many files there are.
        """
        arrays = self._job.to_arrays(self._job.calls[name]())
        for i, array in enumerate(arrays):
            np.save(Path(folder) / f"{i}.npy", array)
        return {"count": len(arrays)}


def _wait_for_threads() -> None:
    """Waits until OpenMP's threads, which wait for more work for some milliseconds, sleep."""
    used = time.process_time()
    while True:
        time.sleep(LOOK_SECONDS)
        before, used = used, time.process_time()
        if used - before <= IDLE_SECONDS:
            return


if __name__ == "__main__":
    main()
