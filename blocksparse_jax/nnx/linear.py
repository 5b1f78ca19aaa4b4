"""`BlockSparseLinear` for Flax nnx: `nnx.Linear` whose kernel may be block-sparse."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from blocksparse_jax._layer_forward import multiply
from blocksparse_jax.layout import BlockLayout
from blocksparse_jax.layout_nodes import Dense
from blocksparse_jax.nnx.layouts import Layouts

# The initializers of nnx.Linear.
_KERNEL_INIT = nnx.initializers.lecun_normal()
_BIAS_INIT = nnx.initializers.zeros_init()


class BlockSparseLinear(nnx.Linear):
    """A linear layer that does only the kept work where it has a layout.

    It has `nnx.Linear`'s parameters and defaults: `y = x @ kernel + bias`. The layout is in
    `self.layout`, as with `BlockSparseConv`; where it is a `BlockLayout`, `self.kernel` may hold
    the dense kernel `[cin, cout]` or the packed values `[groups, kept, 1, group_size]`.

    Pruning methods leave dense kernels alone unless `where` selects them: `hrbp_prune(0.9,
    where=lambda name, leaf: leaf.ndim == 2)`.

    Args:
      in_features: inputs.
      out_features: outputs.
      use_bias: adds a bias `[out_features]`.
      dtype: of the computation; None takes it from the input and the params.
      param_dtype: of the params.
      precision: as in `jax.lax.dot_general`.
      kernel_init: initializer of the kernel `[cin, cout]`.
      bias_init: initializer of the bias.
      implementation: as in `blocksparse_jax.linear`; a dense layer does not use it.
      kernel_gradient: `"masked"` or `"dense"`, as in `blocksparse_jax.linear`.
      rngs: `nnx.Rngs`.

    Raises:
      ValueError: (in a call) the layout or the kernel is another layer's.

    Example:
      >>> layer = BlockSparseLinear(16, 32, rngs=nnx.Rngs(0))
      >>> layer(jnp.ones((4, 16))).shape
      (4, 32)

    Reference: the block of Ma et al., "HRBP", CPAL 2024, at a 1x1 kernel.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        use_bias: bool = True,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        precision: Any = None,
        kernel_init: Callable[..., jax.Array] = _KERNEL_INIT,
        bias_init: Callable[..., jax.Array] = _BIAS_INIT,
        implementation: str | None = None,
        kernel_gradient: str = "masked",
        rngs: nnx.Rngs,
    ):
        super().__init__(
            in_features,
            out_features,
            use_bias=use_bias,
            dtype=dtype,
            param_dtype=param_dtype,
            precision=precision,
            kernel_init=kernel_init,
            bias_init=bias_init,
            rngs=rngs,
        )
        self.set_options(implementation, kernel_gradient)

    @property
    def kernel_shape(self) -> tuple[int, int]:
        """`(cin, cout)`: the shape of the dense kernel."""
        return self.in_features, self.out_features

    def set_options(self, implementation: str | None, kernel_gradient: str) -> None:
        """Sets what this layer has beside the fields of `nnx.Linear`; its layout is dense."""
        self.layout = Layouts(Dense())
        self.implementation = implementation
        self.kernel_gradient = kernel_gradient

    def __call__(
        self, x: Float[Array, "*rows cin"], layout: BlockLayout | Dense | None = None
    ) -> Float[Array, "*rows cout"]:
        """Multiplies.

        Args:
          x: `[..., cin]`.
          layout: used in place of `self.layout`.

        Returns:
          `[..., out_features]`.
        """
        if layout is None:
            layout = self.layout.get_value()
        bias = None if self.bias is None else self.bias[...]
        name = type(self).__name__
        return multiply(self, name, x, self.kernel[...], bias, layout, self.kernel_shape)
