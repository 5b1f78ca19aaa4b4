"""Flax linen: block-sparse layers, and any model of `nn.Conv` and `nn.Dense` unchanged.

And batch norm as one operation with what follows it.
"""

from blocksparse_jax.linen.batch_norm import BatchNormAct
from blocksparse_jax.linen.conv import BlockSparseConv
from blocksparse_jax.linen.inputs import capture_inputs
from blocksparse_jax.linen.interceptor import use_layouts
from blocksparse_jax.linen.linear import BlockSparseLinear
from blocksparse_jax.linen.variational import (
    VariationalConv,
    VariationalDense,
    use_variational_dropout,
)

__all__ = [
    "BatchNormAct",
    "BlockSparseConv",
    "BlockSparseLinear",
    "VariationalConv",
    "VariationalDense",
    "capture_inputs",
    "use_layouts",
    "use_variational_dropout",
]
