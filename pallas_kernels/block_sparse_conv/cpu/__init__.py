"""The convolution in native C++ kernels for CPUs.

The import registers them: a process that loads an exported program may call nothing else here.
"""

from pallas_kernels.block_sparse_conv.cpu import kernels
from pallas_kernels.block_sparse_conv.cpu.launch import IMPLEMENTATION, instructions, unavailable

__all__ = ["IMPLEMENTATION", "instructions", "unavailable"]

kernels.library()
