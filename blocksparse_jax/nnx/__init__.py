"""Flax nnx: block-sparse layers, what gives them their layouts, and an optimizer.

And batch norm as one operation with what follows it.
"""

from blocksparse_jax.nnx.batch_norm import BatchNormAct
from blocksparse_jax.nnx.conv import BlockSparseConv
from blocksparse_jax.nnx.layouts import Layouts
from blocksparse_jax.nnx.linear import BlockSparseLinear
from blocksparse_jax.nnx.model import executions, set_layouts, sparsify
from blocksparse_jax.nnx.optimizer import Optimizer
from blocksparse_jax.nnx.variational import VariationalConv, VariationalDense

__all__ = [
    "BatchNormAct",
    "BlockSparseConv",
    "BlockSparseLinear",
    "Layouts",
    "Optimizer",
    "VariationalConv",
    "VariationalDense",
    "executions",
    "set_layouts",
    "sparsify",
]
