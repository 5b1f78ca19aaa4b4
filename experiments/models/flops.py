"""Counts how often a model applies each kernel to one image, for FLOPs."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn


def conv_positions(
    model: nn.Module, variables: Any, image_shape: tuple[int, int, int]
) -> dict[str, int]:
    """Counts the output positions per image of every convolution and dense layer.

    A kernel's multiply-adds per image are its size times its positions. The model is traced, not
    run.

    Args:
      model: a linen model that takes NHWC images.
      variables: its variables, with dense kernels.
      image_shape: `(height, width, channels)`.

    Returns:
      "path/of/the/kernel" -> positions: output height times width for a convolution, 1 for a dense
      layer after a pool.
    """
    positions: dict[str, int] = {}

    def record(call, args, kwargs, context):
        """Calls a module's method and records the positions of its kernel, if it has one."""
        out = call(*args, **kwargs)
        module = context.module
        if context.method_name == "__call__" and module.has_variable("params", "kernel"):
            kernel = module.get_variable("params", "kernel")
            positions["/".join((*module.path, "kernel"))] = out.size // kernel.shape[-1]
        return out

    with nn.intercept_methods(record):
        jax.eval_shape(
            lambda v, x: model.apply(v, x, train=False),
            variables,
            jnp.zeros((1, *image_shape), jnp.float32),
        )
    return positions
