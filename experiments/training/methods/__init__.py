"""The options of each training method, one file a family, and the arguments that they become."""

from experiments.training.methods.at_start import RandomChannels, RandomWeights, Snip
from experiments.training.methods.campfire import Campfire
from experiments.training.methods.dynamic import DropAndGrow, Dynamic
from experiments.training.methods.gradual import Gradual
from experiments.training.methods.hrbp import Hrbp, HrbpDynamic
from experiments.training.methods.magnitude import Magnitude
from experiments.training.methods.n_of_m import NOfM, SrSte
from experiments.training.methods.options import AnyPattern, Options, Setup
from experiments.training.methods.subp import Subp

__all__ = [
    "AnyPattern",
    "Campfire",
    "DropAndGrow",
    "Dynamic",
    "Gradual",
    "Hrbp",
    "HrbpDynamic",
    "Magnitude",
    "NOfM",
    "Options",
    "RandomChannels",
    "RandomWeights",
    "Setup",
    "Snip",
    "SrSte",
    "Subp",
]
