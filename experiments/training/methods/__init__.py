"""The options of each training method, one file a family, and the arguments that they become."""

from experiments.training.methods.at_start import RandomChannels, RandomWeights, Snip
from experiments.training.methods.channels import PruneTrain, Slimming, Sss
from experiments.training.methods.dynamic import DropAndGrow, Dynamic, Set
from experiments.training.methods.exchange import (
    DeepR,
    Dsr,
    GraNet,
    Mest,
    Narang,
    Nest,
    SRigL,
)
from experiments.training.methods.gradual import Gradual
from experiments.training.methods.hrbp import Hrbp, HrbpDynamic
from experiments.training.methods.n_of_m import NOfM, SrSte
from experiments.training.methods.options import AnyPattern, Options, Setup
from experiments.training.methods.subp import Subp

__all__ = [
    "AnyPattern",
    "DeepR",
    "DropAndGrow",
    "Dsr",
    "Dynamic",
    "GraNet",
    "Gradual",
    "Hrbp",
    "HrbpDynamic",
    "Mest",
    "NOfM",
    "Narang",
    "Nest",
    "Options",
    "PruneTrain",
    "RandomChannels",
    "RandomWeights",
    "SRigL",
    "Set",
    "Setup",
    "Slimming",
    "Snip",
    "SrSte",
    "Sss",
    "Subp",
]
