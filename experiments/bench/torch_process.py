"""Our end of `torch_baseline.py`: PyTorch's convolutions in a process of another Python, run one
call at a time.
"""

import json
import os
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

import numpy as np

POLICIES = ("active", "passive")
SCRIPT = Path(__file__).with_name("torch_baseline.py")


class TorchProcess:
    """PyTorch in another process, which holds one job's arrays and idles until it is asked; use it
    in a `with` statement.

    Args:
      python: path of a Python that has PyTorch and NumPy.
      policy: how PyTorch's threads wait for each other inside a call: "active", as OpenMP does by
        default (the faster one by far for small layers on a quiet machine), or "passive" (where
        other processes want the cores).

    Attributes:
      version: of PyTorch.

    Raises:
      ValueError: there is no such Python, or it has no PyTorch; the message says how to make one.
    """

    def __init__(self, python: str, policy: str = "active"):
        how = "make one: python3 -m venv torchenv && torchenv/bin/python -m pip install torch numpy"
        environment = os.environ | (
            {"OMP_WAIT_POLICY": "passive", "KMP_BLOCKTIME": "0"} if policy == "passive" else {}
        )
        try:
            self._child = subprocess.Popen(
                [python, str(SCRIPT)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                env=environment,
            )
        except OSError as error:
            raise ValueError(
                f"torch: expected the path of a Python that has PyTorch, got {python!r} "
                f"({error.strerror}); {how}"
            ) from None
        try:
            about = self._answer()
        except RuntimeError as error:
            self.__exit__()
            raise ValueError(
                f"torch: expected the path of a Python that has PyTorch, got {python!r}: {error}; "
                f"{how}"
            ) from None
        self.version: str = about["torch"]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        for pipe in (self._child.stdin, self._child.stdout):
            assert pipe
            pipe.close()
        self._child.wait()

    def load(
        self, do: str, arrays: dict[str, np.ndarray | dict[str, np.ndarray]], **options: Any
    ) -> dict[str, Callable[[], float]]:
        """Hands over the arrays of a job; the former job is gone.

        Args:
          do: "conv" or "resnet".
          arrays: by file name; a dictionary of arrays becomes one file.
          options: of that job in `torch_baseline.py`.

        Returns:
          Name -> a function that runs it once and returns milliseconds.

        Raises:
          RuntimeError: PyTorch does not take it.
        """
        with tempfile.TemporaryDirectory() as folder:
            for name, value in arrays.items():
                if isinstance(value, dict):
                    np.savez(Path(folder) / f"{name}.npz", **value)  # type: ignore[arg-type]
                else:
                    np.save(Path(folder) / f"{name}.npy", value)
            names = self._ask(do=do, folder=folder, **options)["names"]
        return {name: lambda name=name: self._ask(do="run", name=name)["ms"] for name in names}

    def results(self, name: str) -> list[np.ndarray]:
        """Runs one call of the job.

        Args:
          name: as given by `load`.

        Returns:
          Its arrays: activations NHWC, kernels HWIO.
        """
        with tempfile.TemporaryDirectory() as folder:
            count = self._ask(do="results", name=name, folder=folder)["count"]
            return [np.load(Path(folder) / f"{i}.npy") for i in range(count)]

    def _ask(self, **request: Any) -> dict[str, Any]:
        assert self._child.stdin
        print(json.dumps(request), file=self._child.stdin, flush=True)
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._child.stdout
        line = self._child.stdout.readline()
        answer = (
            json.loads(line)
            if line
            else {"error": f"its process ended with status {self._child.wait()}"}
        )
        if "error" in answer:
            raise RuntimeError(answer["error"])
        return answer
