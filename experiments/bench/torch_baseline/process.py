"""Our end of `server.py`: PyTorch in the process of another Python, run one call at a time."""

import functools
import json
import os
import subprocess
import tempfile
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Self

import numpy as np

from experiments.measuring.environment import ROOT

POLICIES = ("active", "passive")
_HOW_TO = "make one: python3 -m venv torchenv && torchenv/bin/python -m pip install torch numpy"


class TorchProcess:
    """PyTorch in another process, which holds one job's arrays and idles until it is asked.

    Use it in a `with` statement.

    Args:
      python: path of a Python that has PyTorch and NumPy.
      policy: how PyTorch's threads wait for each other inside a call: "active", as OpenMP does by
        default (much the faster one for small layers on a quiet machine), or "passive" (the better
        one where other processes want the cores).

    Attributes:
      version: of PyTorch.

    Raises:
      ValueError: there is no such Python, or it has no PyTorch; the message says how to make one.
    """

    def __init__(self, python: str, policy: str = "active"):
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        if policy == "passive":
            environment |= {"OMP_WAIT_POLICY": "passive", "KMP_BLOCKTIME": "0"}
        expected = f"torch: expected the path of a Python that has PyTorch, got {python!r}"
        try:
            self._child = subprocess.Popen(
                [python, "-m", "experiments.bench.torch_baseline.server"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                env=environment,
            )
        except OSError as error:
            raise ValueError(f"{expected} ({error.strerror}); {_HOW_TO}") from None
        try:
            self.version: str = self._answer()["torch"]
        except RuntimeError as error:
            self.__exit__()
            raise ValueError(f"{expected}: {error}; {_HOW_TO}") from None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        for pipe in (self._child.stdin, self._child.stdout):
            assert pipe
            pipe.close()
        self._child.wait()

    def load(
        self, job: str, arrays: Mapping[str, np.ndarray | dict[str, np.ndarray]], **options: Any
    ) -> dict[str, Callable[[], float]]:
        """Hands over the arrays of a job, in the place of the former one.

        Args:
          job: "convolution", "gpu_training", "inference" or "training".
          arrays: by file name; a dictionary of arrays becomes one file.
          options: of that job's `load`.

        Returns:
          Functions that run a call once and return its milliseconds, by name.

        Raises:
          RuntimeError: PyTorch does not take the job.
        """
        with tempfile.TemporaryDirectory() as folder:
            for name, value in arrays.items():
                if isinstance(value, dict):
                    np.savez(Path(folder) / f"{name}.npz", **value)  # type: ignore[arg-type]
                else:
                    np.save(Path(folder) / f"{name}.npy", value)
            names = self._ask(command="load", job=job, folder=folder, **options)["names"]
        return {name: functools.partial(self._run, name) for name in names}

    def _run(self, name: str) -> float:
        return self._ask(command="run", name=name)["ms"]

    def results(self, name: str) -> list[np.ndarray]:
        """Runs a call of the job and returns its arrays: activations NHWC, kernels HWIO."""
        with tempfile.TemporaryDirectory() as folder:
            count = self._ask(command="results", name=name, folder=folder)["count"]
            return [np.load(Path(folder) / f"{i}.npy") for i in range(count)]

    def _ask(self, **request: Any) -> dict[str, Any]:
        assert self._child.stdin
        print(json.dumps(request), file=self._child.stdin, flush=True)
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._child.stdout
        line = self._child.stdout.readline()
        if not line:
            raise RuntimeError(f"its process ended with status {self._child.wait()}")
        answer = json.loads(line)
        if "error" in answer:
            raise RuntimeError(answer["error"])
        return answer


def torch_processes(stack: ExitStack, python: str | None) -> dict[str, TorchProcess]:
    """Starts a process for each policy; none without a Python.

    Args:
      stack: ends the processes when it is closed.
      python: path of a Python that has PyTorch.

    Returns:
      Processes by policy.
    """
    if python is None:
        return {}
    return {policy: stack.enter_context(TorchProcess(python, policy)) for policy in POLICIES}
