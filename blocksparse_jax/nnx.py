"""`BlockSparseConv` for Flax nnx: `nnx.Conv` whose kernel may be block-sparse."""

from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array, Float

from blocksparse_jax._layer_forward import (
    CallArguments,
    LayerPadding,
    channel_axis,
    convolve,
    pair,
)
from blocksparse_jax.layout import BlockLayout, Dense, is_layout
from blocksparse_jax.tree import path_name

# The initializers of nnx.Conv.
_KERNEL_INIT = nnx.initializers.lecun_normal()
_BIAS_INIT = nnx.initializers.zeros_init()


class Layouts(nnx.Variable):
    """The variable type that holds a layer's layout.

    `nnx.state(model, Layouts)` has the index arrays, `nnx.state(model, nnx.Param)` has none of
    them.

    Example:
      >>> isinstance(BlockSparseConv(4, 8, 3, rngs=nnx.Rngs(0)).layout, Layouts)
      True
    """


class BlockSparseConv(nnx.Module):
    """A 2-D convolution that does only the kept work where it has a layout.

    It has `nnx.Conv`'s parameters and defaults. `y = activation(scale * (x * kernel + bias) + shift
    + residual)`, where `scale`, `shift`, `residual` and `activation` are arguments of the call.

    The layout is in `self.layout`, a `Layouts` variable that starts as `Dense()`; `set_layouts`
    sets those of a whole model. Where it is a `BlockLayout`, `self.kernel` may hold the dense
    kernel or the packed values.

    Args:
      in_features: input channels.
      out_features: filters (output channels).
      kernel_size: `(kh, kw)`, or one integer for both.
      strides: step in pixels `(y, x)`, or one integer for both.
      padding: `"SAME"`, `"VALID"`, an integer, or per axis an integer or `(low, high)`, in pixels.
      kernel_dilation: distance between taps in pixels `(y, x)`, or one integer for both.
      feature_group_count: groups of a grouped (depthwise) convolution; above 1 the kernel must be
        dense.
      use_bias: adds a bias `[out_features]`.
      dtype: of the computation; None takes it from the input and the params.
      param_dtype: of the params.
      precision: as in `jax.lax.conv_general_dilated`.
      kernel_init: initializer of the kernel `[kh, kw, cin, cout]`.
      bias_init: initializer of the bias.
      data_format: `"NHWC"` or `"CHWN"` (native: no transposes around a sparse layer), of the input
        and the output.
      implementation: as in `blocksparse_jax.conv`; a dense layer does not use it.
      kernel_gradient: `"masked"` or `"dense"`, as in `blocksparse_jax.conv`; dynamic HRBP and RigL
        need `"dense"` at their update steps.
      rngs: `nnx.Rngs`.

    Raises:
      ValueError: an argument is unknown, or (in a call) the layout or the kernel is another
        layer's.

    Example:
      >>> layer = BlockSparseConv(4, 8, (3, 3), rngs=nnx.Rngs(0))
      >>> layer(jnp.ones((1, 5, 5, 4))).shape
      (1, 5, 5, 8)

    Reference: the block of Ma et al., "HRBP", CPAL 2024.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        kernel_size: int | Sequence[int],
        strides: int | Sequence[int] | None = 1,
        *,
        padding: LayerPadding = "SAME",
        kernel_dilation: int | Sequence[int] | None = 1,
        feature_group_count: int = 1,
        use_bias: bool = True,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        precision: Any = None,
        kernel_init: Callable[..., jax.Array] = _KERNEL_INIT,
        bias_init: Callable[..., jax.Array] = _BIAS_INIT,
        data_format: str = "NHWC",
        implementation: str | None = None,
        kernel_gradient: str = "masked",
        rngs: nnx.Rngs,
    ):
        channel_axis(data_format)  # refuses an unknown format
        self.kernel_shape = (
            *pair("kernel_size", kernel_size),
            in_features // feature_group_count,
            out_features,
        )
        self.kernel = nnx.Param(kernel_init(rngs.params(), self.kernel_shape, param_dtype))
        if use_bias:
            self.bias = nnx.Param(bias_init(rngs.params(), (out_features,), param_dtype))
        else:
            self.bias = nnx.data(None)  # type: ignore[arg-type]
        self.layout = Layouts(Dense())
        self.strides = strides
        self.padding = padding
        self.kernel_dilation = kernel_dilation
        self.feature_group_count = feature_group_count
        self.dtype = dtype
        self.precision = precision
        self.data_format = data_format
        self.implementation = implementation
        self.kernel_gradient = kernel_gradient

    def __call__(
        self,
        x: Float[Array, "..."],
        layout: BlockLayout | Dense | None = None,
        *,
        scale: Float[Array, " cout"] | None = None,
        shift: Float[Array, " cout"] | None = None,
        residual: Float[Array, "..."] | None = None,
        activation: Literal["relu"] | None = None,
    ) -> Float[Array, "..."]:
        """Convolves.

        Args:
          x: activations `[n, h, w, cin]` (also without or with more batch axes, as `nnx.Conv`), or
            `[cin, h, w, n]` with `"CHWN"`.
          layout: used in place of `self.layout`.
          scale, shift: one number for each feature; a batch norm at inference has `scale = gamma /
            sqrt(var + epsilon)` and `shift = beta - mean * scale`.
          residual: added to the output; in its shape.
          activation: `"relu"` or None.

        Returns:
          Activations in the same format with `out_features` channels.
        """
        if layout is None:
            layout = self.layout.get_value()
        bias = None if self.bias is None else self.bias[...]
        return convolve(
            self,
            type(self).__name__,
            x,
            self.kernel[...],
            bias,
            layout,
            self.kernel_shape,
            CallArguments(scale, shift, residual, activation),
        )


class Optimizer(nnx.Optimizer):
    """`nnx.Optimizer` for transformations whose state holds layouts.

    `nnx.Optimizer` writes its state back leaf by leaf, and leaves a dict where a `BlockLayout` was.
    This class keeps each layout whole: `get_layouts(optimizer.opt_state)` works after any number of
    updates, and the first update does not change the state's structure.

    Example:
      >>> import blocksparse_jax as bsj
      >>> model = nnx.List([BlockSparseConv(16, 32, 3, rngs=nnx.Rngs(0))])
      >>> method = bsj.hrbp_prune(0.5, group_size=16, block_density=1)
      >>> tx = bsj.sparse(method, optax.sgd(0.1))
      >>> optimizer = Optimizer(model, tx, wrt=nnx.Param)
      >>> set_layouts(model, bsj.get_layouts(optimizer.opt_state))
      >>> model[0].layout.get_value().packed_shape
      (2, 8, 9, 16)
    """

    def update(self, model: Any, grads: Any, /, **kwargs: Any) -> Any:
        """Updates the model's parameters and the optimizer's state in place.

        Args:
          model: the module whose parameters are trained.
          grads: gradients of `nnx.grad`.
          **kwargs: extra arguments of the transformation.

        Returns:
          The updates, with the structure of the parameters.
        """
        params = nnx.as_pure(nnx.state(model, self.wrt))
        gradients = nnx.as_pure(nnx.state(grads, self.wrt))
        state = nnx.as_pure(self.opt_state)
        updates, new_state = self.tx.update(gradients, state, params, **nnx.as_pure(kwargs))
        nnx.update(model, optax.apply_updates(params, updates))
        jax.tree.map(
            lambda variable, value: variable.set_value(value),
            self.opt_state,
            new_state,
            is_leaf=lambda node: isinstance(node, nnx.Variable),
        )
        self.step[...] += 1
        return updates


def set_layouts(model: nnx.Module, layouts: Any) -> None:
    """Sets the layouts of a model's `BlockSparseConv` modules, in place.

    Modules that the tree does not name become dense.

    Args:
      model: any nnx module.
      layouts: a tree with the structure of `nnx.state(model, nnx.Param)` (`get_layouts` gives one),
        its leaves `BlockLayout | Dense()`.

    Raises:
      ValueError: a layout is not of a `BlockSparseConv` kernel of this model; the message names its
        path.

    Example:
      >>> from blocksparse_jax.layout import mask_to_layout
      >>> model = nnx.List([BlockSparseConv(4, 8, 3, rngs=nnx.Rngs(0))])
      >>> layout = mask_to_layout(jnp.ones((3, 3, 4, 8), bool))
      >>> set_layouts(model, {0: {"kernel": layout, "bias": Dense()}})
      >>> model[0].layout.get_value().packed_shape
      (1, 4, 9, 8)
    """
    leaves, _ = jax.tree_util.tree_flatten_with_path(layouts, is_leaf=is_layout)
    by_name = {path_name(path): layout for path, layout in leaves if not isinstance(layout, Dense)}
    convs = {
        "/".join(map(str, (*path, "kernel"))): module
        for path, module in nnx.iter_modules(model)
        if isinstance(module, BlockSparseConv)
    }
    for name, layout in by_name.items():
        if not isinstance(layout, BlockLayout):
            raise ValueError(
                f"layouts: at {name} expected a BlockLayout or Dense(), got "
                f"{type(layout).__name__}; use get_layouts(state)"
            )
        if name not in convs:
            raise ValueError(
                f"layouts: {name} is no kernel of a BlockSparseConv of this model; expected: "
                f"{', '.join(convs) or 'none'}"
            )
        if tuple(layout.shape) != convs[name].kernel_shape:
            raise ValueError(
                f"layouts: {name} is of a kernel {tuple(layout.shape)}, expected "
                f"{convs[name].kernel_shape}"
            )
    for name, module in convs.items():
        module.layout.set_value(by_name.get(name, Dense()))
