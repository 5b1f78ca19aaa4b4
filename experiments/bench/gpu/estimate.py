"""How long a kernel takes at least, by which the timed loops are sized."""

from pallas_kernels.block_sparse_conv import ConvSpec
from pallas_kernels.devices import this_device

LAUNCH_MS = 2e-3  # the least time of a launch


def least_milliseconds(spec: ConvSpec) -> float:
    """Returns the least time that a pass can take in 16 bits.

    Dense or sparse, the activations are read and written once.

    Args:
      spec: the static sizes.

    Returns:
      Milliseconds.
    """
    device = this_device()
    itemsize = 4 if spec.dtype == "float32" else 2
    values = sum(a * b * c * d for a, b, c, d in (spec.in_shape, spec.out_shape))
    taps = spec.kernel[0] * spec.kernel[1]
    positions = spec.out_height * spec.out_width * spec.batch
    flops = 2 * spec.density * taps * spec.cin * spec.cout * positions
    return max(1e3 * itemsize * values / device.memory, 1e3 * flops / device.half, LAUNCH_MS)
