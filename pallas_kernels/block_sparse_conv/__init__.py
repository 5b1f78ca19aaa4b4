"""The block-sparse convolution in (C, H, W, N): one function, several implementations."""

from pallas_kernels.block_sparse_conv.api import block_sparse_conv
from pallas_kernels.block_sparse_conv.choice import (
    IMPLEMENTATIONS,
    Choice,
    available_implementations,
    choose_implementation,
    fuses_norms,
    reads_plans,
    why_dense,
)
from pallas_kernels.block_sparse_conv.epilogue import apply_epilogue, check_epilogue
from pallas_kernels.block_sparse_conv.index import Index
from pallas_kernels.block_sparse_conv.norm_act_conv import norm_act_conv, norm_implementation
from pallas_kernels.block_sparse_conv.plan import Plan, make_plan, why_no_plan
from pallas_kernels.block_sparse_conv.spec import (
    NORM_PASSES,
    PASSES,
    ConvSpec,
    Implementation,
)
from pallas_kernels.block_sparse_conv.whole_kernel import (
    runs_whole_kernels,
    whole_kernel_conv,
    whole_kernel_implementation,
)

__all__ = [
    "IMPLEMENTATIONS",
    "NORM_PASSES",
    "PASSES",
    "Choice",
    "ConvSpec",
    "Implementation",
    "Index",
    "Plan",
    "apply_epilogue",
    "available_implementations",
    "block_sparse_conv",
    "check_epilogue",
    "choose_implementation",
    "fuses_norms",
    "make_plan",
    "norm_act_conv",
    "norm_implementation",
    "reads_plans",
    "runs_whole_kernels",
    "whole_kernel_conv",
    "whole_kernel_implementation",
    "why_dense",
    "why_no_plan",
]
