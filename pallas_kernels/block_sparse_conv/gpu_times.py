"""Which GPU kernel runs a convolution where the caller names none, or cuDNN: what took least time.

A convolution that the GPU's table holds (`tuned_tables`) is judged by its measured times. Any other
is judged by a rule, which depends on the sizes alone:

- A pass of the kernels takes 2.5 us, and as long as its rows and weights take from the L2 cache, or
  its activations from memory.
- A pass of the dense convolution takes 5 us, and as long as its products take at 0.9 of the tensor
  cores' rate, or its activations from memory.

On an H200 the 15 forward kernels of a VGG-19 step at batch 128 took 91 us, and their weight
gradients 93; the rule says 88 and 91. cuDNN's forward pass took 88 us at 256 channels of 14x14
pixels, batch 256, and 19 at 8x8, batch 128; the rule says 88 and 19.
"""

import dataclasses
import math
from collections.abc import Sequence

from pallas_kernels.block_sparse_conv import tuned_tables
from pallas_kernels.block_sparse_conv.cpu_times import UNKNOWN_IMAGES
from pallas_kernels.block_sparse_conv.spec import PASSES, ConvSpec
from pallas_kernels.block_sparse_conv.triton.fitting import itemsize
from pallas_kernels.block_sparse_conv.triton.normal_form import computed_spec, normal
from pallas_kernels.block_sparse_conv.triton.products import product, tile_rows
from pallas_kernels.block_sparse_conv.triton.traffic import KERNEL_MS
from pallas_kernels.devices import this_device, this_gpu

DENSE_MS = 5e-3
"""What a pass of the dense convolution takes beside its work."""
TENSOR_CORES = 0.9
"""The share of the matrix products' rate that cuDNN's convolutions reach."""
POSITIONS = 128
"""Columns of a usual tile, for each of which the weights are read again."""


def pick(spec: ConvSpec, kernels: Sequence[str]) -> tuple[str, str]:
    """The fastest of the kernels, or "dense".

    Args:
      spec: the static sizes, and whether the gradients follow.
      kernels: the implementations that can run it, in the order in which the rule prefers them.

    Returns:
      The name, and the reason with the times.
    """
    if not spec.has_known_batch:
        spec = dataclasses.replace(spec, batch=UNKNOWN_IMAGES)
    passes = PASSES if spec.gradients else PASSES[:1]
    measured = tuned_tables.layer_times(spec)
    if measured is not None:
        times = {
            name: sum(measured[one][name] for one in passes)
            for name in (*kernels, tuned_tables.DENSE)
            if all(name in measured[one] for one in passes)
        }
        origin = f"measured on this GPU ({this_gpu()})"
    else:
        times = {
            kernels[0]: sum(kernel_ms(spec, one) for one in passes),
            tuned_tables.DENSE: len(passes) * dense_ms(spec),
        }
        origin = "estimated, as this shape is not measured on this GPU"
    best = min(times, key=times.__getitem__)
    listed = ", ".join(f"{name!r} {1e3 * ms:.0f} us" for name, ms in times.items())
    return best, f"{origin}: {listed}"


def kernel_ms(spec: ConvSpec, pass_name: str) -> float:
    """What a pass of the GPU kernels takes by the rule.

    Args:
      spec: the static sizes.
      pass_name: one of `PASSES`.

    Returns:
      Milliseconds.
    """
    spec, device = normal(computed_spec(spec, pass_name)), this_device()
    p = product(spec, pass_name, "transposed")
    tiles = -(-p.members // tile_rows(p.members, spec.precision))
    if pass_name == "weight_gradient":
        gathered = p.groups * (p.depth * tiles + p.members * -(-p.depth // POSITIONS)) * p.positions
    else:
        columns = p.positions + p.members * -(-p.positions // POSITIONS)
        gathered = p.groups * tiles * p.depth * columns
    seconds = max(itemsize(spec) * gathered / device.gather, _memory_seconds(spec))
    return KERNEL_MS + 1e3 * seconds


def dense_ms(spec: ConvSpec) -> float:
    """What a pass of the dense convolution takes by the rule.

    Args:
      spec: the static sizes.

    Returns:
      Milliseconds.
    """
    flops = 2 * math.prod(spec.kernel) * spec.cin * math.prod(spec.out_shape)
    rate = TENSOR_CORES * this_device().flops(normal(spec).precision)
    return DENSE_MS + 1e3 * max(flops / rate, _memory_seconds(spec))


def _memory_seconds(spec: ConvSpec) -> float:
    """How long the activations take from memory and to it."""
    values = math.prod(spec.in_shape) + math.prod(spec.out_shape)
    return itemsize(spec) * values / this_device().memory
