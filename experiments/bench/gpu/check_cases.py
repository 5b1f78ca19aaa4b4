"""What is checked before anything is timed: small odd shapes, real layers, fused epilogues."""

import dataclasses
from collections.abc import Iterator

from experiments.bench.gpu import shapes
from experiments.bench.gpu.float64 import KINDS
from experiments.bench.gpu.implementations import FRUGAL, WIDE
from pallas_kernels.block_sparse_conv import ConvSpec

BASE = ConvSpec(
    cin=64,
    height=7,
    width=6,
    batch=72,
    kernel=(3, 3),
    cout=128,
    groups=2,
    kept=24,
    kept_taps=3,
    group_size=64,
    padding=((1, 1), (1, 1)),
    channel_block=8,
)
_ONE_BY_ONE = dataclasses.replace(BASE, kernel=(1, 1), kept_taps=1, padding=((0, 0), (0, 0)))
SMALL = {
    "3x3 same": BASE,
    "3x3 stride 2": dataclasses.replace(BASE, strides=(2, 2), padding=((0, 1), (0, 1))),
    "3x3 valid, 40 images": dataclasses.replace(BASE, batch=40, padding=((0, 0), (0, 0))),
    "1x1": _ONE_BY_ONE,
    "1x1 stride 2": dataclasses.replace(_ONE_BY_ONE, strides=(2, 2)),
    "groups of 8": dataclasses.replace(BASE, groups=16, group_size=8),
    "groups of 32": dataclasses.replace(BASE, groups=4, group_size=32, kept=40, kept_taps=5),
    "one group of 128, all kept": dataclasses.replace(
        BASE, groups=1, group_size=128, kept=64, kept_taps=9
    ),
    "single channels": dataclasses.replace(BASE, channel_block=1, kept=19),
    "37 images": dataclasses.replace(BASE, batch=37),
    "runs of 32": dataclasses.replace(BASE, channel_block=32, kept=32),
    "dilation 2, padding 5": dataclasses.replace(BASE, dilation=(2, 2), padding=((5, 4), (5, 6))),
}
ALL_PARTS = ("scale", "bias", "residual")
EPILOGUES = (  # shape, parts, whether a ReLU follows
    ("3x3 same", ALL_PARTS, True),
    ("groups of 32", ALL_PARTS, True),
    ("1x1", ("residual",), False),
)
# Of the Triton kernels: each method of the input gradient, 64-bit offsets, which only huge arrays
# need, and the tiles that load least, which there are in 16 bits.
VARIANTS = (
    *(
        (shape, method)
        for shape in ("3x3 same", "3x3 stride 2", "groups of 32", "runs of 32")
        for method in ("transposed", "scatter")
    ),
    ("1x1 stride 2", "scatter"),
    ("single channels", "scatter"),
    ("3x3 stride 2", WIDE),
    ("1x1", WIDE),
)
FRUGAL_SHAPES = ("3x3 same", "3x3 stride 2", "37 images", "groups of 8", "1x1")
REAL = (
    "resnet50 256@14",
    "resnet50 1x1 256-1024@14",
    "resnet50 1x1 512-256@28/2",
    "vgg19 512@4 n128",
    "resnet32x2 32-64@32/2 n128",
)


@dataclasses.dataclass(frozen=True)
class CheckCase:
    """One check: all passes of a convolution.

    Attributes:
      name: of the shape, and what is special about the case.
      spec: static sizes.
      kind: of `KINDS`.
      epilogue: of scale, bias, residual; `spec.relu` says whether a ReLU follows.
      variant: of the Triton kernels: a method of the input gradient, `WIDE` or `FRUGAL`; "": as
        they are.
      seconds: after which it hangs.
    """

    name: str
    spec: ConvSpec
    kind: str
    epilogue: tuple[str, ...] = ()
    variant: str = ""
    seconds: float = 40


def check_cases(quick: bool, name: str) -> Iterator[CheckCase]:
    """Yields what is checked of an implementation, small shapes first.

    Args:
      quick: few small shapes.
      name: of the implementation.

    Yields:
      Cases.
    """
    small = {"3x3 same": dataclasses.replace(BASE, height=4, width=3, batch=3)} if quick else SMALL
    cases = [CheckCase(shape, spec, kind) for shape, spec in small.items() for kind in KINDS]
    for shape, parts, relu in EPILOGUES:
        if shape in small:
            spec = dataclasses.replace(small[shape], relu=relu)
            title = f"{shape} + {' '.join(parts)}"
            cases += [CheckCase(title, spec, kind, parts) for kind in KINDS]
    if name == "triton" and not quick:
        cases += [
            CheckCase(f"{shape} {variant}", SMALL[shape], kind, (), variant)
            for shape, variant in VARIANTS
            for kind in ("bf16", "tf32", "fp32")
        ]
        cases += [
            CheckCase(f"{shape} {FRUGAL}", SMALL[shape], "bf16", (), FRUGAL)
            for shape in FRUGAL_SHAPES
        ]
    for layer in () if quick else REAL:
        spec = shapes.case_spec(shapes.cases(layer)[0], sparsity=0.9)
        cases += [CheckCase(layer, spec, kind, seconds=90) for kind in ("bf16", "tf32")]
    for case in cases:
        dtype, precision = KINDS[case.kind]
        spec = dataclasses.replace(case.spec, dtype=dtype, precision=precision)
        yield dataclasses.replace(case, spec=spec)
