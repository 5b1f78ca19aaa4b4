"""Wall times of calls and of training steps: warm-up excluded, median and interquartile range.

`call_and_time` reads the clock for all of them. `time_in_turn` times calls against each other;
`StepTimer` keeps the times of the steps of one training run.
"""

import math
import time
from collections import defaultdict
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

LONGEST_WAIT_MS = 500.0  # of steps that a training run may have under way
BURST_MS = 30.0  # how long one call is repeated before its neighbour has its turn
MAX_BURST_CALLS = 1000


class StepTimer:
    """Times the steps of one training run without waiting for each of them.

    The first calls after each compilation are waited for and do not count. The steps that follow
    run on while the next ones are prepared, up to `wait` or a step of another kind. Each counts
    with the mean of all that ran on together, so what the loop does between them counts too. At
    most half a second of steps is under way, so that a request to stop is heard soon.

    Args:
      warm_up: calls after each compilation that do not count.
    """

    def __init__(self, warm_up: int = 3):
        self._warm_up = warm_up
        self._calls: dict[Hashable, int] = defaultdict(int)
        self._times_ms: dict[Hashable, list[float]] = defaultdict(list)
        self._kind: Hashable = None  # of the steps under way
        self._steps, self._start = 0, 0.0
        self._last: Any = None

    def time(
        self, kind: Hashable, program: Hashable, function: Callable[[], Any], steps: int = 1
    ) -> Any:
        """Calls a function and keeps the time until its result is ready.

        Args:
          kind: the name under which the time counts.
          program: identifies what is compiled: a new value means a new compilation.
          function: takes no arguments; returns JAX arrays.
          steps: how many it makes.

        Returns:
          The function's result, which need not be ready.
        """
        warming = self._calls[kind, program] < self._warm_up
        if warming or kind != self._kind:
            self.wait()
        start = time.perf_counter()
        result = function()
        self._calls[kind, program] += 1
        if warming:
            return jax.block_until_ready(result)
        if not self._steps:
            self._kind, self._start = kind, start
        self._steps, self._last = self._steps + steps, result
        known = self._times_ms[kind]
        if not known or (self._steps + steps) * known[-1] > LONGEST_WAIT_MS:
            self.wait()
        return result

    def wait(self) -> None:
        """Waits for the steps under way."""
        if self._steps:
            jax.block_until_ready(self._last)
            elapsed_ms = 1e3 * (time.perf_counter() - self._start)
            self._times_ms[self._kind] += [elapsed_ms / self._steps] * self._steps
        self._kind, self._steps, self._last = None, 0, None

    def milliseconds(self, kind: Hashable) -> list[float]:
        """Returns the times of one kind so far, in order, after `wait`."""
        self.wait()
        return self._times_ms[kind]


def call_and_time(function: Callable[[], Any]) -> tuple[Any, float]:
    """Calls a function and waits for its result.

    Args:
      function: takes no arguments; returns JAX arrays.

    Returns:
      `(result, milliseconds)`.
    """
    start = time.perf_counter()
    result = jax.block_until_ready(function())
    return result, 1e3 * (time.perf_counter() - start)


def timed(function: Callable[[], Any]) -> Callable[[], float]:
    """Turns a function into one that returns how long a call took, as `time_in_turn` expects.

    Args:
      function: takes no arguments; returns JAX arrays, which are waited for.

    Returns:
      A function without arguments that returns milliseconds.

    Example:
      >>> timed(lambda: jax.numpy.ones(3))() > 0
      True
    """
    return lambda: call_and_time(function)[1]


def time_in_turn(
    calls: Mapping[Any, Callable[[], float]],
    *,
    rounds: int = 5,
    seconds: float = 0.0,
    patience: float = math.inf,
    burst_ms: float = BURST_MS,
) -> dict[Any, list[float]]:
    """Times calls in turn, so that a slow spell of the machine hits all of them alike.

    Every round has another order. A turn of a call has two bursts of `burst_ms` each. The first
    does not count: it brings caches, clock rate and threads into the state in which the call itself
    leaves them, not its neighbour. The median of the second burst is one repetition.

    Args:
      calls: by name; a call does its work once and returns the milliseconds that it took. A call
        that runs in another process measures itself there, so that communication does not count.
        The first two calls of each do not count.
      rounds: the least number of rounds.
      seconds: how long to measure; more rounds are run until this much time has passed.
      patience: a call that takes longer than this many seconds is timed once.
      burst_ms: the length of a burst in milliseconds (one call at least); with 0 a turn is one
        call, which counts.

    Returns:
      The milliseconds of every repetition, by name.

    Example:
      >>> times = time_in_turn({"a": lambda: 1.0, "b": lambda: 2000.0}, rounds=3, patience=1)
      >>> times["a"], times["b"]
      ([1.0, 1.0, 1.0], [2000.0])
    """
    second_ms = {}
    for name, call in calls.items():
        call()
        second_ms[name] = call()
    repeated = [name for name, ms in second_ms.items() if ms <= 1e3 * patience]
    times_ms = {name: [] if name in repeated else [ms] for name, ms in second_ms.items()}
    if not repeated:
        return times_ms

    bursts = 2 if burst_ms else 1
    round_ms = sum(bursts * max(second_ms[name], burst_ms) for name in repeated)
    rng = np.random.default_rng(0)
    for _ in range(max(rounds, int(1e3 * seconds / max(round_ms, 1e-3)))):
        for position in rng.permutation(len(repeated)):
            name = repeated[position]
            if burst_ms:
                _burst(calls[name], burst_ms)
            times_ms[name].append(float(np.median(_burst(calls[name], burst_ms))))
    return times_ms


def _burst(call: Callable[[], float], burst_ms: float) -> list[float]:
    """Repeats a call for `burst_ms` milliseconds, at least once."""
    times_ms = [call()]
    while sum(times_ms) < burst_ms and len(times_ms) < MAX_BURST_CALLS:
        times_ms.append(call())
    return times_ms


def median_iqr(times_ms: Sequence[float], digits: int = 3) -> tuple[float | None, float | None]:
    """Returns the median and the interquartile range of times.

    Args:
      times_ms: milliseconds.
      digits: decimal places of the result; 3 rounds to microseconds.

    Returns:
      `(median, q75 - q25)` in milliseconds; `(None, None)` if there are no times.

    Example:
      >>> median_iqr([1.0, 2.0, 3.0, 4.0, 5.0])
      (3.0, 2.0)
    """
    if not times_ms:
        return None, None
    low, middle, high = np.percentile(times_ms, (25, 50, 75))
    return round(float(middle), digits), round(float(high - low), digits)


def time_record(times_ms: Sequence[float], digits: int = 3) -> dict[str, Any]:
    """Returns what the reports hold of one timed call.

    Args:
      times_ms: milliseconds of its repetitions.
      digits: decimal places.

    Returns:
      `{"median", "iqr", "repetitions"}`, the first two in milliseconds.

    Example:
      >>> time_record([1.0, 2.0, 3.0])
      {'median': 2.0, 'iqr': 1.0, 'repetitions': 3}
    """
    median, iqr = median_iqr(times_ms, digits)
    return {"median": median, "iqr": iqr, "repetitions": len(times_ms)}
