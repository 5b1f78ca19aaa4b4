"""linear: the product with a dense kernel of which only blocks are kept, as a 1x1 convolution."""

from typing import Any, Literal

import jax.numpy as jnp
from jaxtyping import Array, Float

from blocksparse_jax import _checks
from blocksparse_jax.conv import conv, finish
from blocksparse_jax.geometry import images_of_rows
from blocksparse_jax.layout import BlockLayout, conv_layout
from blocksparse_jax.layout_nodes import Dense

__all__ = ["linear"]


def linear(
    x: Float[Array, "*rows cin"],
    kernel: Float[Array, "..."],
    layout: BlockLayout | Dense,
    *,
    bias: Float[Array, " cout"] | None = None,
    activation: Literal["relu"] | None = None,
    implementation: str | None = None,
    kernel_gradient: Literal["masked", "dense"] = "masked",
    precision: Any = None,
) -> Float[Array, "*rows cout"]:
    """Multiplies by the kept weights of a dense kernel; all three passes do only the kept work.

    Equals `activation(x @ where(mask, kernel, 0) + bias)` with `mask = layout_to_mask(layout)`. It
    is `conv` with a 1x1 kernel: what that says about values that are not finite, about derivatives
    and about empty batches holds here too.

    Args:
      x: `[..., cin]`, any number of axes in front; float32, bfloat16 or float16.
      kernel: the kernel `[cin, cout]`, or its packed values `[groups, kept, 1, group_size]`; cast
        to `x.dtype`, products are accumulated in float32.
      layout: the kernel's layout; `Dense()` multiplies by the whole kernel.
      bias: one number for each output feature.
      activation: "relu" or None.
      implementation: as in `conv`.
      kernel_gradient: as in `conv`: "dense" where RigL or dynamic HRBP need the full gradient.
      precision: as in `lax.dot_general`.

    Returns:
      `[..., cout]`, in `x.dtype`.

    Raises:
      ValueError: an argument is unknown or does not fit; the message names it.
      NotImplementedError: the named implementation cannot run this call, with the reason.

    Example:
      >>> import blocksparse_jax as bsj
      >>> mask = jnp.zeros((4, 6), bool).at[:2, :3].set(True).at[2:, 3:].set(True)
      >>> layout, kernel = bsj.mask_to_layout(mask), jnp.ones((4, 6))
      >>> linear(jnp.ones((5, 4)), kernel, layout)[0].tolist()
      [2.0, 2.0, 2.0, 2.0, 2.0, 2.0]

    Reference: HRBP's accelerated training, Ma et al., CPAL 2024, at a 1x1 kernel.
    """
    if isinstance(layout, BlockLayout) and len(layout.shape) != 2:
        raise ValueError(
            f"layout: expected that of a dense kernel [cin, cout], got one of a conv kernel "
            f"{layout.shape}; call conv"
        )
    x, kernel = jnp.asarray(x), jnp.asarray(kernel)
    is_packed = isinstance(layout, BlockLayout) and kernel.ndim == 4
    if kernel.ndim != 2 and not is_packed:
        raise ValueError(
            f"kernel: expected [cin, cout], or packed values with their layout, got shape "
            f"{kernel.shape}"
        )
    cin, cout = layout.shape if isinstance(layout, BlockLayout) else kernel.shape
    if x.ndim < 1 or x.shape[-1] != cin:
        raise ValueError(
            f"x: expected {cin} features in its last axis for the kernel {(cin, cout)}, got shape "
            f"{x.shape}"
        )
    images = x.reshape(images_of_rows(x.shape))
    if isinstance(layout, Dense):
        _checks.choice("kernel_gradient", kernel_gradient, ("masked", "dense"))
        y = jnp.matmul(images, kernel.astype(x.dtype), precision=precision)
        y = finish(y, None, bias, None, activation, "NHWC")
    else:
        y = conv(
            images,
            kernel if is_packed else kernel[None, None],
            conv_layout(layout),
            bias=bias,
            activation=activation,
            implementation=implementation,
            kernel_gradient=kernel_gradient,
            packed=is_packed,
            precision=precision,
        )
    return y.reshape(*x.shape[:-1], cout)
