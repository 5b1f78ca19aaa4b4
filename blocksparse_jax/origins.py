"""What is known of an array beside its values, for as long as that very array lives.

An array that a jitted step returns is another one, of which nothing is known: the notes catch
mistakes between packing and the first step, and in evaluation, and nothing depends on them.
"""

import weakref
from typing import Any

import jax

_NOTES: dict[int, tuple[weakref.ref, dict[str, Any]]] = {}


def note(array: Any, **facts: Any) -> None:
    """Notes facts about a concrete array; of traced ones nothing is noted.

    Args:
      array: any array.
      **facts: by name.

    Example:
      >>> import jax.numpy as jnp
      >>> values = jnp.ones(3)
      >>> note(values, sparsity=0.9)
      >>> noted(values, "sparsity"), noted(values + 0, "sparsity")
      (0.9, None)
    """
    if not isinstance(array, jax.Array) or isinstance(array, jax.core.Tracer):
        return
    key = id(array)
    _NOTES[key] = weakref.ref(array, lambda _: _NOTES.pop(key, None)), facts


def noted(array: Any, fact: str) -> Any:
    """What is known of an array; None where nothing is.

    Args:
      array: any array.
      fact: its name.

    Returns:
      What was noted.

    Example:
      >>> import jax.numpy as jnp
      >>> noted(jnp.ones(3), "sparsity") is None
      True
    """
    if id(array) not in _NOTES:
        return None
    reference, facts = _NOTES[id(array)]
    return facts.get(fact) if reference() is array else None
