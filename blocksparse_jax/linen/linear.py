"""`BlockSparseLinear` for Flax linen: `nn.Dense` whose kernel may be block-sparse."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from blocksparse_jax._layer_forward import multiply
from blocksparse_jax.linen.conv import layout_of


class BlockSparseLinear(nn.Module):
    """A linear layer that does only the kept work where its kernel has a layout.

    It has `nn.Dense`'s parameters and defaults: `y = x @ kernel + bias`. The layout is in the
    collection `layouts`, as with `BlockSparseConv`; where it is a `BlockLayout`, the param `kernel`
    may be the dense array `[cin, cout]` or the packed values `[groups, kept, 1, group_size]`.

    Pruning methods leave dense kernels alone unless `where` selects them: `hrbp_prune(0.9,
    where=lambda name, leaf: leaf.ndim == 2)`.

    Attributes:
      features: outputs.
      use_bias: adds a bias `[features]`.
      dtype: of the computation; None takes it from the input and the params.
      param_dtype: of the params.
      precision: as in `jax.lax.dot_general`.
      kernel_init: initializer of the kernel `[cin, cout]`.
      bias_init: initializer of the bias.
      implementation: as in `blocksparse_jax.linear`; dense leaves do not use it.
      kernel_gradient: `"masked"` or `"dense"`, as in `blocksparse_jax.linear`.

    Raises:
      ValueError: the layout or the kernel is another layer's (the message starts with this module's
        path), or the collection `layouts` names a kernel that the params do not have.

    Example:
      >>> import blocksparse_jax as bsj
      >>> layer, x = BlockSparseLinear(32), jnp.ones((4, 16))
      >>> params = layer.init(jax.random.key(0), x)["params"]
      >>> method = bsj.hrbp_prune(0.75, group_size=8, where=lambda name, leaf: leaf.ndim == 2)
      >>> layouts = bsj.get_layouts(method.init(params))
      >>> layer.apply({"params": params, "layouts": layouts}, x).shape
      (4, 32)

    Reference: the block of Ma et al., "HRBP", CPAL 2024, at a 1x1 kernel.
    """

    features: int
    use_bias: bool = True
    dtype: Any = None
    param_dtype: Any = jnp.float32
    precision: Any = None
    kernel_init: Callable[..., jax.Array] = nn.initializers.lecun_normal()
    bias_init: Callable[..., jax.Array] = nn.initializers.zeros_init()
    implementation: str | None = None
    kernel_gradient: str = "masked"

    @nn.compact
    def __call__(self, x: Float[Array, "*rows cin"]) -> Float[Array, "*rows cout"]:
        """Multiplies.

        Args:
          x: `[..., cin]`.

        Returns:
          `[..., features]`.
        """
        shape = (jnp.shape(x)[-1], self.features)
        if self.has_variable("params", "kernel"):
            # self.param would refuse packed values, which have another shape.
            kernel = nn.meta.unbox(self.get_variable("params", "kernel"))
        else:
            kernel = self.param("kernel", self.kernel_init, shape, self.param_dtype)
        bias = None
        if self.use_bias:
            bias = self.param("bias", self.bias_init, (self.features,), self.param_dtype)
        name = "/".join(self.path) or type(self).__name__
        return multiply(self, name, x, kernel, bias, layout_of(self), shape)
