"""blocksparse_jax: sparse training of CNNs whose sparsity is real.

    scores -> masks -> layout -> grouping -> optax transform -> op -> Flax layer -> experiment

Data runs left to right and so do imports. Masks and layouts live in the optax state; a layer takes
`(kernel, layout)`.
"""

from blocksparse_jax import linen, metrics, nnx
from blocksparse_jax.conv import (
    available_implementations,
    choose_implementation,
    conv,
    dense_kernel_gradient,
)
from blocksparse_jax.grouping.channel_spaces import channel_orders, fold_channel_orders
from blocksparse_jax.grouping.column_blocks import ColumnBlocks, block_fill, dsb_groups, rumi_groups
from blocksparse_jax.grouping.search import hrbp_groups, kept_score, random_groups
from blocksparse_jax.layout import (
    BlockLayout,
    ConsecutiveGroups,
    Dense,
    is_layout,
    layout_to_mask,
    mask_to_layout,
    validate,
)
from blocksparse_jax.masks import apply_masks
from blocksparse_jax.metrics import sad, summarize
from blocksparse_jax.packing import pack, pack_tree, unpack, unpack_tree
from blocksparse_jax.schedules import periodic
from blocksparse_jax.state import SparseState, get_layouts, get_masks, masked
from blocksparse_jax.transforms.gradual import gradual_magnitude
from blocksparse_jax.transforms.hrbp import hrbp_prune
from blocksparse_jax.transforms.keep_zeros import keep_zeros
from blocksparse_jax.transforms.rigl import rigl
from blocksparse_jax.transforms.static import fixed_masks, random_channel_layouts, random_masks
from blocksparse_jax.transforms.straight_through import sr_ste, ste
from blocksparse_jax.transforms.subp import subp

__version__ = "0.1.0"

__all__ = [
    "BlockLayout",
    "ColumnBlocks",
    "ConsecutiveGroups",
    "Dense",
    "SparseState",
    "apply_masks",
    "available_implementations",
    "block_fill",
    "channel_orders",
    "choose_implementation",
    "conv",
    "dense_kernel_gradient",
    "dsb_groups",
    "fixed_masks",
    "fold_channel_orders",
    "get_layouts",
    "get_masks",
    "gradual_magnitude",
    "hrbp_groups",
    "hrbp_prune",
    "is_layout",
    "keep_zeros",
    "kept_score",
    "layout_to_mask",
    "linen",
    "mask_to_layout",
    "masked",
    "metrics",
    "nnx",
    "pack",
    "pack_tree",
    "periodic",
    "random_channel_layouts",
    "random_groups",
    "random_masks",
    "rigl",
    "rumi_groups",
    "sad",
    "sr_ste",
    "ste",
    "subp",
    "summarize",
    "unpack",
    "unpack_tree",
    "validate",
]
