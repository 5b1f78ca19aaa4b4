"""Wall times of training steps: warm-up excluded, median and interquartile range."""

import time
from collections import defaultdict
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import jax
import numpy as np


class StepTimer:
    """Times the steps of one run; the first steps after each compilation do not count.

    Args:
      warm_up: steps of each kind that do not count.

    Reference: ours.
    """

    def __init__(self, warm_up: int = 3):
        self._warm_up = warm_up
        self._seen: dict[Hashable, int] = defaultdict(int)
        self._times: dict[str, list[float]] = defaultdict(list)

    def time(self, kind: str, program: Hashable, function: Callable[[], Any]) -> Any:
        """Calls a function, waits for its result, and books the time.

        Args:
          kind: under which name the time counts.
          program: what is compiled: a new value is a new compilation.
          function: without arguments.

        Returns:
          The function's result, ready.

        Reference: ours.
        """
        start = time.perf_counter()
        out = jax.block_until_ready(function())
        elapsed = time.perf_counter() - start
        self._seen[kind, program] += 1
        if self._seen[kind, program] > self._warm_up:
            self._times[kind].append(1e3 * elapsed)
        return out

    def milliseconds(self, kind: str) -> list[float]:
        """The times of one kind so far.

        Args:
          kind: as given to `time`.

        Returns:
          Milliseconds, in order.

        Reference: ours.
        """
        return self._times[kind]


def median_iqr(milliseconds: Sequence[float]) -> tuple[float | None, float | None]:
    """Median and interquartile range.

    Args:
      milliseconds: times of one step each.

    Returns:
      `(median, q75 - q25)` in milliseconds, rounded to 1 microsecond; (None, None) of no times.

    Example:
      >>> median_iqr([1.0, 2.0, 3.0, 4.0, 5.0])
      (3.0, 2.0)

    Reference: ours.
    """
    if not milliseconds:
        return None, None
    low, middle, high = np.percentile(milliseconds, (25, 50, 75))
    return round(float(middle), 3), round(float(high - low), 3)


def alternate(functions: dict[str, Callable[[], Any]], repetitions: int, warm_up: int = 2) -> dict[str, list[float]]:
    """Times several functions in turn, round after round, so that a slow phase of the machine meets all of them.

    Args:
      functions: name -> a function without arguments, whose result is waited for.
      repetitions: rounds that count.
      warm_up: rounds before, with the compilation.

    Returns:
      Name -> milliseconds of each repetition.

    Reference: ours.
    """
    timer = StepTimer(warm_up)
    for _ in range(warm_up + repetitions):
        for name, function in functions.items():
            timer.time(name, None, function)
    return {name: timer.milliseconds(name) for name in functions}
