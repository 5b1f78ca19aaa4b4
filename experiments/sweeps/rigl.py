"""The table of RigL on CIFAR-10."""

from experiments.sweeps.settings import RIGL
from experiments.sweeps.table import Cell, SweepTable, Tables
from experiments.training.methods import Dynamic, Gradual, RandomWeights, Set

SOURCE = "Evci et al., ICML 2020: WRN-22-2 on CIFAR-10, from the authors' code"
_ROWS = (  # row, method, options, top-1 at 50, 80, 90 and 95%
    ("RigL", "rigl", Dynamic(), (94.2, 93.6, 92.9, 91.8)),
    ("static", "random", RandomWeights(budget="erk"), (94.1, 92.9, 91.5, 89.0)),
    ("SET", "set", Set(budget="erk"), (None, None, None, None)),
    ("gradual", "gradual", Gradual(), (94.0, 93.6, 93.3, 92.3)),
)


def table() -> SweepTable:
    """Static, SET, RigL and gradual pruning."""
    cells = [Cell("dense", RIGL.config("dense"))]
    cells += [
        Cell(row, RIGL.config(method, sparsity, options), numbers[i])
        for i, sparsity in reversed(list(enumerate((0.5, 0.8, 0.9, 0.95))))
        for row, method, options, numbers in _ROWS
    ]
    note = (
        "The paper's network is WRN-22-2; ours is ResNet-20 of width 2, with as many blocks of as "
        "many channels, normalised after the convolutions."
    )
    return SweepTable("RigL beside static masks and pruning", SOURCE, tuple(cells), note)


TABLES: Tables = {"rigl": table}
