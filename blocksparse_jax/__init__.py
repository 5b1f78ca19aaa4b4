"""blocksparse_jax: sparse training of CNNs whose sparsity is real.

    scores -> patterns -> grouping -> layout -> state, packing -> transforms -> conv -> linen, nnx

Data runs from left to right. Masks and layouts live in the optax state; a layer takes
`(kernel, layout)`.
"""

from blocksparse_jax import linen, metrics, nnx, patterns, transforms
from blocksparse_jax.channel_growth import GrownChannels, dormant_channels, grow_channels
from blocksparse_jax.channel_pruning.inputs import LayerInput
from blocksparse_jax.channel_pruning.l1_filters import l1_filters
from blocksparse_jax.channel_pruning.lasso_channels import lasso_channels
from blocksparse_jax.channel_pruning.pfa import pfa
from blocksparse_jax.channel_pruning.reconstruction import Reconstruction
from blocksparse_jax.channel_pruning.spaces import channel_counts, channel_masks
from blocksparse_jax.channel_pruning.thinet import thinet
from blocksparse_jax.column_masks import dsb_masks, rumi_masks
from blocksparse_jax.compression import (
    Compressed,
    SharedWeights,
    compress,
    decompress,
    share_weights,
)
from blocksparse_jax.conv import (
    available_implementations,
    choose_implementation,
    conv,
    dense_kernel_gradient,
)
from blocksparse_jax.data_scores import grasp, snip, synflow
from blocksparse_jax.export import native_calls
from blocksparse_jax.grouping.channel_choice import (
    channel_maxima,
    channels_above,
    largest_channels,
    used_channels,
)
from blocksparse_jax.grouping.channel_removal import remove_channels
from blocksparse_jax.grouping.channel_spaces import channel_orders, fold_channel_orders
from blocksparse_jax.grouping.column_blocks import ColumnBlocks, block_fill, dsb_groups, rumi_groups
from blocksparse_jax.grouping.hrbp import hrbp_groups, kept_score, random_groups
from blocksparse_jax.layout import BlockLayout, layout_to_mask
from blocksparse_jax.layout_check import validate
from blocksparse_jax.layout_nodes import ConsecutiveGroups, Dense, FilterGroups, is_layout
from blocksparse_jax.layout_of_mask import mask_to_layout
from blocksparse_jax.linear import linear
from blocksparse_jax.lottery import lottery_sparsities, lottery_ticket
from blocksparse_jax.masks import apply_masks, layouts_from_scores, masks_from_scores
from blocksparse_jax.metrics import nonzero_pruned, sad
from blocksparse_jax.norm_act import norm_act
from blocksparse_jax.norm_act_conv import (
    conv_with_sums,
    mean_and_variance,
    norm_act_apply,
    norm_act_conv,
    norm_add_act_conv,
)
from blocksparse_jax.packing import pack, unpack
from blocksparse_jax.pending import PendingActivations, RawOutput, activations
from blocksparse_jax.plans import Plan, with_plans
from blocksparse_jax.pools import max_pool
from blocksparse_jax.schedules import between, every, periodic
from blocksparse_jax.spec import Spec
from blocksparse_jax.state import (
    SparseState,
    get_layouts,
    get_masks,
    get_spec,
    masked,
    replace_masks,
)
from blocksparse_jax.summary import summarize
from blocksparse_jax.transforms.brain_damage import brain_damage
from blocksparse_jax.transforms.campfire import campfire
from blocksparse_jax.transforms.deep_compression import deep_compression
from blocksparse_jax.transforms.deep_r import deep_r
from blocksparse_jax.transforms.drop_and_grow import drop_and_grow
from blocksparse_jax.transforms.dsr import dsr
from blocksparse_jax.transforms.external import external_masks
from blocksparse_jax.transforms.gradual import gradual, gradual_magnitude
from blocksparse_jax.transforms.granet import granet
from blocksparse_jax.transforms.group_lasso import group_lasso
from blocksparse_jax.transforms.hrbp import hrbp_prune
from blocksparse_jax.transforms.keep_zeros import keep_zeros, sparse
from blocksparse_jax.transforms.mest import mest
from blocksparse_jax.transforms.narang import narang
from blocksparse_jax.transforms.nest import nest
from blocksparse_jax.transforms.one_shot import magnitude, one_shot
from blocksparse_jax.transforms.prune_train import prune_train
from blocksparse_jax.transforms.rigl import rigl
from blocksparse_jax.transforms.set import set_
from blocksparse_jax.transforms.shared_weights import set_clusters, shared_weights
from blocksparse_jax.transforms.slimming import norm_scales, slimming
from blocksparse_jax.transforms.snfs import snfs
from blocksparse_jax.transforms.sr_ste import sr_ste, ste
from blocksparse_jax.transforms.srigl import srigl
from blocksparse_jax.transforms.sss import branch_factors, scaling_factors, sss
from blocksparse_jax.transforms.static import fixed_masks, random_channel_layouts, random_masks
from blocksparse_jax.transforms.subp import subp
from blocksparse_jax.transforms.variational_dropout import variational_dropout
from blocksparse_jax.transposes import cancel_transposes
from blocksparse_jax.tree_packing import pack_tree, unpack_tree
from blocksparse_jax.variational import (
    variational_dropout_kl,
    variational_masks,
    with_log_variances,
)

__version__ = "0.1.0"

__all__ = [
    "BlockLayout",
    "ColumnBlocks",
    "Compressed",
    "ConsecutiveGroups",
    "Dense",
    "FilterGroups",
    "GrownChannels",
    "LayerInput",
    "PendingActivations",
    "Plan",
    "RawOutput",
    "Reconstruction",
    "SharedWeights",
    "SparseState",
    "Spec",
    "activations",
    "apply_masks",
    "available_implementations",
    "between",
    "block_fill",
    "brain_damage",
    "branch_factors",
    "campfire",
    "cancel_transposes",
    "channel_counts",
    "channel_masks",
    "channel_maxima",
    "channel_orders",
    "channels_above",
    "choose_implementation",
    "compress",
    "conv",
    "conv_with_sums",
    "decompress",
    "deep_compression",
    "deep_r",
    "dense_kernel_gradient",
    "dormant_channels",
    "drop_and_grow",
    "dsb_groups",
    "dsb_masks",
    "dsr",
    "every",
    "external_masks",
    "fixed_masks",
    "fold_channel_orders",
    "get_layouts",
    "get_masks",
    "get_spec",
    "gradual",
    "gradual_magnitude",
    "granet",
    "grasp",
    "group_lasso",
    "grow_channels",
    "hrbp_groups",
    "hrbp_prune",
    "is_layout",
    "keep_zeros",
    "kept_score",
    "l1_filters",
    "largest_channels",
    "lasso_channels",
    "layout_to_mask",
    "layouts_from_scores",
    "linear",
    "linen",
    "lottery_sparsities",
    "lottery_ticket",
    "magnitude",
    "mask_to_layout",
    "masked",
    "masks_from_scores",
    "max_pool",
    "mean_and_variance",
    "mest",
    "metrics",
    "narang",
    "native_calls",
    "nest",
    "nnx",
    "nonzero_pruned",
    "norm_act",
    "norm_act_apply",
    "norm_act_conv",
    "norm_add_act_conv",
    "norm_scales",
    "one_shot",
    "pack",
    "pack_tree",
    "patterns",
    "periodic",
    "pfa",
    "prune_train",
    "random_channel_layouts",
    "random_groups",
    "random_masks",
    "remove_channels",
    "replace_masks",
    "rigl",
    "rumi_groups",
    "rumi_masks",
    "sad",
    "scaling_factors",
    "set_",
    "set_clusters",
    "share_weights",
    "shared_weights",
    "slimming",
    "snfs",
    "snip",
    "sparse",
    "sr_ste",
    "srigl",
    "sss",
    "ste",
    "subp",
    "summarize",
    "synflow",
    "thinet",
    "transforms",
    "unpack",
    "unpack_tree",
    "used_channels",
    "validate",
    "variational_dropout",
    "variational_dropout_kl",
    "variational_masks",
    "with_log_variances",
    "with_plans",
]
