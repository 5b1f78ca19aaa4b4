"""Schedules: at which steps masks change, and how much of a method is in force at a step.

A schedule is a callable step -> bool that takes Python ints and traced counts alike. All schedules
here are frozen dataclasses, so that two of the same settings are equal and can sit in the static
part of an optimizer state.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import jax.numpy as jnp
from jaxtyping import Array, Float

from blocksparse_jax import _checks

Schedule = Callable[[Any], Any]
Curve = Literal["cubic", "linear", "cos", "exp"]
CURVES: tuple[Curve, ...] = ("cubic", "linear", "cos", "exp")


@dataclasses.dataclass(frozen=True)
class Every:
    """True every `every` steps after `start` and before `until`; the first one is `start + every`.

    Attributes:
      every: steps between updates.
      start: the step from which they are counted; no update there, since nothing is learnt yet.
      until: no update at this step or later; None = forever.

    Example:
      >>> schedule = Every(every=100, until=300)
      >>> [step for step in range(0, 500, 50) if schedule(step)]
      [100, 200]

    Reference: Evci et al., "RigL", ICML 2020, algorithm 1.
    """

    every: int
    start: int = 0
    until: int | None = None

    def __post_init__(self) -> None:
        _checks.period("every", self.every)
        start = _checks.step("start", self.start)
        if self.until is not None:
            _checks.step("until", self.until, start=start)

    def __call__(self, count: Any) -> Any:
        """Whether `count` (int or int32 array) is an update step."""
        due = (count > self.start) & ((count - self.start) % self.every == 0)
        return due if self.until is None else due & (count < self.until)


@dataclasses.dataclass(frozen=True)
class Between:
    """True every `every` steps from `start` on, through `end`, and at `end` itself.

    Attributes:
      start: the first update.
      end: the last update, after `start`.
      every: steps between updates.

    Example:
      >>> schedule = Between(10, 15, every=2)
      >>> [step for step in range(20) if schedule(step)]
      [10, 12, 14, 15]

    Reference: Zhu & Gupta, "To prune, or not to prune", 2017.
    """

    start: int
    end: int
    every: int = 1

    @property
    def until(self) -> int:
        """No update at this step or later, as in `Every`."""
        return self.end + 1

    def __post_init__(self) -> None:
        _checks.step("end", self.end, start=_checks.step("start", self.start))
        _checks.period("every", self.every)

    def __call__(self, count: Any) -> Any:
        """Whether `count` (int or int32 array) is an update step."""
        inside = (count >= self.start) & (count <= self.end)
        return inside & (((count - self.start) % self.every == 0) | (count == self.end))


@dataclasses.dataclass(frozen=True)
class Never:
    """True at no step: masks that stay.

    Example:
      >>> Never()(3)
      False
    """

    def __call__(self, count: Any) -> Any:
        """False."""
        return count < 0


@dataclasses.dataclass(frozen=True)
class Always:
    """True at every step.

    Example:
      >>> Always()(3)
      True
    """

    def __call__(self, count: Any) -> Any:
        """True."""
        return count >= 0


@dataclasses.dataclass(frozen=True)
class Through:
    """True at every step up to `last`, and there.

    Attributes:
      last: the last step.

    Example:
      >>> [step for step in range(5) if Through(2)(step)]
      [0, 1, 2]
    """

    last: int

    def __call__(self, count: Any) -> Any:
        """Whether `count` is at most `last`."""
        return count <= self.last


@dataclasses.dataclass(frozen=True)
class AnyOf:
    """True where one of several schedules is.

    Attributes:
      schedules: the schedules.

    Example:
      >>> [step for step in range(9) if AnyOf((Through(0), Every(4)))(step)]
      [0, 4, 8]
    """

    schedules: tuple[Schedule, ...]

    def __call__(self, count: Any) -> Any:
        """Whether `count` is a step of any of them."""
        due = self.schedules[0](count)
        for schedule in self.schedules[1:]:
            due = due | schedule(count)
        return due


def check_schedule(schedule: Any) -> None:
    """Raises a ValueError unless the schedule can be called with a step."""
    if not callable(schedule):
        hint = _checks.static_hint("schedule", schedule)
        raise ValueError(
            f"schedule: expected a schedule such as every(100, until=30_000){hint}, got "
            f"{schedule!r}"
        )


def check_between(schedule: Any) -> Between:
    """The schedule; ValueError unless it is a `Between`, for methods that need its two ends."""
    if not isinstance(schedule, Between):
        hint = _checks.static_hint("schedule", schedule)
        raise ValueError(
            f"schedule: expected between(start, end, every=...){hint}, got {schedule!r}"
        )
    return schedule


def every(n: int, start: int = 0, until: int | None = None) -> Every:
    """A schedule that is due every `n` steps after `start` and before `until`.

    Args:
      n: steps between updates.
      start: the step from which they are counted; the first update is at `start + n`.
      until: no update at this step or later; None = forever.

    Returns:
      A callable step -> bool.

    Raises:
      ValueError: `n` below 1, a step that is no integer of at least 0, or `until` not after
        `start`.

    Example:
      >>> every(10)(20), every(10)(25)
      (True, False)

    Reference: Evci et al., "RigL", ICML 2020, algorithm 1.
    """
    return Every(n, start, until)


def between(start: int, end: int, every: int = 1) -> Between:
    """A schedule that is due every `every` steps from `start` through `end`, and at `end`.

    Args:
      start: the first update.
      end: the last update, after `start`.
      every: steps between updates.

    Returns:
      A callable step -> bool.

    Raises:
      ValueError: `every` below 1, a step that is no integer of at least 0, or `end` not after
        `start`.

    Example:
      >>> between(0, 10, every=5)(5), between(0, 10, every=5)(6)
      (True, False)

    Reference: Zhu & Gupta, "To prune, or not to prune", 2017.
    """
    return Between(start, end, every)


def periodic(every: int, start: int = 0, until: int | None = None) -> Every:
    """The former name of `every`.

    Deprecated: use `every(n, start=..., until=...)`.

    Args:
      every: steps between updates.
      start: the step from which they are counted.
      until: no update at this step or later; None = forever.

    Returns:
      A callable step -> bool.

    Raises:
      ValueError: as `every`.

    Example:
      >>> periodic(10)(20), periodic(10)(25)
      (True, False)

    Reference: Evci et al., "RigL", ICML 2020, algorithm 1.
    """
    return Every(every, start, until)


def cosine_fraction(fraction: float, count: Any, start: int, until: int | None) -> Float[Array, ""]:
    """The drop fraction at a step, which falls from `fraction` to 0 along a cosine.

    `fraction / 2 * (1 + cos(pi * (t - start) / (until - start)))`; constant without `until`.

    Args:
      fraction: the fraction at `start`.
      count: the step t.
      start: the first step.
      until: the step at which the fraction reaches 0.

    Returns:
      float32 scalar.

    Example:
      >>> [round(float(cosine_fraction(0.3, t, 0, 100)), 3) for t in (0, 50, 100)]
      [0.3, 0.15, 0.0]

    Reference: Evci et al., "RigL", ICML 2020, section 3.
    """
    if until is None:
        return jnp.float32(fraction)
    progress = jnp.clip((count - start) / (until - start), 0.0, 1.0)
    return (fraction / 2 * (1 + jnp.cos(jnp.pi * progress))).astype(jnp.float32)


def progress(curve: Curve, count: Any, start: int, end: int, every: int = 1) -> Float[Array, ""]:
    """How far a gradual method has come: 0 until `start`, 1 from `end` on.

    With `t = clip((count - start) / (end - start), 0, 1)`: cubic `t^3`, linear `t`, cos
    `1 - cos(pi t / 2)`, and exp `(1 - exp(-i / 20)) / (1 - exp(-(n - 1) / 20))` with i of n the
    update (epoch) since `start`, so that exp is 1 one update before the others; of a single update
    it is 0 before the end.

    Args:
      curve: which curve.
      count: the step.
      start: the first step.
      end: the last step, after `start`.
      every: steps in one update period, the unit of exp's i.

    Returns:
      float32 scalar in [0, 1].

    Raises:
      ValueError: an unknown curve, a step that is no integer of at least 0, or `end` not after
        `start`.

    Example:
      >>> [float(progress("cubic", t, 0, 10)) for t in (0, 5, 10)]
      [0.0, 0.125, 1.0]

    Reference: Xiang et al., "SUBP", NeurIPS 2023 (authors' schedules).
    """
    _checks.choice("curve", curve, CURVES)
    t = _elapsed(count, start, end)
    if curve == "cubic":
        return t**3
    if curve == "linear":
        return t
    if curve == "cos":
        return 1 - jnp.cos(jnp.pi * t / 2)
    n = (end - start) / every
    if n <= 1:
        return jnp.floor(t)
    updates = jnp.minimum(t * n, n - 1)
    return (1 - jnp.exp(-0.05 * updates)) / (1 - jnp.exp(-0.05 * (n - 1)))


def cubic_sparsity(
    initial: Any, final: Any, count: Any, start: int, end: int, power: float = 3.0
) -> Float[Array, ""]:
    """The sparsity of gradual pruning at a step.

    `s_f + (s_i - s_f) * (1 - t)^power`, with `t = clip((count - start) / (end - start), 0, 1)`.

    Args:
      initial: sparsity at `start`.
      final: sparsity from `end` on.
      count: the step.
      start: the first step.
      end: the last step, after `start`.
      power: the exponent.

    Returns:
      float32 scalar.

    Raises:
      ValueError: a step that is no integer of at least 0, or `end` not after `start`.

    Example:
      >>> [float(cubic_sparsity(0.0, 0.8, t, 0, 10)) for t in (0, 10)]
      [0.0, 0.800000011920929]

    Reference: Zhu & Gupta, "To prune, or not to prune", 2017, equation 1.
    """
    return final + (initial - final) * (1 - _elapsed(count, start, end)) ** power


def _elapsed(count: Any, start: int, end: int) -> Float[Array, ""]:
    """The part of [start, end] that has passed, in [0, 1]."""
    _checks.step("end", end, start=_checks.step("start", start))
    return jnp.clip((jnp.asarray(count, jnp.float32) - start) / (end - start), 0.0, 1.0)
