"""What an H200 does at most, to estimate how long a kernel takes at least."""

from pallas_kernels.block_sparse_conv import ConvSpec

BANDWIDTH = 4.3e12  # bytes/s, copies
DENSE_RATE = 790e12  # FLOP/s, dense bfloat16
SPARSE_RATE = 2 * DENSE_RATE  # FLOP/s of the dense product, half of whose operations are left out
L2 = 60 << 20  # bytes
LAUNCH_MS = 2e-3  # the least time of a launch


def least_milliseconds(spec: ConvSpec) -> float:
    """Returns the least time that a pass can take, by which the timed loops are sized.

    Dense or sparse, the activations are read and written once.

    Args:
      spec: the static sizes.

    Returns:
      Milliseconds.
    """
    itemsize = 4 if spec.dtype == "float32" else 2
    values = sum(a * b * c * d for a, b, c, d in (spec.in_shape, spec.out_shape))
    taps = spec.kernel[0] * spec.kernel[1]
    positions = spec.out_height * spec.out_width * spec.batch
    flops = 2 * spec.density * taps * spec.cin * spec.cout * positions
    return max(1e3 * itemsize * values / BANDWIDTH, 1e3 * flops / DENSE_RATE, LAUNCH_MS)
