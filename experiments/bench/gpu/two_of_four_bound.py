"""`python -m experiments.bench.gpu.two_of_four_bound`: what 2:4 weights could gain at most on an
H200. Computed from rates, NOT measured.

For all products of ResNet-50 with weights that 2:4 can prune (its 1x1 convolutions and the dense
layer), the least time that memory and tensor cores allow: each operand read once and the result
written once at the device's copy rate, or the multiplications at its rate for dense bfloat16, twice
that for 2:4 operands, whichever is longer. No launches, no tiles that do not fill the device, no
cache.
"""

import argparse
import dataclasses

BANDWIDTH = 4.3e12  # bytes/s, copies on an H200
DENSE_RATE = 790e12  # FLOP/s, dense bfloat16 on an H200
SPARSE_RATE = (
    2 * DENSE_RATE
)  # what sparse tensor cores promise: half of the multiplications are left out
STAGES = (
    (64, 3, 56),
    (128, 4, 28),
    (256, 6, 14),
    (512, 3, 7),
)  # width, blocks, pixels on a side behind the stride


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
        """Bytes of the 2:4 weights: half of the values, and two bits that say where each stood."""
        return self.weights // 2 + self.k * self.m // 8

    @property
    def flops(self) -> int:
        """Of the dense product."""
        return 2 * self.k * self.m * self.n


def products(batch: int = 256) -> list[Product]:
    """The 1x1 convolutions of ResNet-50 (v1: the stride sits in the first 1x1 of a stage) and its
    dense layer.

    Args:
      batch: images.

    Returns:
      Products, each size once.

    Example:
      >>> sum(product.count for product in products())
      37

    Reference: He et al., "Deep residual learning for image recognition", CVPR 2016, table 1.
    """
    counts: dict[tuple[int, int, int, int], int] = {}
    channels = 64
    for stage, (width, blocks, size) in enumerate(STAGES):
        stride = 2 if stage else 1
        pairs = [
            (channels, width, stride),
            (channels, 4 * width, stride),
            (width, 4 * width, 1),
        ]  # the first block and its shortcut
        pairs += [(4 * width, width, 1), (width, 4 * width, 1)] * (blocks - 1)
        for k, m, step in pairs:
            counts[k, m, size, step] = counts.get((k, m, size, step), 0) + 1
        channels = 4 * width
    convs = [
        Product(f"1x1 {k}-{m}@{size * step}" + "/2" * (step == 2), k, m, size * size * batch, count)
        for (k, m, size, step), count in counts.items()
    ]
    return [*convs, Product("dense 2048-1000", 2048, 1000, batch)]


def floor(flops: float, nbytes: float, rate: float = DENSE_RATE) -> float:
    """The least time of a kernel.

    Args:
      flops: of it.
      nbytes: that it reads and writes.
      rate: FLOP/s.

    Returns:
      Microseconds.

    Example:
      >>> round(floor(790e6, 4.3e3), 3)
      1.0

    Reference: Williams et al., "Roofline", CACM 2009.
    """
    return 1e6 * max(flops / rate, nbytes / BANDWIDTH)


def floors(product: Product) -> dict[str, float]:
    """The floors of one product and of what belongs to it in a training step.

    Args:
      product: the sizes.

    Returns:
      Microseconds: "dense", "2:4" (compressed before), "2:4 + compress" (in a pass of its own
      before each product, as weights change at every step), "gradients" (both, dense: see
      `two_of_four_matmul`), and "memory", that of the dense product's traffic alone.

    Example:
      >>> sizes = floors(Product("a", 4096, 4096, 4096))
      >>> round(sizes["dense"] / sizes["2:4"], 2)
      2.0
    """
    dense_bytes = product.activations + product.weights
    packed = floor(product.flops, product.activations + product.compressed, SPARSE_RATE)
    return {
        "dense": floor(product.flops, dense_bytes),
        "2:4": packed,
        "2:4 + compress": packed + floor(0, product.weights + product.compressed),
        "gradients": 2 * floor(product.flops, dense_bytes),
        "memory": floor(0, dense_bytes),
    }


def report(batch: int = 256) -> str:
    """The table and its totals.

    Args:
      batch: images.

    Returns:
      Markdown.

    Example:
      >>> report().splitlines()[0].startswith("COMPUTED")
      True
    """
    lines = [
        f"COMPUTED floors, not measurements: ResNet-50, batch {batch}, bfloat16, "
        f"{BANDWIDTH / 1e12:g} TB/s, {DENSE_RATE / 1e12:g} TFLOP/s "
        f"dense and {SPARSE_RATE / 1e12:g} for 2:4; microseconds of one forward product.",
        "",
        "| product | count | dense | bound by | 2:4 | gain | 2:4 + compress | gain |",
        "|---|---|---|---|---|---|---|---|",
    ]
    total = dict.fromkeys(floors(products(batch)[0]), 0.0)
    for product in products(batch):
        own = floors(product)
        total = {name: time + product.count * own[name] for name, time in total.items()}
        bound = "memory" if own["memory"] == own["dense"] else "tensor cores"
        lines.append(
            f"| {product.name} | {product.count} | {own['dense']:.1f} | {bound} | "
            f"{_gains(own, own['dense'])}"
        )
    step = {name: total[name] + total["gradients"] for name in ("dense", "2:4", "2:4 + compress")}
    lines.append(
        f"| all, forward | {sum(p.count for p in products(batch))} | {total['dense']:.0f} | | "
        f"{_gains(total, total['dense'])}"
    )
    lines.append(
        f"| all, with both gradients | | {step['dense']:.0f} | | {_gains(step, step['dense'])}"
    )
    both = {
        name: time + total[name] - total["dense"] for name, time in step.items()
    }  # the input's gradient moves the same bytes
    lines.append(
        f"| the same, if the pattern held along both axes | | {step['dense']:.0f} | | "
        f"{_gains(both, step['dense'])}"
    )
    return "\n".join(lines)


def _gains(times: dict[str, float], dense: float) -> str:
    return (
        " | ".join(
            f"{times[name]:.1f} | {dense / times[name]:.2f}x" for name in ("2:4", "2:4 + compress")
        )
        + " |"
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        prog="python -m experiments.bench.gpu.two_of_four_bound",
        description="Floors of 2:4 products; computed.",
    )
    parser.add_argument("--batch", type=int, default=256, help="images")
    print(report(parser.parse_args().batch))
