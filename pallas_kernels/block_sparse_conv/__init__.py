"""The block-sparse convolution in (C, H, W, N): one function, several implementations."""

from pallas_kernels.block_sparse_conv.api import (
    available_implementations,
    block_sparse_conv,
    choose_implementation,
)
from pallas_kernels.block_sparse_conv.epilogue import apply_epilogue, check_epilogue
from pallas_kernels.block_sparse_conv.spec import Choice, ConvSpec, Implementation

__all__ = [
    "Choice",
    "ConvSpec",
    "Implementation",
    "apply_epilogue",
    "available_implementations",
    "block_sparse_conv",
    "check_epilogue",
    "choose_implementation",
]
