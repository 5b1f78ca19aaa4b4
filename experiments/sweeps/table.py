"""What a table of a paper is made of: cells, each a training run for every seed."""

import dataclasses
import re
from collections.abc import Callable
from typing import Any

from experiments.training.config import TrainConfig

NAMES = {
    "cnn": "CNN",
    "mobilenet_v1": "MobileNet-v1",
    "resnet18": "ResNet-18",
    "resnet20": "ResNet-20",
    "resnet32": "ResNet-32",
    "resnet34": "ResNet-34",
    "resnet50": "ResNet-50",
    "resnet50_v1_5": "ResNet-50 v1.5",
    "resnet56": "ResNet-56",
    "vgg19": "VGG-19",
}


@dataclasses.dataclass(frozen=True)
class Cell:
    """One number of a table.

    Attributes:
      row: the method, as the table calls it.
      config: of its runs, but the seed and the places.
      paper: the top-1 accuracy that the paper has there, in percent; None where it has none.
      epsilons: of an attack with the trained network's gradients; () for none.
      paper_attacked: the accuracies under that attack that the paper has, in percent.
    """

    row: str
    config: TrainConfig
    paper: float | None = None
    epsilons: tuple[float, ...] = ()
    paper_attacked: tuple[float, ...] = ()

    @property
    def network(self) -> str:
        """The network in words, with its width if that is not 1."""
        width = f", width {self.config.width:g}" if self.config.width != 1 else ""
        return NAMES[self.config.model] + width

    @property
    def name(self) -> str:
        """What `--cells` is matched with, before `/seed0` and so on."""
        sparsity = "" if self.config.sparsity is None else f"-{100 * self.config.sparsity:g}"
        row = re.sub(r"[^\w.+:/-]+", "-", self.row.lower()).strip("-")
        return f"{self.config.model}{sparsity}/{row}"


@dataclasses.dataclass(frozen=True)
class SweepTable:
    """One table.

    Attributes:
      title: what it shows.
      source: where the paper's numbers stand.
      cells: of the full scale, in order of what they tell.
      note: what differs from the paper, or what the paper leaves open.
      columns: of the report beside the usual ones: attack, compression, convergence, sad.
      curves: whether the figure shows accuracy and SAD over the epochs.
      measured: its rows, where they come from the benchmarks' reports and not from runs.
    """

    title: str
    source: str
    cells: tuple[Cell, ...] = ()
    note: str = ""
    columns: tuple[str, ...] = ()
    curves: bool = False
    measured: Callable[[], list[dict[str, Any]]] | None = None


Tables = dict[str, Callable[[], SweepTable]]
