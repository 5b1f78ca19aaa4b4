"""Checks of arguments, shared by all modules: a ValueError names the argument, the value, what was expected and the fix."""

import difflib
from collections.abc import Iterable, Sequence
from typing import Any, TypeVar

import jax
import numpy as np

T = TypeVar("T", bound=str)


def concrete(name: str, array: Any) -> np.ndarray:
    """The array on the host; ValueError when it is traced."""
    if isinstance(array, jax.core.Tracer):
        raise ValueError(f"{name}: its values are read on the host, but it is traced; call this outside of jit")
    return np.asarray(array)


def kernel_shape(name: str, shape: Sequence[int]) -> tuple[int, int, int, int]:
    """The shape of a conv kernel; ValueError unless it has rank 4 and no empty axis."""
    if len(shape) != 4 or min(shape) < 1:
        raise ValueError(f"{name}: expected a conv kernel (kh, kw, cin, cout) with positive sizes, got {tuple(shape)}")
    kh, kw, cin, cout = (int(s) for s in shape)
    return kh, kw, cin, cout


def positive_int(name: str, value: Any) -> int:
    """The value as an int; ValueError unless it is an integer of at least 1."""
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < 1:
        raise ValueError(f"{name}: expected an integer of at least 1, got {value!r}")
    return int(value)


def fraction(name: str, value: Any, *, low: float = 0.0, high: float = 1.0, high_open: bool = True) -> float:
    """The value as a float; ValueError unless it is a concrete number in [low, high) (or [low, high])."""
    if isinstance(value, jax.core.Tracer):
        raise ValueError(
            f"{name}: shapes depend on it, so it must be a Python number, got a traced value; keep it out of inject_hyperparams"
        )
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = float("nan")
    if not (low <= number < high or (number == high and not high_open)):
        raise ValueError(f"{name}: expected a number in [{low}, {high}{')' if high_open else ']'}, got {value!r}")
    return number


def choice(name: str, value: Any, options: Iterable[T]) -> T:
    """The value; ValueError naming the nearest option unless it is one of the options."""
    options = tuple(options)
    if value in options:
        return value
    near = difflib.get_close_matches(str(value), options, n=1, cutoff=0.4)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise ValueError(f"{name}: expected one of {', '.join(map(repr, options))}, got {value!r}{hint}")


def divisor(n: int, most: int) -> int:
    """The largest divisor of `n` that is at most `most`."""
    return next(d for d in range(min(n, most), 0, -1) if n % d == 0)
