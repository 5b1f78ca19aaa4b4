"""A whole nnx model: its layers made block-sparse, and their layouts set."""

from typing import Any, Literal, TypeVar, cast

import jax
import numpy as np
from flax import nnx
from jax import lax

from blocksparse_jax import _checks
from blocksparse_jax.conv import available_implementations
from blocksparse_jax.layout import BlockLayout
from blocksparse_jax.layout_nodes import Dense, is_layout
from blocksparse_jax.nnx.conv import BlockSparseConv
from blocksparse_jax.nnx.linear import BlockSparseLinear
from blocksparse_jax.packing import refuse_foreign_values
from blocksparse_jax.tree import path_name

Model = TypeVar("Model", bound=nnx.Module)
Layer = BlockSparseConv | BlockSparseLinear
_OWN = {"promote_dtype": nnx.nn.dtypes.promote_dtype, "preferred_element_type": None}
_PLAIN: dict[type[nnx.Module], dict[str, Any]] = {
    nnx.Conv: _OWN | {"mask": None, "conv_general_dilated": lax.conv_general_dilated},
    nnx.Linear: _OWN | {"dot_general": lax.dot_general},
}
"""The fields of Flax's layers that a block-sparse layer cannot have otherwise."""
_BLOCK_SPARSE = {nnx.Conv: BlockSparseConv, nnx.Linear: BlockSparseLinear}


def sparsify(
    model: Model,
    *,
    kernel_gradient: Literal["masked", "dense"] = "masked",
    implementation: str | None = None,
) -> Model:
    """Makes the plain layers of any nnx model ready for layouts, in place.

    Each `nnx.Conv` with a two-dimensional kernel becomes a `BlockSparseConv`, and each `nnx.Linear`
    a `BlockSparseLinear`: the same object with the same parameters under the same paths, shared
    modules included. It computes what it did before until `set_layouts` gives it a layout. Other
    layers stay as they are: subclasses, transposed convolutions, convolutions with a `mask` or an
    `input_dilation`, layers with functions of their own.

    Args:
      model: any nnx module.
      kernel_gradient: `"masked"` or `"dense"`, as in `blocksparse_jax.conv`.
      implementation: as in `blocksparse_jax.conv`.

    Returns:
      The same model.

    Raises:
      ValueError: an argument is unknown, or the model is none of nnx.

    Example:
      >>> model = sparsify(nnx.Sequential(nnx.Conv(4, 8, (3, 3), rngs=nnx.Rngs(0)), nnx.relu))
      >>> type(model.layers[0]).__name__
      'BlockSparseConv'
    """
    _checks.choice("kernel_gradient", kernel_gradient, ("masked", "dense"))
    if implementation is not None:
        _checks.implementation(implementation, available_implementations())
    if not isinstance(model, nnx.Module):
        raise ValueError(
            f"model: expected an nnx.Module, got {type(model).__name__}; a linen model takes "
            "linen.use_layouts"
        )
    for _, module in nnx.iter_modules(model):
        if _is_plain(module):
            # The object itself changes, so that all references to it see the new layer.
            object.__setattr__(module, "__class__", _BLOCK_SPARSE[type(module)])
            cast(Layer, module).set_options(implementation, kernel_gradient)
    return model


def _is_plain(module: nnx.Module) -> bool:
    """Whether a block-sparse layer computes what this layer does."""
    fields = _PLAIN.get(type(module))
    if fields is None or any(getattr(module, name) is not value for name, value in fields.items()):
        return False
    if not isinstance(module, nnx.Conv):
        return True
    dilation = 1 if module.input_dilation is None else module.input_dilation
    return len(module.kernel_size) == 2 and bool(np.all(np.asarray(dilation) == 1))


def set_layouts(model: nnx.Module, layouts: Any) -> None:
    """Sets the layouts of a model's block-sparse layers, in place.

    Layers that the tree does not name become dense. Layers that share a kernel share its layout.
    Kernels of other layers may have a layout too, as `get_layouts` gives one to every pruned
    kernel: these layers run dense (`executions` says so).

    Args:
      model: any nnx module, of block-sparse layers or after `sparsify`.
      layouts: a tree with the structure of `nnx.state(model, nnx.Param)` (`get_layouts` gives one),
        its leaves `BlockLayout | Dense()`.

    Raises:
      ValueError: no layer of the model can have a layout, or a layout has the name of no parameter
        or is another kernel's; the message names its path. Then no layout is changed.

    Example:
      >>> from blocksparse_jax.layout_of_mask import mask_to_layout
      >>> model = nnx.List([BlockSparseConv(4, 8, 3, rngs=nnx.Rngs(0))])
      >>> layout = mask_to_layout(np.ones((3, 3, 4, 8), bool))
      >>> set_layouts(model, {0: {"kernel": layout, "bias": Dense()}})
      >>> model[0].layout.get_value().packed_shape
      (1, 4, 9, 8)
    """
    params = _params(model)
    layers = _layers(model)
    if not layers:
        raise ValueError(
            "model: no layer of it can have a layout, expected block-sparse layers; call "
            "nnx.sparsify(model) first (linen layers in nnx.bridge.ToNNX run under "
            "linen.use_layouts)"
        )
    by_kernel = {}
    for path, layout in jax.tree.leaves_with_path(layouts, is_leaf=is_layout):
        name = path_name(path)
        if isinstance(layout, Dense):
            continue
        if not isinstance(layout, BlockLayout):
            raise ValueError(
                f"layouts: at {name} expected a BlockLayout or Dense(), got "
                f"{type(layout).__name__}; use get_layouts(state)"
            )
        if name not in params:
            raise ValueError(
                f"layouts: {name} is no parameter of this model, expected names among "
                f"{sorted(params)[:8]}; give the layouts the structure of its parameters"
            )
        kernel = params[name]
        shapes = {layer.kernel_shape for layer in layers if layer.kernel is kernel}
        for shape in shapes or {kernel.shape}:
            if tuple(layout.shape) != shape:
                raise ValueError(
                    f"layouts: {name} is of a kernel {tuple(layout.shape)}, expected {shape}"
                )
        refuse_foreign_values(name, kernel.get_value(), layout)
        by_kernel[id(kernel)] = layout
    for layer in layers:
        layer.layout.set_value(by_kernel.get(id(layer.kernel), Dense()))


def executions(model: nnx.Module) -> dict[str, str]:
    """What the layers of a model run, as far as they are block-sparse.

    Args:
      model: any nnx module.

    Returns:
      "block-sparse" by the name of each kernel whose layer has a layout; `summarize(...,
      executions=)` shows it.

    Example:
      >>> executions(BlockSparseConv(4, 8, 3, rngs=nnx.Rngs(0)))
      {}
    """
    sparse = {
        id(layer.kernel)
        for layer in _layers(model)
        if isinstance(layer.layout.get_value(), BlockLayout)
    }
    return {name: "block-sparse" for name, param in _params(model).items() if id(param) in sparse}


def _layers(model: nnx.Module) -> list[Layer]:
    """The layers that can have a layout."""
    return [module for _, module in nnx.iter_modules(model) if isinstance(module, Layer)]


def _params(model: nnx.Module) -> dict[str, nnx.Variable]:
    """The variables of a model by name; one that is shared has one name, as in `nnx.state`."""
    return {
        "/".join(map(str, path)): node
        for path, node in nnx.iter_graph(model)
        if isinstance(node, nnx.Variable)
    }
