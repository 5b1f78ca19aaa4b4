"""`use_layouts`: the plain layers of any linen model on block-sparse convolutions."""

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
from flax import linen as nn

from blocksparse_jax import _checks
from blocksparse_jax._layer_forward import CallArguments, convolve, multiply
from blocksparse_jax.conv import available_implementations
from blocksparse_jax.layout import BlockLayout
from blocksparse_jax.layout_nodes import Dense, is_layout
from blocksparse_jax.linen.conv import BlockSparseConv, kernel_shape
from blocksparse_jax.linen.linear import BlockSparseLinear
from blocksparse_jax.tree import path_name

Executions = dict[str, str]
"""What each layer with a layout ran, by the name of its kernel."""


@contextlib.contextmanager
def use_layouts(
    layouts: Any,
    *,
    kernel_gradient: Literal["masked", "dense"] = "masked",
    implementation: str | None = None,
    precision: Any = None,
) -> Iterator[Executions]:
    """Runs the plain Flax layers of a model block-sparse where their kernels have a layout.

    Within the `with` block, `nn.Conv`, `nn.Dense` and subclasses that keep their `__call__` compute
    with the kept weights only, in all three passes; every other layer runs as it is written. The
    network needs no change, and its parameters and their names stay as they are. Kernels may be
    dense arrays or packed values (`pack_tree`).

    Enter it where the model is applied, inside of the jitted function, and pass the layouts to that
    function as an argument: then new masks do not recompile it. Entered outside of a jitted
    function, the layouts are constants of the compiled program, and other layouts compile another
    one. Layers of `Module.init` run as written. In nested blocks the innermost counts.

    Left as they are written, although they have a layout: transposed convolutions and convolutions
    with a `mask`, which need their dense kernel. A layer of `nn.scan` or `nn.vmap` has one kernel
    for all steps of the loop, stacked, and its layout cannot follow it into the loop from outside;
    write such a layer with `BlockSparseConv` and `variable_axes={"params": 0, "layouts": 0}`.

    Args:
      layouts: `get_layouts(state)`, or a part of it, in the structure of the params of the module
        that is applied.
      kernel_gradient: `"masked"` or `"dense"`, as in `blocksparse_jax.conv`.
      implementation: as in `blocksparse_jax.conv`.
      precision: as in `jax.lax.conv_general_dilated`; None takes each layer's own.

    Yields:
      A dict that fills as layers are traced: from the name of each kernel with a layout to what its
      layer ran ("block-sparse", or "dense" with the reason). `summarize(..., executions=)` shows
      it.

    Raises:
      ValueError: an argument is unknown; a layout has the name of no parameter of the model, or is
        another kernel's; or a layer cannot run with its layout. The message names the layer.

    Example:
      >>> import blocksparse_jax as bsj
      >>> import jax.numpy as jnp
      >>> model, x = nn.Conv(32, (3, 3)), jnp.ones((1, 8, 8, 16))
      >>> params = model.init(jax.random.key(0), x)["params"]
      >>> layouts = bsj.get_layouts(bsj.hrbp_prune(0.9, group_size=16).init(params))
      >>> with use_layouts(layouts) as executions:
      ...     y = model.apply({"params": params}, x)
      >>> executions
      {'kernel': 'block-sparse'}
    """
    _checks.choice("kernel_gradient", kernel_gradient, ("masked", "dense"))
    if implementation is not None:
        _checks.implementation(implementation, available_implementations())
    arguments = _Arguments(kernel_gradient, implementation, precision)
    block = _Block(_by_name(layouts), arguments, {})
    key = _cache_key(block)
    with _innermost(key), nn.intercept_methods(_interceptor(block, key)):
        yield block.executions


_innermost = jax.make_user_context(None)
"""Tells `jax.jit` which layouts its function was traced with, and blocks which is the innermost."""


class _Arguments(NamedTuple):
    """How the block-sparse layers of a block run."""

    kernel_gradient: str
    implementation: str | None
    precision: Any


class _Block(NamedTuple):
    """One `with use_layouts(...)`."""

    layouts: dict[str, BlockLayout]
    arguments: _Arguments
    executions: Executions


class _SameArrays:
    """Equal for the same arrays under the same names, with the same arguments."""

    def __init__(self, block: _Block):
        self.arrays = jax.tree.leaves(block.layouts)
        self.static = (tuple(block.layouts), block.arguments)

    def __hash__(self) -> int:
        return hash((self.static, *map(id, self.arrays)))

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, _SameArrays)
            and self.static == other.static
            and len(self.arrays) == len(other.arrays)
            and all(a is b for a, b in zip(self.arrays, other.arrays, strict=True))
        )


def _cache_key(block: _Block) -> object:
    """Equal for two blocks that may share a compiled program.

    Traced arrays belong to one trace, so a block with any shares with none; without a reference to
    them, the key does not keep them alive.
    """
    if any(isinstance(array, jax.core.Tracer) for array in jax.tree.leaves(block.layouts)):
        return object()
    return _SameArrays(block)


def _by_name(layouts: Any) -> dict[str, BlockLayout]:
    """The block layouts of a tree by the names of their kernels."""
    named = {}
    for path, node in jax.tree.leaves_with_path(layouts, is_leaf=is_layout):
        name = path_name(path)
        if isinstance(node, BlockLayout):
            named[name] = node
        elif not isinstance(node, Dense):
            raise ValueError(
                f"layouts: expected a BlockLayout or Dense() at {name!r}, got "
                f"{type(node).__name__}; use get_layouts(state)"
            )
    return named


def _interceptor(block: _Block, key: object) -> Callable[..., Any]:
    """The function that Flax calls in place of each method of each module."""

    def intercept(
        method: Callable[..., Any], args: Any, kwargs: Any, context: nn.module.InterceptorContext
    ) -> Any:
        module = context.module
        if module.scope is None or module.is_initializing() or _innermost.value is not key:
            return method(*args, **kwargs)
        if module.path == ():
            _check_names(block.layouts, module)
        if context.method_name != "__call__":
            return method(*args, **kwargs)
        name = "/".join((*module.path, "kernel"))
        layout = block.layouts.get(name)
        if layout is None or not module.has_variable("params", "kernel"):
            return method(*args, **kwargs)
        run = _block_sparse_call(module, layout, block.arguments)
        if run is not None:
            block.executions[name] = "block-sparse"
            return run(*args, **kwargs)
        kind = type(module).__name__
        if nn.meta.unbox(module.get_variable("params", "kernel")).shape != layout.shape:
            raise ValueError(
                f"{name}: {kind} runs as it is written and needs its dense kernel; unpack it"
            )
        block.executions[name] = f"dense: {kind}"
        return method(*args, **kwargs)

    return intercept


def _check_names(layouts: dict[str, BlockLayout], root: nn.Module) -> None:
    """ValueError where a layout has the name of no parameter: its layer would run dense."""
    params = jax.tree.leaves_with_path(root.variables.get("params", {}))
    names = {path_name(path) for path, _ in params}
    unknown = layouts.keys() - names
    if names and unknown:  # a transform such as nn.remat calls its module without any params first
        raise ValueError(
            f"layouts: {min(unknown)!r} is no parameter of {type(root).__name__}, expected names "
            f"among {sorted(names)[:8]}; give the layouts the structure of the params"
        )


def _is_plain(module: nn.Module, layer: type[nn.Module]) -> bool:
    """Whether a module computes as Flax's layer does: with its call and its way to its params."""
    methods = ("__call__", "param")
    return isinstance(module, layer) and all(
        getattr(type(module), name) is getattr(layer, name) for name in methods
    )


def _block_sparse_call(
    module: nn.Module, layout: BlockLayout, arguments: _Arguments
) -> Callable[..., Any] | None:
    """What computes a module's output with its layout, if anything can."""
    if isinstance(module, BlockSparseConv | BlockSparseLinear):
        if module.has_variable("layouts", "kernel"):
            return None
        layer = module
    elif _is_plain(module, nn.Conv) and module.mask is None:
        _refuse_what_cannot_run(module, layout, _conv_option(module))
        layer = BlockSparseConv(
            module.features,
            module.kernel_size,
            module.strides,
            module.padding,
            module.kernel_dilation,
            module.feature_group_count,
            **_common_options(module, arguments),
        )
    elif _is_plain(module, nn.Dense):
        _refuse_what_cannot_run(module, layout, _dense_option(module))
        layer = BlockSparseLinear(module.features, **_common_options(module, arguments))
    else:
        return None
    return functools.partial(_call, layer, module, layout)


def _common_options(module: Any, arguments: _Arguments) -> dict[str, Any]:
    return {
        "use_bias": module.use_bias,
        "dtype": module.dtype,
        "precision": module.precision if arguments.precision is None else arguments.precision,
        "implementation": arguments.implementation,
        "kernel_gradient": arguments.kernel_gradient,
        "parent": None,
    }


def _call(
    layer: BlockSparseConv | BlockSparseLinear,
    module: nn.Module,
    layout: BlockLayout,
    inputs: Any,
    **call_arguments: Any,
) -> Any:
    """A layer's forward pass with the parameters of a module."""
    kernel = nn.meta.unbox(module.get_variable("params", "kernel"))
    bias = nn.meta.unbox(module.get_variable("params", "bias")) if layer.use_bias else None
    promote_dtype = getattr(module, "promote_dtype", nn.dtypes.promote_dtype)
    if promote_dtype is not nn.dtypes.promote_dtype:
        inputs, kernel, bias = promote_dtype(inputs, kernel, bias, dtype=layer.dtype)
    name = _name(module)
    if isinstance(layer, BlockSparseLinear):
        rows = np.shape(inputs)[-1], layer.features
        return multiply(layer, name, inputs, kernel, bias, layout, rows)
    arguments = CallArguments(**call_arguments)
    return convolve(
        layer, name, inputs, kernel, bias, layout, kernel_shape(layer, inputs), arguments
    )


def _name(module: nn.Module) -> str:
    return "/".join(module.path) or type(module).__name__


def _refuse_what_cannot_run(module: nn.Module, layout: BlockLayout, option: str | None) -> None:
    """ValueError, with the layer's name, where a block-sparse layer cannot take its place."""
    name = _name(module)
    if option is not None:
        raise ValueError(
            f"{name}/kernel: a layer with {option} has no block-sparse form; give it Dense() as "
            f"its layout, or leave it out with where="
        )
    if layout.kernels.stack:
        raise ValueError(
            f"{name}/kernel: its layout is that of {layout.kernels.count} stacked layers, which "
            f"cannot follow them into the loop of nn.scan or nn.vmap; write the layer with "
            f"BlockSparseConv and variable_axes={{'params': 0, 'layouts': 0}}, or give it Dense()"
        )


def _conv_option(module: Any) -> str | None:
    """The option of a convolution that a block-sparse one does not have."""
    dilation = 1 if module.input_dilation is None else module.input_dilation
    if np.any(np.asarray(dilation) != 1):
        return f"input_dilation={module.input_dilation}"
    if module.conv_general_dilated or module.conv_general_dilated_cls:
        return "a conv_general_dilated of its own"
    if np.size(module.kernel_size) != 2:
        return f"kernel_size={module.kernel_size}"
    return None


def _dense_option(module: Any) -> str | None:
    """The option of a dense layer that a block-sparse one does not have."""
    if module.dot_general or module.dot_general_cls:
        return "a dot_general of its own"
    return None
