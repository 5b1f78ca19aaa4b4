"""The options of each training method, one file a family, and the arguments that they become."""

from experiments.training.methods.at_start import (
    Dsb,
    Grasp,
    RandomChannels,
    RandomWeights,
    Rumi,
    Snip,
    Synflow,
)
from experiments.training.methods.dynamic import DropAndGrow, Dynamic
from experiments.training.methods.gradual import Gradual
from experiments.training.methods.hrbp import Hrbp, HrbpDynamic
from experiments.training.methods.lottery import Lottery
from experiments.training.methods.n_of_m import NOfM, SrSte
from experiments.training.methods.options import AnyPattern, Options, Setup
from experiments.training.methods.subp import Subp

__all__ = [
    "AnyPattern",
    "DropAndGrow",
    "Dsb",
    "Dynamic",
    "Gradual",
    "Grasp",
    "Hrbp",
    "HrbpDynamic",
    "Lottery",
    "NOfM",
    "Options",
    "RandomChannels",
    "RandomWeights",
    "Rumi",
    "Setup",
    "Snip",
    "SrSte",
    "Subp",
    "Synflow",
]
