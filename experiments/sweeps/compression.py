"""The table of Deep Compression."""

from experiments.sweeps.settings import HAN
from experiments.sweeps.table import Cell, SweepTable, Tables
from experiments.training.methods import DeepCompression

SOURCE = "Han et al., ICLR 2016"


def table() -> SweepTable:
    """Pruned, shared and coded networks."""
    cells = [Cell("dense", HAN.config("dense"))]
    cells += [
        Cell(
            f"{bits}-bit convolutions",
            HAN.config("deep-compression", sparsity, DeepCompression(conv_bits=bits)),
        )
        for sparsity in (0.9, 0.95)
        for bits in (8, 5, 4)
    ]
    note = "The paper compresses other networks, of ImageNet and MNIST: no number stands beside."
    title = "Prune, retrain, share, code"
    return SweepTable(title, SOURCE, tuple(cells), note, columns=("compression",))


TABLES: Tables = {"compression": table}
