"""The convolution in plain XLA."""

from pallas_kernels.block_sparse_conv.xla.kernels import FORMULATIONS
from pallas_kernels.block_sparse_conv.xla.launch import IMPLEMENTATION, unavailable

__all__ = ["FORMULATIONS", "IMPLEMENTATION", "unavailable"]
