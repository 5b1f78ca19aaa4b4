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
from experiments.training.methods.campfire import Campfire
from experiments.training.methods.channels import PruneTrain, Slimming, Sss
from experiments.training.methods.compression import DeepCompression
from experiments.training.methods.dynamic import DropAndGrow, Dynamic, Set
from experiments.training.methods.exchange import (
    DeepR,
    Dsr,
    GraNet,
    Mest,
    Narang,
    SRigL,
)
from experiments.training.methods.gradual import Gradual
from experiments.training.methods.hrbp import Hrbp, HrbpDynamic
from experiments.training.methods.lottery import Lottery
from experiments.training.methods.magnitude import Magnitude
from experiments.training.methods.n_of_m import NOfM, SrSte
from experiments.training.methods.nest import Nest
from experiments.training.methods.options import AnyPattern, Options, Setup, Weights
from experiments.training.methods.structured import (
    BrainDamage,
    GroupLasso,
    L1Filters,
    LassoChannels,
    Pfa,
    ThiNet,
)
from experiments.training.methods.subp import Subp
from experiments.training.methods.variational import VariationalDropout

__all__ = [
    "AnyPattern",
    "BrainDamage",
    "Campfire",
    "DeepCompression",
    "DeepR",
    "DropAndGrow",
    "Dsb",
    "Dsr",
    "Dynamic",
    "GraNet",
    "Gradual",
    "Grasp",
    "GroupLasso",
    "Hrbp",
    "HrbpDynamic",
    "L1Filters",
    "LassoChannels",
    "Lottery",
    "Magnitude",
    "Mest",
    "NOfM",
    "Narang",
    "Nest",
    "Options",
    "Pfa",
    "PruneTrain",
    "RandomChannels",
    "RandomWeights",
    "Rumi",
    "SRigL",
    "Set",
    "Setup",
    "Slimming",
    "Snip",
    "SrSte",
    "Sss",
    "Subp",
    "Synflow",
    "ThiNet",
    "VariationalDropout",
    "Weights",
]
