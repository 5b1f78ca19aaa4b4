"""The two Mosaic GPU kernels for Hopper.

`gather_product` is the forward pass and the input gradient, `gather_outer` the weight gradient.
Both read rows of an activation matrix `[channels, pixels * images]` by a list; `pipeline.py` says
how. Importing this module takes a JAX that has Pallas on Mosaic GPU.
"""

from pallas_kernels.block_sparse_conv.mosaic_gpu.gather_outer import gather_outer
from pallas_kernels.block_sparse_conv.mosaic_gpu.gather_product import gather_product

__all__ = ["gather_outer", "gather_product"]
