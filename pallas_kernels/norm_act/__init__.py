"""Batch norm, a residual and a ReLU as one operation of training."""

from pallas_kernels.norm_act.api import IMPLEMENTATIONS, norm_act, why_not_native
from pallas_kernels.norm_act.spec import NormSpec, statistics_dtype

__all__ = ["IMPLEMENTATIONS", "NormSpec", "norm_act", "statistics_dtype", "why_not_native"]
