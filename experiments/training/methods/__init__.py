"""The options of each training method, one file a family, and the arguments that they become."""

from experiments.training.methods.at_start import RandomChannels, RandomWeights, Snip
from experiments.training.methods.compression import DeepCompression
from experiments.training.methods.dynamic import DropAndGrow, Dynamic
from experiments.training.methods.gradual import Gradual
from experiments.training.methods.hrbp import Hrbp, HrbpDynamic
from experiments.training.methods.n_of_m import NOfM, SrSte
from experiments.training.methods.options import AnyPattern, Options, Setup, Weights
from experiments.training.methods.subp import Subp
from experiments.training.methods.variational import VariationalDropout

__all__ = [
    "AnyPattern",
    "DeepCompression",
    "DropAndGrow",
    "Dynamic",
    "Gradual",
    "Hrbp",
    "HrbpDynamic",
    "NOfM",
    "Options",
    "RandomChannels",
    "RandomWeights",
    "Setup",
    "Snip",
    "SrSte",
    "Subp",
    "VariationalDropout",
    "Weights",
]
