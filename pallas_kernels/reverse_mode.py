"""Functions that have derivatives in reverse mode alone, and an error that says so.

A `jax.custom_vjp` function has no forward mode, and JAX's own error names neither the function nor
a way out. It comes where the tangent would be computed: in the call itself, in the compilation of a
`jax.jit` around it, or in a `vmap`. So the operands' tangents pass through an operation that cannot
be computed, only transposed: reverse mode drops it, and forward mode meets it first.
"""

from typing import Any, NoReturn, TypeVar

import jax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

Tree = TypeVar("Tree")


def reverse_mode_only(operands: Tree) -> Tree:
    """Marks the operands of a function that has no forward mode.

    Args:
      operands: a pytree of floating point arrays.

    Returns:
      The same tree. Whatever needs the tangents' values raises a TypeError that says what to do.

    Example:
      >>> import jax.numpy as jnp
      >>> jax.grad(lambda x: reverse_mode_only(x) ** 2)(jnp.float32(3)).tolist()
      6.0
    """
    return jax.tree.map(_marked, operands)


@jax.custom_jvp
def _marked(operand: jax.Array) -> jax.Array:
    return operand


@_marked.defjvp
def _(primals: tuple[jax.Array], tangents: tuple[jax.Array]) -> tuple[jax.Array, Any]:
    return primals[0], _tangent.bind(tangents[0])


def _refuse(*_: Any, **__: Any) -> NoReturn:
    raise TypeError(
        "forward mode alone (jax.jvp, jax.jacfwd, jax.linearize) is not defined for block-sparse "
        "convolutions; use reverse mode (jax.grad, jax.vjp, jax.jacrev, or jax.jvp of jax.grad), "
        "or conv(..., implementation='dense'), which has both"
    )


_tangent = Primitive("tangent_of_a_block_sparse_conv")
_tangent.def_impl(_refuse)
_tangent.def_abstract_eval(lambda tangent: tangent)
ad.deflinear2(_tangent, lambda cotangent, _: [cotangent])
batching.defvectorized(_tangent)
mlir.register_lowering(_tangent, _refuse)
