"""The tables of HRBP."""

import dataclasses
from typing import Any

from experiments.reporting import results
from experiments.sweeps.settings import HRBP_IMAGENET, RESNET32, VGG19, Setting
from experiments.sweeps.table import NAMES, Cell, SweepTable, Tables
from experiments.training.config import TrainConfig
from experiments.training.methods import Grasp, Hrbp, Lottery, Options
from experiments.training.registry import METHODS

SOURCE = "Ma et al., CPAL 2024 (PMLR 234:282-301), CIFAR and ImageNet tables"
SPARSITIES = (0.9, 0.95)
# Method of the registry -> what the paper calls it; in order of what they tell.
STATIC = {
    "hrbp": "HRBP",
    "random": "RU",
    "random-channel": "RC",
    "rumi": "Grouping",
    "subp": "SUBP",
    "snip": "SNIP",
    "grasp": "GraSP",
    "synflow": "SynFlow",
    "dsb": "DSB",
    "lottery": "LTH",
}
DYNAMIC = {
    "hrbp-dynamic": "HRBP dynamic",
    "rigl": "RigL",
    "set": "SET",
    "dsr": "DSR",
    "deep-r": "Deep-R",
    "snfs": "SNFS",
    "granet": "GraNet",
    "srigl": "SRigL",
}
# (network, data set) -> method -> top-1 of the dense network, or at 90 and 95%.
PAPER: dict[tuple[str, str], dict[str, tuple[float, ...]]] = {
    ("resnet32", "cifar10"): {
        "dense": (94.80,),
        "random": (92.81, 91.38),
        "lottery": (92.31, 91.06),
        "snip": (92.59, 91.01),
        "grasp": (92.38, 91.39),
        "random-channel": (90.27, 87.19),
        "rumi": (91.63, 90.77),
        "hrbp": (92.30, 90.84),
        "deep-r": (91.62, 89.84),
        "dsr": (92.97, 91.61),
        "set": (92.30, 90.76),
        "rigl": (92.84, 92.02),
        "hrbp-dynamic": (92.72, 91.25),
    },
    ("resnet32", "cifar100"): {
        "dense": (74.64,),
        "random": (69.48, 67.03),
        "lottery": (68.99, 65.02),
        "snip": (68.89, 65.22),
        "grasp": (69.24, 66.50),
        "random-channel": (62.71, 56.33),
        "rumi": (66.97, 64.35),
        "hrbp": (69.22, 65.94),
        "deep-r": (66.78, 63.90),
        "dsr": (69.63, 68.20),
        "set": (69.66, 67.41),
        "rigl": (70.98, 68.50),
        "hrbp-dynamic": (69.51, 66.41),
    },
    ("vgg19", "cifar10"): {
        "dense": (94.23,),
        "random": (92.91, 91.91),
        "lottery": (93.51, 92.92),
        "snip": (93.63, 93.43),
        "grasp": (93.30, 93.04),
        "random-channel": (90.84, 87.12),
        "rumi": (92.81, 91.86),
        "hrbp": (92.88, 91.66),
        "deep-r": (90.81, 89.59),
        "dsr": (93.75, 93.86),
        "set": (92.46, 91.73),
        "rigl": (93.15, 92.30),
        "hrbp-dynamic": (93.07, 91.79),
    },
    ("vgg19", "cifar100"): {
        "dense": (74.16,),
        "random": (70.39, 68.63),
        "lottery": (72.78, 71.44),
        "snip": (72.84, 71.83),
        "grasp": (71.95, 71.23),
        "random-channel": (59.61, 49.31),
        "rumi": (70.52, 68.60),
        "hrbp": (70.25, 67.89),
        "deep-r": (66.83, 63.46),
        "dsr": (72.31, 71.98),
        "set": (72.36, 69.81),
        "rigl": (71.63, 69.13),
        "hrbp-dynamic": (70.49, 68.04),
    },
}
# (network, method) -> training speed-up over dense at 90 and 95%, CIFAR-10.
SPEED_UPS = {
    ("resnet32", "RC"): (1.5, 1.6),
    ("resnet32", "Grouping"): (1.1, 1.2),
    ("resnet32", "HRBP"): (1.4, 1.6),
    ("vgg19", "RC"): (1.7, 1.8),
    ("vgg19", "Grouping"): (1.2, 1.2),
    ("vgg19", "HRBP"): (1.4, 1.9),
}
_LOTTERY = "LTH: every pass has the epochs of a whole run (ours)."


def _on(dataset: str) -> list[Setting]:
    return [dataclasses.replace(setting, dataset=dataset) for setting in (RESNET32, VGG19)]


def _config(setting: Setting, method: str, sparsity: float) -> TrainConfig:
    options = METHODS[method].options
    if method == "grasp" and (setting.dataset, setting.model) == ("cifar100", "resnet32"):
        options = Grasp(examples_per_class=5, batches=2)  # of GraSP's configs
    config = setting.config(method, sparsity, options)
    if not isinstance(options, Lottery):
        return config
    return dataclasses.replace(config, epochs=options.count(sparsity) * setting.epochs)


def _cells(dataset: str, methods: dict[str, str]) -> tuple[Cell, ...]:
    """The dense network, then every method at both sparsities, on both networks."""
    cells = []
    for setting in _on(dataset):
        paper = PAPER[setting.model, dataset]
        cells.append(Cell("dense", setting.config("dense"), *paper["dense"]))
    for method, row in methods.items():
        for setting in _on(dataset):
            numbers = PAPER[setting.model, dataset].get(method, (None, None))
            for sparsity, number in zip(SPARSITIES, numbers, strict=True):
                cells.append(Cell(row, _config(setting, method, sparsity), number))
    return tuple(cells)


def _static(dataset: str) -> SweepTable:
    title = "HRBP beside other masks that stay"
    return SweepTable(title, SOURCE, _cells(dataset, STATIC), _LOTTERY)


def _dynamic(dataset: str) -> SweepTable:
    title = "Dynamic HRBP beside other masks that move"
    return SweepTable(title, SOURCE, _cells(dataset, DYNAMIC))


def ablation() -> SweepTable:
    """What HRBP's own choices cost, at 90% on VGG-19."""
    changes: dict[str, Options] = {"HRBP": Hrbp()}
    changes |= {f"taps {n}/9": Hrbp(block_density=n / 9) for n in (1, 2, 3, 5, 7, 9)}
    changes |= {f"scores {scores}": Hrbp(scores=scores) for scores in ("random", "gradient")}
    changes |= {f"groups of {size}": Hrbp(group_size=size) for size in (8, 16, 64)}
    changes |= {f"channel block {n}": Hrbp(64, channel_block=n) for n in (1, 8, 16, 32, 64)}
    changes |= {
        f"channel block {n}, ordered": Hrbp(64, channel_block=n, channel_order=True)
        for n in (8, 16, 32, 64)
    }
    cells = [Cell("dense", VGG19.config("dense"), 94.23)]
    cells += [
        Cell(row, VGG19.config("hrbp", 0.9, options), 92.88 if row == "HRBP" else None)
        for row, options in changes.items()
    ]
    note = (
        "The paper says that fewer taps a block are better and that the scores hardly matter, "
        "without a number for either. HRBP has groups of 32 and takes 1/3 of the taps; rows with a "
        "channel block have groups of 64."
    )
    return SweepTable("What HRBP's choices cost", SOURCE, tuple(cells), note)


def speed() -> SweepTable:
    """Training steps of the benchmarks beside the paper's speed-ups."""
    note = (
        "Packed steps of the benchmarks beside the fastest dense step in XLA, images of CIFAR-10's "
        "size; the paper's are of whole trainings."
    )
    title = "Training speed against sparsity"
    return SweepTable(title, SOURCE, note=note, measured=_speed_ups)


def _speed_ups() -> list[dict[str, Any]]:
    """A row for each device, network and sparsity of the committed training benchmarks."""
    rows = []
    for name in results.names():
        if not name.startswith("bench_training_"):
            continue
        report = results.read(name)
        for row in report["rows"]:
            if row["execution"] == "packed":
                paper = SPEED_UPS.get((row["model"], "HRBP"), ())
                rows.append(
                    {
                        "network": NAMES[row["model"]],
                        "width": row["width"],
                        "sparsity": row["sparsity"],
                        "speed_up": row["speed_up_over_dense"],
                        "paper": dict(zip(SPARSITIES, paper, strict=False)).get(row["sparsity"]),
                        "precision": row.get("precision", "float32"),
                        "device": report["device"],
                        "commit": report["commit"],
                    }
                )
    return rows


def imagenet() -> SweepTable:
    """ResNet-50 on ImageNet."""
    rows = {
        "hrbp": ("HRBP", 74.84, 70.90),
        "snip": ("SNIP", 73.95, 69.67),
        "grasp": ("GraSP", 74.02, 72.06),
    }
    cells = [Cell("dense", HRBP_IMAGENET.config("dense"), 75.70)]
    cells += [
        Cell(row, HRBP_IMAGENET.config(method, sparsity, METHODS[method].options), number)
        for method, (row, *numbers) in rows.items()
        for sparsity, number in zip((0.6, 0.8), numbers, strict=True)
    ]
    return SweepTable("HRBP on ImageNet", SOURCE, tuple(cells))


TABLES: Tables = {
    "hrbp-static": lambda: _static("cifar10"),
    "hrbp-dynamic": lambda: _dynamic("cifar10"),
    "hrbp-static-cifar100": lambda: _static("cifar100"),
    "hrbp-dynamic-cifar100": lambda: _dynamic("cifar100"),
    "hrbp-ablation": ablation,
    "hrbp-speed": speed,
    "imagenet-hrbp": imagenet,
}
