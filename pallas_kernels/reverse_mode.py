"""Functions that have derivatives in reverse mode alone, and an error that says so.

A `jax.custom_vjp` function has no forward mode, and JAX's own error names neither the function nor
a way out. It comes where the tangent would be computed: in the call itself, in the compilation of a
`jax.jit` around it, or in a `vmap`. So the operands' tangents pass through an operation that cannot
be computed, only transposed: reverse mode drops it, and forward mode meets it first.
"""

import functools
from typing import Any, NoReturn, TypeVar

import jax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

Tree = TypeVar("Tree")


ALONE = (
    "forward mode alone (jax.jvp, jax.jacfwd, jax.linearize) is not defined for block-sparse "
    "convolutions; use reverse mode (jax.grad, jax.vjp, jax.jacrev, or jax.jvp of jax.grad), or "
    "conv(..., implementation='dense'), which has both"
)
OVER_REVERSE = (
    "forward mode over reverse mode (jax.jvp of jax.grad, jax.hessian) is not defined for "
    "block-sparse convolutions with kernel_gradient='dense'; use kernel_gradient='masked' or "
    "implementation='dense'"
)
NORM_ACT = (
    "forward mode alone (jax.jvp, jax.jacfwd, jax.linearize) is not defined for norm_act in the "
    "native CPU kernels; use reverse mode (jax.grad, jax.vjp, jax.jacrev, or jax.jvp of jax.grad), "
    "or norm_act(..., implementation='xla'), which has both"
)


def reverse_mode_only(operands: Tree, reason: str = ALONE) -> Tree:
    """Marks the operands of a function that has no forward mode.

    Args:
      operands: a pytree of floating point arrays.
      reason: the error's message.

    Returns:
      The same tree. Whatever needs the tangents' values raises a TypeError that says what to do.

    Example:
      >>> import jax.numpy as jnp
      >>> jax.grad(lambda x: reverse_mode_only(x) ** 2)(jnp.float32(3)).tolist()
      6.0
    """
    return jax.tree.map(lambda operand: _marked(reason, operand), operands)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _marked(reason: str, operand: jax.Array) -> jax.Array:
    return operand


@_marked.defjvp
def _(reason: str, primals: tuple[jax.Array], tangents: tuple[jax.Array]) -> tuple[jax.Array, Any]:
    return primals[0], _tangent.bind(tangents[0], reason=reason)


def _refuse(*_: Any, reason: str, **__: Any) -> NoReturn:
    raise TypeError(reason)


_tangent = Primitive("tangent_of_a_block_sparse_conv")
_tangent.def_impl(_refuse)
_tangent.def_abstract_eval(lambda tangent, reason: tangent)
ad.deflinear2(_tangent, lambda cotangent, _, reason: [cotangent])
batching.defvectorized(_tangent)
mlir.register_lowering(_tangent, _refuse)
