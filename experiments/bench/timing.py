"""Wall times, of training steps and of single calls: warm-up excluded, several in turn, median and
interquartile range.
"""

import time
from collections import defaultdict
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

BURST, MOST = 30.0, 1000  # milliseconds of calls in a row, and how many at most


class StepTimer:
    """Times the steps of one run; the first steps after each compilation do not count.

    Args:
      warm_up: steps of each kind that do not count.
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
    """
    if not milliseconds:
        return None, None
    low, middle, high = np.percentile(milliseconds, (25, 50, 75))
    return round(float(middle), 3), round(float(high - low), 3)


def alternate(
    functions: dict[str, Callable[[], Any]], repetitions: int, warm_up: int = 2
) -> dict[str, list[float]]:
    """Times several functions in turn, round after round, so that a slow phase of the machine meets
    all of them.

    Args:
      functions: name -> a function without arguments, whose result is waited for.
      repetitions: rounds that count.
      warm_up: rounds before, with the compilation.

    Returns:
      Name -> milliseconds of each repetition.
    """
    timer = StepTimer(warm_up)
    for _ in range(warm_up + repetitions):
        for name, function in functions.items():
            timer.time(name, None, function)
    return {name: timer.milliseconds(name) for name in functions}


def clocked(function: Callable[[], Any]) -> Callable[[], float]:
    """A function that calls another, waits for its result, and tells how long that took.

    Args:
      function: without arguments; gives jax arrays.

    Returns:
      A function without arguments that returns milliseconds.

    Example:
      >>> clocked(lambda: jax.numpy.ones(3))() > 0
      True
    """

    def call() -> float:
        start = time.perf_counter()
        jax.block_until_ready(function())
        return 1e3 * (time.perf_counter() - start)

    return call


def in_turn(
    calls: Mapping[Any, Callable[[], float]], *, seconds: float, rounds: int = 5
) -> dict[Any, list[float]]:
    """Times calls in turn (a, b, c, b, c, a, ...), each round in an order of its own, for about as
    long as wished.

    Whoever runs in another process times itself there: the way to it is not its time. Each
    repetition calls for `BURST` milliseconds (at least once) that do not count, then for as long
    again, of which the median counts: so each meets the caches, the clock and the threads as it
    leaves them itself, not as its neighbour does.

    Args:
      calls: name -> a function that does its work once and returns the milliseconds it took. The
        first two calls of each do not count, except of one that takes longer than `seconds`: it is
        timed once.
      seconds: to spend on all of them together.
      rounds: at least so many.

    Returns:
      Name -> milliseconds of each repetition.

    Example:
      >>> in_turn({"a": lambda: 1.0, "b": lambda: 2000.0}, seconds=1, rounds=3)
      {'a': [1.0, 1.0, ..., 1.0], 'b': [2000.0]}
    """
    second = {}
    for name, call in calls.items():
        call()
        second[name] = call()
    quick = [name for name, t in second.items() if t <= 1e3 * seconds]
    count = (
        max(rounds, int(1e3 * seconds / sum(2 * max(second[name], BURST) for name in quick)))
        if quick
        else 0
    )
    times: dict[Any, list[float]] = {
        name: [] if name in quick else [t] for name, t in second.items()
    }
    rng = np.random.default_rng()
    for _ in range(count):
        for place in rng.permutation(len(quick)):
            name = quick[place]
            _burst(calls[name])
            times[name].append(float(np.median(_burst(calls[name]))))
    return times


def _burst(call: Callable[[], float]) -> list[float]:
    times = [call()]
    while sum(times) < BURST and len(times) < MOST:
        times.append(call())
    return times
