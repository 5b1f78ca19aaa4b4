"""Batch norm in training, with the shortcut and the ReLU that follow it.

    x = relu(slope (z - mean) + bias + shortcut),  slope = scale / sqrt(variance + epsilon)

`formula` holds it with its gradient, in XLA's operations, once for all that lies here:

- `activations.norm_act` takes the statistics from the activations: XLA's operations, or the native
  CPU kernels, which read a channel while it is in the cache.
- `sums` takes them from the sums of each channel, which a convolution's kernel emits with its
  output: what a convolution between batch norms (`block_sparse_conv.norm_act_conv`) is made of.
  `pool` has a max pool in the place of the convolution.
"""

from pallas_kernels.batch_norm.formula import Affine, add_gradient_of_sums, apply, masked_gradient
from pallas_kernels.batch_norm.pool import norm_act_max_pool
from pallas_kernels.batch_norm.spec import NormSpec
from pallas_kernels.batch_norm.sums import (
    Norm,
    affine,
    channel_sums,
    count,
    mean_and_variance,
    norm_act_apply,
    norm_gradient,
    with_sums,
)

__all__ = [
    "Affine",
    "Norm",
    "NormSpec",
    "add_gradient_of_sums",
    "affine",
    "apply",
    "channel_sums",
    "count",
    "masked_gradient",
    "mean_and_variance",
    "norm_act_apply",
    "norm_act_max_pool",
    "norm_gradient",
    "with_sums",
]
