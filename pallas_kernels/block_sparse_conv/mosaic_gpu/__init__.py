"""The convolution in Pallas on Mosaic GPU, for NVIDIA Hopper GPUs."""

from pallas_kernels.block_sparse_conv.mosaic_gpu.launch import (
    IMPLEMENTATION,
    implementation,
    limits,
    unavailable,
)

__all__ = ["IMPLEMENTATION", "implementation", "limits", "unavailable"]
