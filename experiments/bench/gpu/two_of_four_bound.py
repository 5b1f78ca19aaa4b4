"""Computes what 2:4 weights could gain at most on an H200. Computed from rates, NOT measured.

`python -m experiments.bench.gpu.two_of_four_bound` covers all products of ResNet-50 with weights
that 2:4 can prune (its 1x1 convolutions and the dense layer). It gives the least time that memory
and tensor cores allow: each operand read once and the result written once at the device's copy
rate, or the multiplications at its rate for dense bfloat16, twice that for 2:4 operands, whichever
takes longer. It leaves out launches, tiles that do not fill the device, and the cache.
"""

import argparse
import dataclasses

from experiments.reporting import markdown
from pallas_kernels.devices import H200

BANDWIDTH = H200.memory  # bytes/s
DENSE_RATE = H200.half  # FLOP/s
SPARSE_RATE = 2 * DENSE_RATE  # FLOP/s of the dense product, half of whose operations are left out

# Of ResNet-50: width, blocks, and pixels of a side after the stride.
STAGES = ((64, 3, 56), (128, 4, 28), (256, 6, 14), (512, 3, 7))
DENSE, TWO_OF_FOUR, WITH_COMPRESSION = "dense", "2:4", "2:4 + compress"


@dataclasses.dataclass(frozen=True)
class Product:
    """Products of equal sizes: `[m, k]` weights times `[k, n]` activations.

    Attributes:
      name: what they are.
      k: inputs.
      m: outputs.
      n: columns: output pixels times images.
      count: how many a network has.
    """

    name: str
    k: int
    m: int
    n: int
    count: int = 1

    @property
    def activations(self) -> int:
        """Bytes of x and y in 16 bits."""
        return 2 * self.n * (self.k + self.m)

    @property
    def weights(self) -> int:
        """Bytes of the dense weights in 16 bits."""
        return 2 * self.k * self.m

    @property
    def compressed(self) -> int:
        """Bytes of the 2:4 weights: half of the values, and two bits for the place of each."""
        return self.weights // 2 + self.k * self.m // 8

    @property
    def flops(self) -> int:
        """Of the dense product."""
        return 2 * self.k * self.m * self.n


def products(batch: int = 256) -> list[Product]:
    """Returns the 1x1 convolutions of ResNet-50 and its dense layer, each size once.

    In v1 the stride sits in the first 1x1 convolution of a stage.

    Args:
      batch: images.

    Returns:
      Products.

    Example:
      >>> sum(product.count for product in products())
      37

    Reference: He et al., "Deep residual learning for image recognition", CVPR 2016, table 1.
    """
    counts: dict[tuple[int, int, int, int], int] = {}
    channels = 64
    for stage, (width, blocks, size) in enumerate(STAGES):
        stride = 2 if stage else 1
        wide = 4 * width
        first_block = [(channels, width, stride), (channels, wide, stride), (width, wide, 1)]
        other_blocks = [(wide, width, 1), (width, wide, 1)] * (blocks - 1)
        for k, m, step in first_block + other_blocks:
            counts[k, m, size, step] = counts.get((k, m, size, step), 0) + 1
        channels = wide
    convs = []
    for (k, m, size, step), count in counts.items():
        name = f"1x1 {k}-{m}@{size * step}" + ("/2" if step == 2 else "")
        convs.append(Product(name, k, m, size * size * batch, count))
    return [*convs, Product("dense 2048-1000", 2048, 1000, batch)]


def floor(flops: float, nbytes: float, rate: float = DENSE_RATE) -> float:
    """Returns the least time of a kernel in microseconds.

    Args:
      flops: of it.
      nbytes: that it reads and writes.
      rate: FLOP/s.

    Example:
      >>> round(floor(790e6, 4.3e3), 3)
      1.0

    Reference: Williams et al., "Roofline", CACM 2009.
    """
    return 1e6 * max(flops / rate, nbytes / BANDWIDTH)


def floors(product: Product) -> dict[str, float]:
    """Returns the least times of one product and of what belongs to it in a training step.

    Args:
      product: the sizes.

    Returns:
      Microseconds: "dense"; "2:4" with compressed weights; "2:4 + compress" with a pass of its own
      before each product, as weights change at every step; "gradients", both of them, dense (see
      `two_of_four_matmul`); and "memory", the traffic of the dense product alone.

    Example:
      >>> sizes = floors(Product("a", 4096, 4096, 4096))
      >>> round(sizes["dense"] / sizes["2:4"], 2)
      2.0
    """
    dense_bytes = product.activations + product.weights
    dense = floor(product.flops, dense_bytes)
    sparse = floor(product.flops, product.activations + product.compressed, SPARSE_RATE)
    return {
        DENSE: dense,
        TWO_OF_FOUR: sparse,
        WITH_COMPRESSION: sparse + floor(0, product.weights + product.compressed),
        "gradients": 2 * dense,
        "memory": floor(0, dense_bytes),
    }


def report(batch: int = 256) -> str:
    """Returns the table and its totals as Markdown.

    Args:
      batch: images.

    Example:
      >>> report().splitlines()[0].startswith("COMPUTED")
      True
    """
    rows = []
    every = products(batch)
    total = dict.fromkeys(floors(every[0]), 0.0)
    for product in every:
        us = floors(product)
        for name, time in us.items():
            total[name] += product.count * time
        bound_by = "memory" if us["memory"] == us[DENSE] else "tensor cores"
        rows.append(_cells(product.name, str(product.count), bound_by, us, us[DENSE]))
    times = (DENSE, TWO_OF_FOUR, WITH_COMPRESSION)
    count = str(sum(product.count for product in every))
    step = {name: total[name] + total["gradients"] for name in times}
    # The input gradient moves the same bytes, so that it would gain as much as the forward pass.
    both_axes = {name: step[name] + total[name] - total[DENSE] for name in times}
    rows.append(_cells("all, forward", count, "", total, total[DENSE], digits=0))
    rows.append(_cells("all, with both gradients", "", "", step, step[DENSE], digits=0))
    title = "the same, if the pattern held along both axes"
    rows.append(_cells(title, "", "", both_axes, step[DENSE], digits=0))
    columns = ["product", "count", "dense", "bound by", "2:4", "gain", "2:4 + compress", "gain"]
    return (
        f"COMPUTED floors, not measurements: ResNet-50, batch {batch}, bfloat16, "
        f"{BANDWIDTH / 1e12:g} TB/s, {DENSE_RATE / 1e12:g} TFLOP/s "
        f"dense and {SPARSE_RATE / 1e12:g} for 2:4; microseconds of one forward product.\n\n"
        + markdown.table(columns, rows, text_columns=len(columns))
    )


def _cells(
    name: str, count: str, bound_by: str, us: dict[str, float], dense: float, digits: int = 1
) -> list[str]:
    cells = [name, count, f"{dense:.{digits}f}", bound_by]
    for form in (TWO_OF_FOUR, WITH_COMPRESSION):
        cells += [f"{us[form]:.1f}", f"{dense / us[form]:.2f}x"]
    return cells


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        prog="python -m experiments.bench.gpu.two_of_four_bound",
        description="Computes the least times of 2:4 products.",
    )
    parser.add_argument("--batch", type=int, default=256, help="images")
    print(report(parser.parse_args().batch))
