"""Where a model spends its work: how often each kernel is applied to one image."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn


def conv_positions(
    model: nn.Module, variables: Any, image_shape: tuple[int, int, int]
) -> dict[str, int]:
    """Output positions per image of every conv and dense kernel, found by tracing the model.

    A kernel's multiply-adds per image are its size times its positions.

    Args:
      model: a linen model over NHWC images.
      variables: its variables, with dense kernels.
      image_shape: (height, width, channels).

    Returns:
      "path/of/the/kernel" -> positions: output height times width for a convolution, 1 for a dense
      layer behind a pool.
    """
    positions: dict[str, int] = {}

    def record(call, args, kwargs, context):
        out = call(*args, **kwargs)
        if context.method_name == "__call__" and context.module.has_variable("params", "kernel"):
            kernel = context.module.get_variable("params", "kernel")
            positions["/".join((*context.module.path, "kernel"))] = out.size // kernel.shape[-1]
        return out

    with nn.intercept_methods(record):
        jax.eval_shape(
            lambda v, x: model.apply(v, x, train=False),
            variables,
            jnp.zeros((1, *image_shape), jnp.float32),
        )
    return positions
