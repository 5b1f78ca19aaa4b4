"""The matrix products of each pass, and the estimated cost of the input gradient's ways."""

import dataclasses
import math

from pallas_kernels.block_sparse_conv.plan import plan_sizes
from pallas_kernels.block_sparse_conv.spec import ConvSpec
from pallas_kernels.block_sparse_conv.triton.fitting import itemsize
from pallas_kernels.block_sparse_conv.triton.normal_form import normal
from pallas_kernels.devices import this_device

METHODS = ("transposed", "scatter", "dense")
"""The ways of the input gradient: from the plan's table, by adding each group's
share to float32 sums in memory, and XLA's dense convolution."""
REACHED = {"transposed": 0.6, "scatter": 0.6, "dense": 0.75}
"""The share of the device's rates that each way reaches; estimated."""


@dataclasses.dataclass(frozen=True)
class Product:
    """The matrix products of a pass: for each group `members x depth` times `depth x positions`.

    Attributes:
      groups: how many products there are.
      members: rows of each result.
      depth: length of the contraction (from a table: expected, where each group keeps random runs
        of channels, and a program works on one phase of the strides).
      positions: columns of each result.
    """

    groups: int
    members: int
    depth: int
    positions: int


def product(spec: ConvSpec, pass_name: str, method: str = "") -> Product:
    """The products of a pass.

    Args:
      spec: a normal spec (see `normal_form`).
      pass_name: one of `PASSES`.
      method: of the input gradient.

    Returns:
      Their sizes.
    """
    if pass_name != "input_gradient":
        depth = spec.kept * spec.kept_taps
        return Product(spec.groups, spec.group_size, depth, math.prod(spec.out_shape[1:]))
    depth_of_group = spec.kept_taps * spec.group_size
    positions = math.prod(spec.in_shape[1:])
    if method == "scatter":
        return Product(spec.groups, spec.kept, depth_of_group, positions)
    sizes = plan_sizes(spec.kernel_shape, spec.packed_shape, spec.channel_block)
    is_kept = 1 - (1 - spec.kept / spec.cin) ** (sizes.block // sizes.run)
    depth_of_group = spec.kept_taps * sizes.parts * sizes.depth
    phases = min(4, math.prod(spec.kernel)) if spec.strides == (2, 2) else 1
    depth = round(spec.groups * is_kept * depth_of_group / phases)
    return Product(sizes.blocks, sizes.block, max(1, depth), positions)


def tile_rows(members: int, arithmetic: str) -> int:
    """The rows of a tile with the least padding.

    Half as many rows would gather the rows of the activations once more.

    TF32 stays below 64 rows, where wgmma would begin: wgmma takes float32 operands only transposed,
    and its rows would be copied 4 bytes at a time.

    Args:
      members: rows of the result.
      arithmetic: "half", "tf32" or "ieee".

    Returns:
      16, 32, 64 or 128.
    """
    most = {"half": 128, "ieee": 64, "tf32": 32}[arithmetic]
    allowed = [rows for rows in (16, 32, 64, 128) if rows <= most]
    return min(allowed, key=lambda rows: -(-members // rows) * (rows + 32))


def cost(spec: ConvSpec, method: str) -> float:
    """An estimate of the input gradient's time, from the device's rates.

    A scatter adds float32 sums into memory, writes zeros under them and casts the result. cuDNN's
    dense convolution transposes both activations.

    Args:
      spec: the static sizes.
      method: one of `METHODS`.

    Returns:
      Seconds.

    Example:
      >>> spec = ConvSpec(cin=64, height=8, width=8, batch=128, kernel=(3, 3), cout=64, groups=2,
      ...                 kept=64, kept_taps=9, group_size=32, dtype="bfloat16")
      >>> cost(spec, "dense") < cost(spec, "scatter")
      True
    """
    spec, device = normal(spec), this_device()
    size, flops = itemsize(spec), device.flops(spec.precision)
    activations = math.prod(spec.in_shape) + math.prod(spec.out_shape)
    memory = size * activations / device.memory
    if method == "dense":
        operations = 2 * math.prod(spec.kernel) * spec.cin * math.prod(spec.out_shape)
        return max(operations / flops, memory) / REACHED[method] + 2 * memory
    p = product(spec, "input_gradient", method)
    rows = tile_rows(p.members, spec.precision)
    tiles = p.groups * -(-p.members // rows)
    gather = size * tiles * p.depth * p.positions / device.gather
    multiply = 2 * tiles * rows * p.depth * p.positions / flops
    seconds = max(multiply, gather, memory) / REACHED[method]
    if method == "scatter":
        sums = 4 * p.groups * p.members * p.positions / device.add
        seconds += sums + 8 * math.prod(spec.in_shape) / device.memory
    return seconds
