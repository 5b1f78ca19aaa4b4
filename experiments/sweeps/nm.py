"""The tables of N:M sparsity."""

import dataclasses

from experiments.sweeps.settings import SR_STE, VGG19
from experiments.sweeps.table import Cell, SweepTable, Tables
from experiments.training.methods import NOfM, SrSte

SOURCE = "Zhou et al., ICLR 2021, and its code"
_PATTERNS = ((2, 4), (1, 4), (2, 8), (4, 8), (1, 16))


def sad() -> SweepTable:
    """SR-STE beside STE, and its strengths."""
    cells = [Cell("dense", VGG19.config("dense"))]
    for n, m in _PATTERNS:
        cells += [
            Cell(f"SR-STE {n}:{m}", VGG19.config("sr-ste", None, SrSte(n, m))),
            Cell(f"STE {n}:{m}", VGG19.config("ste", None, NOfM(n, m))),
        ]
    cells += [
        Cell(f"SR-STE 2:4, lambda {decay:g}", VGG19.config("sr-ste", None, SrSte(decay=decay)))
        for decay in (2e-5, 6e-5, 6e-4, 1.6e-3)
    ]
    note = (
        "VGG-19 on CIFAR-10 is ours: the paper trains on ImageNet (imagenet-sr-ste). lambda is "
        "2e-4 where the row names none. SAD: mask entries that changed in an epoch, the mean of all"
        " epochs."
    )
    return SweepTable(
        "SR-STE beside STE", SOURCE, tuple(cells), note, columns=("sad",), curves=True
    )


def imagenet() -> SweepTable:
    """ResNet-50 and ResNet-18 on ImageNet."""
    small = dataclasses.replace(SR_STE, model="resnet18")
    rows = (
        (SR_STE, 2, 4, 77.0),
        (SR_STE, 4, 8, 77.4),
        (SR_STE, 1, 4, 75.9),
        (SR_STE, 2, 8, 76.4),
        (small, 2, 4, 71.2),
    )
    cells = [
        Cell(f"SR-STE {n}:{m}", setting.config("sr-ste", None, SrSte(n, m, decay=1.6e-3)), number)
        for setting, n, m, number in rows
    ]
    note = "lambda is 8 x 2e-4: the code sums the gradients of 8 GPUs and does not divide the term."
    return SweepTable("SR-STE on ImageNet", SOURCE, tuple(cells), note, columns=("sad",))


TABLES: Tables = {"nm-sad": sad, "imagenet-sr-ste": imagenet}
