"""Schedules: step -> amount, and "is this an update step?". All take Python ints and traced counts
alike.
"""

import dataclasses
from typing import Any, Literal

import jax.numpy as jnp
from jaxtyping import Array, Float

from blocksparse_jax import _checks

Curve = Literal["cubic", "linear", "cos", "exp"]
CURVES: tuple[Curve, ...] = ("cubic", "linear", "cos", "exp")


@dataclasses.dataclass(frozen=True)
class Periodic:
    """True every `every` steps after `start`, before `until`; the first one is at `start + every`.

    Attributes:
      every: steps between updates.
      start: the step from which they are counted; no update there, since nothing has been learnt
        yet.
      until: no update at this step or later; None = forever.

    Example:
      >>> due = Periodic(every=100, until=300)
      >>> [step for step in range(0, 500, 50) if due(step)]
      [100, 200]

    Reference: Evci et al., "RigL", ICML 2020, algorithm 1.
    """

    every: int
    start: int = 0
    until: int | None = None

    def __post_init__(self) -> None:
        _checks.positive_int("every", self.every)
        start = _checks.step("start", self.start)
        if self.until is not None:
            _checks.step("until", self.until, start=start)

    def __call__(self, count: Any) -> Any:
        """Whether `count` (int or int32 array) is an update step."""
        due = (count > self.start) & ((count - self.start) % self.every == 0)
        return due if self.until is None else due & (count < self.until)


def periodic(every: int, start: int = 0, until: int | None = None) -> Periodic:
    """An update schedule for `hrbp_prune(update=...)`: see `Periodic`.

    Args:
      every: steps between updates.
      start: the step from which they are counted.
      until: no update at this step or later; None = forever.

    Returns:
      A callable step -> bool.

    Raises:
      ValueError: `every` below 1, a step that is no integer of at least 0, or `until` not after
        `start`.

    Example:
      >>> periodic(10)(20), periodic(10)(25)
      (True, False)

    Reference: Evci et al., "RigL", ICML 2020, algorithm 1.
    """
    return Periodic(every, start, until)


def cosine_fraction(fraction: float, count: Any, start: int, until: int | None) -> Float[Array, ""]:
    """The drop fraction `fraction / 2 * (1 + cos(pi * (t - start) / (until - start)))`; constant
    without `until`.

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

    With `t = clip((count - start) / (end - start), 0, 1)`: cubic `t^3`, linear `t`, cos `1 - cos(pi
    t / 2)`, and exp `(1 - exp(-i / 20)) / (1 - exp(-n / 20))` with i of n the update (epoch) since
    `start`.

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
    _checks.choice("schedule", curve, CURVES)
    _checks.step("end", end, start=_checks.step("start", start))
    t = jnp.clip((jnp.asarray(count, jnp.float32) - start) / (end - start), 0.0, 1.0)
    if curve == "cubic":
        return t**3
    if curve == "linear":
        return t
    if curve == "cos":
        return 1 - jnp.cos(jnp.pi * t / 2)
    n = (end - start) / every
    return (1 - jnp.exp(-0.05 * t * n)) / (1 - jnp.exp(-0.05 * n))


def cubic_sparsity(
    initial: float, final: float, count: Any, start: int, end: int, power: float = 3.0
) -> Float[Array, ""]:
    """Sparsity `s_f + (s_i - s_f) * (1 - t)^power`, t = clip((count - start) / (end - start), 0,
    1).

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
    _checks.step("end", end, start=_checks.step("start", start))
    t = jnp.clip((jnp.asarray(count, jnp.float32) - start) / (end - start), 0.0, 1.0)
    return final + (initial - final) * (1 - t) ** power
