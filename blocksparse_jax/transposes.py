"""`cancel_transposes`: transposes of activations moved through a program until they meet."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, ParamSpec, TypeVar

import jax
import numpy as np
from jax import lax
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal, Var, jaxpr_as_fun

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")
Order = tuple[int, ...]

# fmt: off
ELEMENTWISE = frozenset((
    "abs", "acos", "acosh", "add", "add_any", "and", "asin", "asinh", "atan", "atan2", "atanh",
    "cbrt", "ceil", "clamp", "conj", "convert_element_type", "copy", "cos", "cosh", "digamma",
    "div", "eq", "erf", "erf_inv", "erfc", "exp", "exp2", "expm1", "floor", "ge", "gt", "imag",
    "integer_pow", "is_finite", "le", "lgamma", "log", "log1p", "logistic", "lt", "max", "min",
    "mul", "ne", "neg", "nextafter", "not", "one_minus_square", "or", "pow", "real",
    "reduce_precision", "rem", "round", "rsqrt", "select_n", "sign", "sin", "sinh", "sqrt",
    "square", "sub", "tan", "tanh", "xor",
))
# fmt: on
"""Primitives that compute each element from the elements at its place, or from scalars."""
REDUCTIONS = frozenset(f"reduce_{name}" for name in ("and", "max", "min", "or", "prod", "sum"))
PER_AXIS = {
    "reduce_window": (),
    "reduce_window_max": (),
    "reduce_window_min": (),
    "reduce_window_sum": (),
    "select_and_gather_add": (),
    "select_and_scatter_add": (),
    "rev": ("dimensions",),
    "concatenate": ("dimension",),
    "pad": (),
    "slice": (),
}
"""Primitives that take arrays of one rank, with the parameters that name axes.

Their tuples of that rank hold one entry for each axis.
"""
INLINED = frozenset(["closed_call", "core_call", "custom_jvp_call", "jit", "pjit"])
"""Calls of a program."""
BODIES = {"scan": ("jaxpr",), "while": ("cond_jaxpr", "body_jaxpr"), "cond": ("branches",)}
"""Primitives with programs of their own, whose arguments keep their order."""


def cancel_transposes(
    fun: Callable[Arguments, Result],
) -> Callable[Arguments, Result]:
    """The same function with fewer transposes of activations.

    `conv` and the Flax layers compute in CHWN. In a network that holds its activations in NHWC they
    transpose at their door, and XLA's CPU backend keeps every one of these transposes. This
    function traces `fun` and carries each transpose forward through elementwise operations,
    reductions, pooling, padding and concatenation, to where another one undoes it. So what lies
    between two sparse layers (batch norm, ReLU, a shortcut) computes in CHWN, and the transposes
    are gone. Values and results keep their shapes and meaning; sums may round differently. Leave it
    out on a GPU, where XLA cancels most transposes by itself.

    Apply it to the whole function that is compiled, with its gradients inside:
    `jax.jit(cancel_transposes(step))`. Gradients of the result are right, but they are computed
    from `fun` as it is written, with its transposes; forward mode (`jax.jvp`) is not defined.

    Args:
      fun: a function of pytrees of arrays that `jax.jit` could compile without static arguments.

    Returns:
      A function with the same arguments and results. It traces `fun` at each call, so compile it.

    Example:
      >>> import jax.numpy as jnp
      >>> def fun(x):
      ...     return jnp.transpose(jnp.tanh(jnp.transpose(x, (3, 1, 2, 0))), (3, 1, 2, 0))
      >>> str(jax.make_jaxpr(fun)(jnp.ones((1, 2, 2, 4)))).count("transpose")
      2
      >>> str(jax.make_jaxpr(cancel_transposes(fun))(jnp.ones((1, 2, 2, 4)))).count("transpose")
      0
    """

    @functools.wraps(fun)
    def moved(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        leaves, structure = jax.tree.flatten((args, kwargs))

        def flat(*leaves: Any) -> list[Any]:
            args, kwargs = jax.tree.unflatten(structure, leaves)
            results.append(jax.tree.structure(result := fun(*args, **kwargs)))
            return jax.tree.leaves(result)

        results: list[Any] = []
        program = jax.make_jaxpr(flat)(*leaves)
        with_gradient = jax.custom_vjp(lambda *leaves: _evaluate(program, leaves))
        with_gradient.defvjp(
            functools.partial(jax.vjp, jaxpr_as_fun(program)), lambda pullback, g: pullback(g)
        )
        return jax.tree.unflatten(results[-1], with_gradient(*leaves))

    return moved


class _Permuted(NamedTuple):
    """An array whose axes are held in another order: it stands for `transpose(array, order)`."""

    array: jax.Array
    order: Order


class _Broadcast(NamedTuple):
    """`lax.broadcast_in_dim(array, shape, axes)`, to be made in the order that its use asks for."""

    array: jax.Array
    shape: tuple[int, ...]
    axes: Order


def _evaluate(program: ClosedJaxpr, args: Sequence[Any]) -> list[Any]:
    """Runs a program with its transposes moved."""
    return [_as_written(value) for value in _run(program.jaxpr, program.consts, args)]


def _run(jaxpr: Jaxpr, consts: Sequence[Any], args: Sequence[Any]) -> list[Any]:
    values: dict[Var, Any] = dict(zip(jaxpr.constvars, consts, strict=True))
    values |= zip(jaxpr.invars, args, strict=True)

    def read(atom: Any) -> Any:
        return atom.val if isinstance(atom, Literal) else values[atom]

    for eqn in jaxpr.eqns:
        with eqn.ctx.manager:
            results = _apply(eqn, [read(atom) for atom in eqn.invars])
        values |= zip(eqn.outvars, results, strict=True)
    return [read(atom) for atom in jaxpr.outvars]


def _apply(eqn: JaxprEqn, operands: list[Any]) -> Sequence[Any]:
    """The results of one operation, in the order of axes that costs no transpose."""
    name = eqn.primitive.name
    if name in INLINED and not _has_shardings(eqn):
        inner: ClosedJaxpr = eqn.params["jaxpr" if "jaxpr" in eqn.params else "call_jaxpr"]
        return _run(inner.jaxpr, inner.consts, operands)
    if name == "transpose":
        return [_transpose(operands[0], eqn.params["permutation"])]
    if name == "broadcast_in_dim" and len(operands) == 1 and eqn.params["sharding"] is None:
        shape, axes = eqn.params["shape"], eqn.params["broadcast_dimensions"]
        return [_Broadcast(_as_written(operands[0]), shape, axes)]
    orders = [operand.order for operand in operands if isinstance(operand, _Permuted)]
    if orders and name in ELEMENTWISE:
        return _in_order(eqn, operands, orders[0], eqn.params)
    if orders and name in PER_AXIS:
        return _in_order(eqn, operands, orders[0], _permuted_params(eqn, orders[0]))
    if orders and name in REDUCTIONS and eqn.params.get("out_sharding") is None:
        return [_reduce(eqn, operands[0])]
    params = _with_rewritten_bodies(eqn) if name in BODIES or name == "remat2" else eqn.params
    return _bind(eqn, [_as_written(operand) for operand in operands], params)


def _bind(eqn: JaxprEqn, operands: list[Any], params: dict[str, Any]) -> Sequence[Any]:
    results = eqn.primitive.bind(*operands, **eqn.primitive.get_bind_params(params))
    return results if eqn.primitive.multiple_results else [results]


def _in_order(
    eqn: JaxprEqn, operands: list[Any], order: Order, params: dict[str, Any]
) -> Sequence[Any]:
    """Runs an operation on operands whose axes are all held in one order; scalars have none."""
    held = [_hold(operand, order) if _rank(operand) else operand for operand in operands]
    return [_Permuted(result, order) for result in _bind(eqn, held, params)]


def _permuted_params(eqn: JaxprEqn, order: Order) -> dict[str, Any]:
    """The parameters of an operation for arrays whose axes are held in an order."""
    params = dict(eqn.params)
    for name, value in params.items():
        if name in PER_AXIS[eqn.primitive.name]:
            axes = [order[axis] for axis in np.atleast_1d(value)]
            params[name] = tuple(axes) if np.ndim(value) else axes[0]
        elif isinstance(value, tuple) and len(value) == len(order) and name != "consts":
            params[name] = tuple(value[axis] for axis in np.argsort(order))
    return params


def _reduce(eqn: JaxprEqn, operand: _Permuted) -> Any:
    """A reduction over the axes as they are held."""
    order = operand.order
    axes = eqn.params["axes"]
    rest = [order[axis] for axis in range(len(order)) if axis not in axes]
    params = eqn.params | {"axes": tuple(sorted(order[axis] for axis in axes))}
    (result,) = _bind(eqn, [operand.array], params)
    return _transpose(result, tuple(np.argsort(np.argsort(rest)).tolist()))


def _with_rewritten_bodies(eqn: JaxprEqn) -> dict[str, Any]:
    """The parameters of a loop, a branch or a checkpoint, transposes moved inside of its bodies."""
    params = dict(eqn.params)
    for name in BODIES.get(eqn.primitive.name, ()):
        bodies = params[name]
        is_tuple = isinstance(bodies, tuple)
        params[name] = tuple(map(_rewrite, bodies)) if is_tuple else _rewrite(bodies)
    if eqn.primitive.name == "remat2":
        body = _rewrite(ClosedJaxpr(params["jaxpr"], ()))
        if not body.consts:
            params["jaxpr"] = body.jaxpr
    return params


def _rewrite(program: ClosedJaxpr) -> ClosedJaxpr:
    return jax.make_jaxpr(lambda *args: _evaluate(program, args))(*program.in_avals)


def _transpose(value: Any, permutation: Sequence[int]) -> Any:
    """A transposed value, without computing it."""
    if not isinstance(value, _Permuted):
        value = _Permuted(_as_written(value), tuple(range(_rank(value))))
    order = tuple(value.order[axis] for axis in permutation)
    return value.array if order == tuple(range(len(order))) else _Permuted(value.array, order)


def _hold(value: Any, order: Order) -> jax.Array:
    """A value's array with its axes held in an order."""
    if isinstance(value, _Broadcast):
        axes = [order[axis] for axis in value.axes]
        array = lax.transpose(value.array, np.argsort(axes).tolist())
        shape = tuple(value.shape[axis] for axis in np.argsort(order))
        return lax.broadcast_in_dim(array, shape, sorted(axes))
    return _as_written(_transpose(value, np.argsort(order).tolist()))


def _as_written(value: Any) -> Any:
    """The value as an array in the order of its axes."""
    if isinstance(value, _Permuted):
        return lax.transpose(value.array, value.order)
    if isinstance(value, _Broadcast):
        return lax.broadcast_in_dim(value.array, value.shape, value.axes)
    return value


def _rank(value: Any) -> int:
    if isinstance(value, _Broadcast):
        return len(value.shape)
    return len(value.order) if isinstance(value, _Permuted) else np.ndim(value)


def _has_shardings(eqn: JaxprEqn) -> bool:
    """Whether a call of a jitted function says how its arrays are sharded."""
    shardings = (*eqn.params.get("in_shardings", ()), *eqn.params.get("out_shardings", ()))
    return any(type(sharding).__name__ != "UnspecifiedValue" for sharding in shardings)
