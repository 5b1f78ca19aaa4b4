"""Campfire."""

import dataclasses
from pathlib import Path
from typing import Any

import jax

import blocksparse_jax as bsj
from blocksparse_jax import patterns, tree
from blocksparse_jax.patterns import Pattern
from experiments.models.spaces import channel_spaces
from experiments.training.execution import State, masks_of
from experiments.training.methods.options import Options, Setup


@dataclasses.dataclass(frozen=True)
class Campfire(Options):
    """Campfire, whose era is the first quarter of training: the paper's epochs 0 to 10, of 40.

    Attributes:
      kind: window (weights in each kernel slice), ck (whole kernel slices), combined (both at every
        update) or inter_epoch (slices in the first half of the era, then weights in them).
      era_start: where the era begins, as a fraction of training.
      era_length: how long it is, as a fraction of training.
      exponent: of the curve from dense to the final sparsity.
      window_share: the part of the sparsity that weights in slices take, in combined and
        inter_epoch.
      fc: prunes the classifier too, by block (windows of fc_block x fc_block) or fine (single
        weights), with elimination of the inputs from channels that are gone; None leaves it dense.
      fc_block: size of the windows of the classifier, 1 to 4.
    """

    kind: str = "combined"
    era_start: float = 0.0
    era_length: float = 0.25
    exponent: float = 3.0
    window_share: float = 0.8
    fc: str | None = None
    fc_block: int = 4

    def check(self) -> None:
        """The era lies inside of the run."""
        start, length = self.era_start, self.era_length
        if not (0 <= start < 1 and 0 < length <= 1 - start):
            raise ValueError(
                "era_start: expected an era inside of the run, such as era_start=0.0 and "
                f"era_length=0.25, as fractions of training, got {start} and {length}"
            )

    def make_pattern(self) -> Pattern:
        """Windows, or kernel slices in all kinds that remove them."""
        return patterns.window() if self.kind == "window" else patterns.kernel("max")

    def feeds(self, params: Any) -> dict[str, list[str]]:
        """The sparse convolutions whose channels the classifier reads; {} where one is dense."""
        if self.fc is None:
            return {}
        leaves = {tree.path_name(path): leaf for path, leaf in jax.tree.leaves_with_path(params)}
        for entries in channel_spaces(params).values():
            convs = [name for name, axis in entries if axis == 3]
            if (_CLASSIFIER, 0) in entries and all(
                tree.conv_kernels(name, leaves[name]) for name in convs
            ):
                return {_CLASSIFIER: convs}
        return {}

    def arguments(self, setup: Setup) -> dict[str, Any]:
        """All options, the era in updates."""
        total = setup.length.total
        start = round(self.era_start * total)
        return {
            "sparsity": setup.sparsity,
            "kind": self.kind,
            "era": (start, max(1, round(self.era_length * total))),
            "exponent": self.exponent,
            "window_share": self.window_share,
            "fc": self.fc,
            "fc_block": self.fc_block,
            "feeds": self.feeds(setup.params),
        }

    def finish(self, state: State, folder: Path) -> dict[str, Any]:
        """The inputs of the classifier that were eliminated, and their weights."""
        if not (feeds := self.feeds(state.params)):
            return {}
        (saved,) = bsj.metrics.eliminated_inputs(masks_of(state), feeds).values()
        return {"fc_eliminated_inputs": saved.inputs, "fc_eliminated_weights": saved.weights}


_CLASSIFIER = "classifier/kernel"
