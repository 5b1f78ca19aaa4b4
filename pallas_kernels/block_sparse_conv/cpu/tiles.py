"""Whether the native CPU kernels are faster than XLA, by the measured times.

The native kernels pick their own tiles, in C++.
"""

import functools
import math

from pallas_kernels.block_sparse_conv import cpu_times
from pallas_kernels.block_sparse_conv.spec import ConvSpec


@functools.lru_cache(maxsize=4096)
def native_gain(spec: ConvSpec) -> float:
    """How many times as fast as XLA's best formulation the native kernels are.

    In the forward pass, or, where the spec's gradients follow, in all three passes together. The
    table was measured with 512-bit vectors in float32, on both sides. The same ratio is taken for
    CPUs whose vectors are shorter, which slows both sides down, and for bfloat16, which XLA widens
    to float32.

    Args:
      spec: the static sizes, and whether the gradients follow.

    Returns:
      The geometric mean of `XLA's time / native time`, weighted by `cpu_times.weights`; 1 where
      nothing was measured.

    Example:
      >>> spec = ConvSpec(cin=8, height=5, width=5, batch=2, kernel=(3, 3), cout=8, groups=2,
      ...                 kept=4, kept_taps=3, group_size=4)
      >>> native_gain(spec) > 0
      True
    """
    mode = cpu_times.mode(spec)
    logs = 0.0
    total_weight = 0.0
    entries = cpu_times.read()["entries"]
    for entry, weight in zip(entries, cpu_times.weights(spec), strict=True):
        milliseconds = entry["milliseconds"][mode]
        if cpu_times.NATIVE in milliseconds:
            best = min(cpu_times.formulations(milliseconds).values())
            logs += weight * math.log(best / milliseconds[cpu_times.NATIVE])
            total_weight += weight
    return math.exp(logs / total_weight) if total_weight else 1.0
