"""The tables of SUBP."""

import dataclasses

from experiments.sweeps.settings import SUBP, VGG19
from experiments.sweeps.table import Cell, SweepTable, Tables
from experiments.training.methods import Subp

SOURCE = "Xiang et al., NeurIPS 2023, and its code"


def choices() -> SweepTable:
    """SUBP's own choices, at 90% on VGG-19."""
    changes = {"SUBP 1x16": Subp(), "SUBP 1x32": Subp(block=32), "hard": Subp(soft=False)}
    changes |= {criterion: Subp(criterion=criterion) for criterion in ("l2", "bpar")}
    changes |= {curve: Subp(curve=curve) for curve in ("linear", "cos", "exp")}
    cells = [Cell("dense", VGG19.config("dense"))]
    cells += [Cell(row, VGG19.config("subp", 0.9, options)) for row, options in changes.items()]
    note = (
        "VGG-19 on CIFAR-10 is ours: the paper trains on ImageNet (imagenet-subp). Rows change one "
        "thing of SUBP 1x16: soft, L1 scores, cubic curve."
    )
    return SweepTable("What SUBP's choices cost", SOURCE, tuple(cells), note)


def imagenet() -> SweepTable:
    """The networks of the paper on ImageNet."""
    mobilenet = dataclasses.replace(SUBP, model="mobilenet_v1", batch_size=512)
    networks = (  # setting, sparsity, top-1 of 1x16 and 1x32
        (SUBP, 60 / 128, (69.9, 69.7)),
        (dataclasses.replace(SUBP, model="resnet34"), 59 / 128, (74.1, 73.9)),
        (dataclasses.replace(SUBP, model="resnet50"), 66 / 128, (77.6, 77.4)),
        (dataclasses.replace(SUBP, model="resnet50"), 98.5 / 128, (76.3, 76.0)),
        (mobilenet, 69 / 128, (71.5, 71.1)),
    )
    cells = [
        Cell(f"SUBP 1x{block}", setting.config("subp", sparsity, Subp(block=block)), number)
        for setting, sparsity, numbers in networks
        for block, number in zip((16, 32), numbers, strict=True)
    ]
    note = "Shortcuts are sparse in all networks; the code leaves those of ResNet-18 and 34 dense."
    return SweepTable("SUBP on ImageNet", SOURCE, tuple(cells), note)


TABLES: Tables = {"subp": choices, "imagenet-subp": imagenet}
