"""Masks that are chosen before training and stay."""

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import optax

import blocksparse_jax as bsj
from blocksparse_jax import _checks, patterns, tree
from blocksparse_jax.patterns import Pattern
from experiments.training.methods.batches import balanced, first_examples
from experiments.training.methods.options import AnyPattern, Options, Setup

_LAYERS: dict[str, Callable[[str, jax.Array], bool]] = {
    "inner": tree.conv_kernels,
    "all": lambda name, leaf: leaf.ndim > 1,
}


@dataclasses.dataclass(frozen=True)
class Scored(AnyPattern):
    """Masks of any pattern, by scores of the untrained network.

    Attributes:
      layers: all, or inner: conv kernels except the stem; None is all for single weights, as in the
        paper, and inner for other patterns, which stem and classifier may not fit.
    """

    budget: str = "global"
    layers: str | None = None

    def check(self) -> None:
        """ValueError for an unknown choice of layers, or where the classifier has no such sets."""
        if self.layers is not None:
            _checks.choice("layers", self.layers, _LAYERS)
        if self.layers == "all" and self.pattern != "unstructured":
            raise ValueError(
                f"layers: 'all' takes stem and classifier too, which pattern={self.pattern!r} may "
                "not fit; leave it out, or take single weights"
            )

    def arguments(self, setup: Setup) -> dict[str, Any]:
        """Those of any pattern, and the layers."""
        layers = self.layers or ("all" if self.pattern == "unstructured" else "inner")
        return super().arguments(setup) | {"where": _LAYERS[layers]}


@dataclasses.dataclass(frozen=True)
class Snip(Scored):
    """Masks by the sensitivity of one batch's loss.

    Attributes:
      examples: in the batch; all there are where an epoch has fewer.
    """

    examples: int = 100

    def check(self) -> None:
        """ValueError for a number out of range."""
        super().check()
        _checks.positive_int("examples", self.examples)

    def batch(self, batches: Iterable[Any], classes: int) -> Any:
        """The first examples of the first epoch."""
        return first_examples(batches, self.examples)

    def arguments(self, setup: Setup) -> dict[str, Any]:
        """The scores of the batch."""
        if setup.loss_fn is None or setup.batch is None:
            raise ValueError("batch: snip scores weights by the loss of one batch, got none")
        scores = bsj.snip(setup.loss_fn, setup.params, setup.batch)
        return super().arguments(setup) | {"scores": scores, "name": "snip"}


@dataclasses.dataclass(frozen=True)
class Grasp(Scored):
    """Masks by what each weight does for the flow of the gradient.

    Attributes:
      examples_per_class: in one batch, which is ordered by class and cut into two halves.
      batches: how many such batches; the paper has 5 examples in 2 batches for CIFAR-100.
      temperature: divides the logits.
    """

    examples_per_class: int = 10
    batches: int = 1
    temperature: float = 200

    def check(self) -> None:
        """ValueError for a number out of range."""
        super().check()
        for name in ("examples_per_class", "batches"):
            _checks.positive_int(name, getattr(self, name))
        _checks.number("temperature", self.temperature, low_open=True)

    def batch(self, batches: Iterable[Any], classes: int) -> Any:
        """The first examples of every class."""
        return balanced(batches, classes, self.examples_per_class, self.batches)

    def arguments(self, setup: Setup) -> dict[str, Any]:
        """The scores of the batch, and the authors' cut."""
        if setup.model is None or setup.batch is None:
            raise ValueError("batch: grasp scores weights by the loss of a batch, got none")

        def loss_fn(params: Any, batch: Any) -> jax.Array:
            images, labels = batch
            logits = setup.logits(params, images, train=True) / self.temperature
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

        scores = bsj.grasp(loss_fn, setup.params, setup.batch, parts=2 * self.batches)
        arguments = super().arguments(setup) | {"scores": scores, "name": "grasp"}
        if self.pattern == "unstructured" and self.budget == "global":
            chosen = tree.choose(arguments["where"], setup.params)
            size = sum(leaf.size for leaf in chosen.values())
            # N - k + 1 weights stay: the weight at the cut too
            arguments["sparsity"] = max(int(size * setup.sparsity) - 1, 0) / size
        return arguments


@dataclasses.dataclass(frozen=True)
class Synflow(Scored):
    """Masks by the flow through each weight, without data, in many rounds.

    Attributes:
      rounds: of scoring and pruning; the rounds but the last prune single weights of all layers
        together.
    """

    rounds: int = 100

    def arguments(self, setup: Setup) -> dict[str, Any]:
        """The scores of the last round."""
        if setup.model is None:
            raise ValueError("model: synflow scores weights by the network's outputs, got none")
        positive = setup._replace(batch_stats=jax.tree.map(jnp.abs, setup.batch_stats))
        arguments = super().arguments(setup)
        scores = bsj.synflow(
            lambda params, images: positive.logits(params, images, train=False).sum(),
            setup.params,
            jnp.ones((1, *setup.image_shape)),
            sparsity=setup.sparsity,
            rounds=self.rounds,
            where=arguments["where"],
        )
        return arguments | {"scores": scores, "name": "synflow"}


@dataclasses.dataclass(frozen=True)
class RandomWeights(Options):
    """Single weights drawn at random.

    Attributes:
      budget: how the layers share the density: uniform, erk, er or global.
    """

    budget: str = "uniform"

    def make_pattern(self) -> Pattern:
        """Single weights."""
        return patterns.unstructured()

    def arguments(self, setup: Setup) -> dict[str, Any]:
        """The drawn masks."""
        masks = bsj.random_masks(setup.key, setup.params, setup.sparsity, budget=self.budget)
        return {"masks": masks, "sparsity": setup.sparsity}


@dataclasses.dataclass(frozen=True)
class RandomChannels(Options):
    """Input channels drawn at random."""

    def make_pattern(self) -> Pattern:
        """Input channels."""
        return patterns.channel("input")

    def arguments(self, setup: Setup) -> dict[str, Any]:
        """The layouts of the drawn channels."""
        layouts = bsj.random_channel_layouts(setup.key, setup.params, setup.sparsity)
        return {"layouts": layouts, "sparsity": setup.sparsity}


@dataclasses.dataclass(frozen=True)
class Rumi(Options):
    """Single weights drawn at random, regrouped into blocks of filters x columns.

    Attributes:
      clusters: of a layer's filters.
      min_rows: filters of the smallest cluster that becomes a block.
      max_rows: blocks of larger clusters have a multiple of this many filters.
      t1: columns taken per non-zero of a cluster's fullest row, at most.
    """

    clusters: int = 8
    min_rows: int = 17
    max_rows: int = 32
    t1: float = 1.5

    def make_pattern(self) -> Pattern:
        """Single weights: no layout holds arbitrary columns."""
        return patterns.unstructured()

    def arguments(self, setup: Setup) -> dict[str, Any]:
        """The regrouped masks."""
        masks = bsj.random_masks(setup.key, setup.params, setup.sparsity)
        regrouped = bsj.rumi_masks(masks, **dataclasses.asdict(self))
        return {"masks": regrouped, "sparsity": setup.sparsity}


@dataclasses.dataclass(frozen=True)
class Dsb(Options):
    """The heaviest squares of shuffled filters and columns.

    Attributes:
      block: side of a square.
    """

    block: int = 16

    def make_pattern(self) -> Pattern:
        """Single weights: no layout holds arbitrary columns."""
        return patterns.unstructured()

    def arguments(self, setup: Setup) -> dict[str, Any]:
        """The masks of the squares."""
        masks = bsj.dsb_masks(setup.params, setup.sparsity, block=self.block)
        return {"masks": masks, "sparsity": setup.sparsity}
