"""The dtypes that arrays are widened to on purpose."""

from typing import Any

import jax
import jax.numpy as jnp


def common_dtype(first: Any, second: Any) -> Any:
    """The dtype that holds two, as JAX promotes them, also where strict promotion refuses to.

    Args:
      first: a dtype.
      second: a dtype.

    Returns:
      A dtype.

    Example:
      >>> with jax.numpy_dtype_promotion("strict"):
      ...     common_dtype("bfloat16", "float32")
      dtype('float32')
    """
    with jax.numpy_dtype_promotion("standard"):
        return jnp.promote_types(first, second)
