"""An implementation on the CPU with the passes between batch norms: XLA's, as a GPU's would be."""

import dataclasses

from pallas_kernels.block_sparse_conv import norm_passes, xla


def _forward_with_sums(*operands):
    return norm_passes.forward_with_sums(xla.IMPLEMENTATION.forward, *operands)


def _norm_input_gradient(*operands):
    return norm_passes.norm_input_gradient(xla.IMPLEMENTATION.input_gradient, *operands)


FUSED = dataclasses.replace(
    xla.IMPLEMENTATION,
    name="fused",
    forward_with_sums=_forward_with_sums,
    norm_input_gradient=_norm_input_gradient,
)
