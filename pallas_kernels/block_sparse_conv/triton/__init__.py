"""The convolution in Triton kernels for NVIDIA GPUs from Ampere on."""

from pallas_kernels.block_sparse_conv.triton.launch import IMPLEMENTATION, limits, unavailable

__all__ = ["IMPLEMENTATION", "limits", "unavailable"]
