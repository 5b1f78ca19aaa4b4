"""Inside `jax.shard_map`: marks arrays as varying over the same mesh axes.

JAX tracks over which axes of the mesh a value differs from device to device, and wants the operands
of an operation to agree. Marking an operand also makes its gradient a sum over those axes. Outside
of `shard_map` these functions change nothing.
"""

from collections.abc import Iterable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax import lax

Tree = TypeVar("Tree")


def varying_axes(arrays: Iterable[jax.Array]) -> frozenset[Any]:
    """The mesh axes over which any of the arrays varies.

    Args:
      arrays: any number of arrays.

    Returns:
      The names of the axes; empty outside of `shard_map`.

    Example:
      >>> varying_axes([jnp.ones(3)])
      frozenset()
    """
    axes: frozenset[Any] = frozenset()
    for array in arrays:
        axes |= jax.typeof(array).manual_axis_type.varying
    return axes


def vary_over(array: jax.Array, axes: frozenset[Any]) -> jax.Array:
    """Marks an array as varying over mesh axes.

    Args:
      array: the array.
      axes: names of mesh axes.

    Returns:
      The same values.

    Example:
      >>> vary_over(jnp.ones(3), frozenset()).tolist()
      [1.0, 1.0, 1.0]
    """
    missing = tuple(axes - varying_axes([array]))
    return lax.pcast(array, missing, to="varying") if missing else array


def vary_alike(operands: Tree) -> Tree:
    """Marks every array of a tree as varying over the mesh axes over which any of them varies.

    Args:
      operands: a pytree of arrays.

    Returns:
      The same tree.

    Example:
      >>> vary_alike({"x": jnp.ones(2), "bias": None})["x"].tolist()
      [1.0, 1.0]
    """
    axes = varying_axes(jax.tree.leaves(operands))
    return jax.tree.map(lambda array: vary_over(array, axes), operands)


def result_type(operand: jax.Array, shape: tuple[int, ...], dtype: Any) -> Any:
    """The type of a foreign function's result that varies over the mesh as an operand does.

    Args:
      operand: the array whose mesh axes count.
      shape: of the result.
      dtype: of the result.

    Returns:
      What `jax.ffi.ffi_call` takes as the type of a result.

    Example:
      >>> result_type(jnp.ones(3), (2, 2), "bfloat16").shape
      (2, 2)
    """
    return jax.typeof(operand).update(shape=shape, dtype=jnp.dtype(dtype), weak_type=False)
