"""Patterns by name, as the command line gives them: `block:32`, `one_by_n:16`, `n_of_m:2:4`."""

from blocksparse_jax import _checks, patterns
from blocksparse_jax.patterns import Pattern

NAMES = (
    "unstructured",
    "kernel",
    "vector",
    "window",
    "channel",
    "fan_in",
    "channel_tap",
    "n_of_m",
    "one_by_n",
    "block",
)


def named(text: str) -> Pattern:
    """The pattern that a text names.

    The text is a function of `blocksparse_jax.patterns` and its arguments in order, joined by
    colons.

    Args:
      text: e.g. "kernel", "channel:input", "block:32:1.0".

    Returns:
      A pattern.

    Raises:
      ValueError: no such pattern, or arguments that it does not take.

    Example:
      >>> named("one_by_n:16")
      OneByN(group_size=16)
    """
    name, *arguments = text.split(":")
    try:
        make = getattr(patterns, _checks.choice("pattern", name.replace("-", "_"), NAMES))
    except ValueError as error:
        raise ValueError(f"{error}; arguments follow a colon, as in block:32") from None
    try:
        return make(*map(_value, arguments))
    except ValueError as error:
        raise ValueError(f"pattern: {text!r}: {error}") from None
    except TypeError as error:
        raise ValueError(
            f"pattern: {name!r} does not take the arguments of {text!r} ({error}); write NAME or "
            "NAME:ARGUMENT:..., as in one_by_n:16"
        ) from None


def _value(text: str) -> int | float | str:
    """An integer or a number where the text is one."""
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text
