"""Programs that run once or twice, as the first masks do: compiling them is most of what they cost.

For a CPU, XLA's fusion emitters take twice as long to compile (from jax 0.11 on there are no
others), and LLVM's optimization two thirds of the rest.
"""

from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp

_EMITTERS = {"xla_cpu_use_fusion_emitters": False} if jax.__version_info__ < (0, 11) else {}
OPTIONS: dict[str, Any] | None = _EMITTERS or None
"""Compiler options of a program whose running time counts too."""
UNOPTIMIZED: dict[str, Any] = _EMITTERS | {"xla_backend_optimization_level": 0}
"""Compiler options of a program for a CPU that has little to do."""


def is_traced(arrays: Iterable[Any]) -> bool:
    """Whether operations on these arrays are traced, where compiler options are refused.

    Args:
      arrays: of the operations.

    Returns:
      True also for constants under a transformation.

    Example:
      >>> is_traced([jnp.ones(2)]), bool(jax.jit(lambda x: is_traced([x]))(1.0))
      (False, True)
    """
    return any(isinstance(array, jax.core.Tracer) for array in (*arrays, jnp.zeros(())))
