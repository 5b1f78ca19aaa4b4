"""Checks of arguments, shared by all modules.

Each raises a ValueError that names the argument, the value, what was expected and the fix.
"""

import difflib
import warnings
from collections.abc import Iterable, Sequence
from typing import Any, Literal, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

T = TypeVar("T", bound=str)
MAX_STEP = np.iinfo(np.int32).max  # the count of updates stays there


def concrete(name: str, array: Any) -> np.ndarray:
    """The array on the host; ValueError when it is traced."""
    if isinstance(array, jax.core.Tracer):
        raise ValueError(
            f"{name}: its values are read on the host, but it is traced; call this outside of jit"
        )
    return np.asarray(array)


def kernel_shape(name: str, shape: Sequence[int]) -> tuple[int, int, int, int]:
    """The shape of a conv kernel; ValueError unless it has rank 4 and no empty axis."""
    if len(shape) != 4 or min(shape) < 1:
        raise ValueError(
            f"{name}: expected a conv kernel (kh, kw, cin, cout) with positive sizes, got "
            f"{tuple(shape)}"
        )
    kh, kw, cin, cout = (int(s) for s in shape)
    return kh, kw, cin, cout


def positive_int(name: str, value: Any) -> int:
    """The value as an int; ValueError unless it is an integer of at least 1."""
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < 1:
        hint = static_hint(name, value)
        raise ValueError(f"{name}: expected an integer of at least 1{hint}, got {value!r}")
    return int(value)


def static_hint(name: str, value: Any) -> str:
    """How to pass an argument of a wrapped transformation that must not become an array."""
    if not isinstance(value, jax.Array):
        return ""
    return f' (static: inject_hyperparams(..., static_args=("{name}",)))'


def step(name: str, value: Any, *, start: int | None = None) -> int:
    """The value as an int; ValueError unless it is a training step.

    A step is an integer of at least 0 that fits the int32 count, and after step `start` if that is
    given.
    """
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < 0:
        hint = static_hint(name, value)
        raise ValueError(f"{name}: expected a step, an integer of at least 0{hint}, got {value!r}")
    if start is not None and value <= start:
        raise ValueError(f"{name}: expected a step after start={start}, got {value}")
    if value >= MAX_STEP:
        raise ValueError(
            f"{name}: expected a step below {MAX_STEP:,}, where the int32 count of updates ends, "
            f"got {value:,}"
        )
    return int(value)


def period(name: str, value: Any) -> int:
    """The value as an int; ValueError unless it is a number of steps that fits int32."""
    if positive_int(name, value) >= MAX_STEP:
        raise ValueError(
            f"{name}: expected fewer than {MAX_STEP:,} steps, where the int32 count of updates "
            f"ends, got {value:,}"
        )
    return int(value)


def pair(name: str, value: Any) -> tuple[int, int]:
    """Two integers from one or two; ValueError unless they are at least 1."""
    values = (value, value) if np.ndim(value) == 0 else tuple(value)
    if len(values) != 2:
        raise ValueError(
            f"{name}: expected an integer or two (y, x), got {value!r}; this convolves images (2-D)"
        )
    return positive_int(name, values[0]), positive_int(name, values[1])


def number(name: str, value: Any, *, low: float = 0.0, low_open: bool = False) -> float:
    """The value as a float; ValueError unless it is finite and at least (or above) `low`."""
    result = _float(value)
    if not (low <= result < float("inf")) or (low_open and result == low):
        bound = "above" if low_open else "of at least"
        raise ValueError(f"{name}: expected a number {bound} {low:g}, got {value!r}")
    return result


def random_key(name: str, key: Any) -> jax.Array:
    """The key, `jax.random.key(0)` for None; ValueError unless it is one JAX random key.

    The key may be new-style or raw.
    """
    if key is None:
        return jax.random.key(0)
    expected = f"{name}: expected one JAX random key such as jax.random.key(0), got"
    if not hasattr(key, "dtype"):
        raise ValueError(f"{expected} {key!r}")
    is_raw = key.ndim == 1 and key.dtype == np.uint32
    is_typed = key.ndim == 0 and jnp.issubdtype(key.dtype, jax.dtypes.prng_key)
    if not (is_raw or is_typed):
        raise ValueError(f"{expected} {key.dtype}{list(key.shape)}")
    return key


def data_format(value: Any) -> Literal["NHWC", "CHWN"]:
    """The value; ValueError unless it is "NHWC" or "CHWN"."""
    if value == "NCHW":
        raise ValueError(
            "data_format: expected one of 'NHWC', 'CHWN', got 'NCHW'; transpose x to NHWC: "
            "jnp.transpose(x, (0, 2, 3, 1))"
        )
    return choice("data_format", value, ("NHWC", "CHWN"))


def fraction(
    name: str,
    value: Any,
    *,
    low: float = 0.0,
    high: float = 1.0,
    low_open: bool = False,
    high_open: bool = True,
) -> float:
    """The value as a float; ValueError unless it is a concrete number from `low` to `high`.

    `low` itself is allowed unless `low_open`, `high` unless `high_open`.
    """
    if isinstance(value, jax.core.Tracer):
        raise ValueError(
            f"{name}: shapes depend on it, so it must be a Python number, got a traced value; keep "
            f"it out of inject_hyperparams"
        )
    result = _float(value)
    in_range = low <= result <= high
    if not in_range or (low_open and result == low) or (high_open and result == high):
        interval = f"{'(' if low_open else '['}{low}, {high}{')' if high_open else ']'}"
        hint = f"; as a fraction, {value} percent is {result / 100:g}" if 1 < result <= 100 else ""
        raise ValueError(f"{name}: expected a number in {interval}, got {value!r}{hint}")
    return result


def _float(value: Any) -> float:
    """The value as a float; NaN where it is no number, as a str or a bool."""
    if isinstance(value, str | bytes | bool | np.bool_):
        return float("nan")
    try:
        return float(value)
    except (TypeError, ValueError):
        return float("nan")


def choice(name: str, value: Any, options: Iterable[T]) -> T:
    """The value; ValueError naming the nearest option unless it is one of the options."""
    options = tuple(options)
    if value in options:
        return value
    lower = {option.lower(): option for option in options}
    nearest = difflib.get_close_matches(str(value).lower(), lower, n=1)
    hint = f"; did you mean {lower[nearest[0]]!r}?" if nearest else ""
    names = ", ".join(map(repr, options))
    raise ValueError(f"{name}: expected one of {names}, got {value!r}{hint}")


def implementation(value: Any, options: Iterable[str]) -> None:
    """ValueError naming the nearest option unless it is one; a device is not one."""
    options = tuple(options)
    on_gpus = [repr(name) for name in options if name in ("triton", "mosaic_gpu")]
    if str(value).lower() in ("gpu", "cuda", "nvidia") and value not in options:
        raise ValueError(
            f"implementation: expected one of {', '.join(map(repr, options))}, got {value!r}; on "
            f"GPUs these are {' and '.join(on_gpus)}, and None picks the faster one"
        )
    choice("implementation", value, options)


def divisor(n: int, most: int) -> int:
    """The largest divisor of `n` that is at most `most`."""
    return next(d for d in range(min(n, most), 0, -1) if n % d == 0)


def warn_of_collapse(layer: str, argument: str, asked: int, used: int, size: int) -> None:
    """Warns where the divisor that a layer uses is less than half of what was asked for."""
    if used * 2 < min(asked, size):
        warnings.warn(
            f"{argument}: {layer!r} has an axis of {size}, whose largest divisor up to {asked} is "
            f"{used}, so its blocks are small and slow; choose another {argument}, pad the layer, "
            "or leave it out by where=",
            stacklevel=5,
        )


def partition(name: str, groups: np.ndarray, cout: int) -> None:
    """Raises a ValueError unless groups of equal size hold each filter once."""
    is_integer = np.issubdtype(groups.dtype, np.integer)
    if (
        groups.ndim != 2
        or not is_integer
        or not np.array_equal(np.sort(groups, axis=None), np.arange(cout))
    ):
        raise ValueError(
            f"{name}: expected int[groups, group_size] that holds each filter 0..{cout - 1} "
            f"exactly once, got {groups.dtype}{list(groups.shape)}"
        )


def boolean(name: str, dtype: Any) -> None:
    """Raises a ValueError unless it is the dtype of a mask."""
    if dtype != np.bool_:
        raise ValueError(
            f"{name}: expected dtype bool, got {dtype}; compare first, e.g. mask = kernel != 0"
        )


def permutation(name: str, value: Any, size: int | None) -> np.ndarray:
    """The value on the host; ValueError unless it is a permutation of `range(size)`."""
    array = concrete(name, value)
    size = size or 0
    if array.shape != (size,) or not size or (np.sort(array) != np.arange(size)).any():
        raise ValueError(
            f"{name}: expected a permutation of 0..{size - 1}, got {array.dtype}{list(array.shape)}"
        )
    return array
