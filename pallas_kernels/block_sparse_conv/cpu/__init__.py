"""The convolution in native C++ kernels for CPUs."""

from pallas_kernels.block_sparse_conv.cpu.launch import IMPLEMENTATION, instructions, unavailable

__all__ = ["IMPLEMENTATION", "instructions", "unavailable"]
