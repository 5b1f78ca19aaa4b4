"""The first masks of a method: drawn from scores at init, or from the first gradient."""

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, PyTree

from blocksparse_jax import _checks, tree
from blocksparse_jax import scores as scores_
from blocksparse_jax.budgets import Budget, target_density
from blocksparse_jax.masks import check_pattern, draw
from blocksparse_jax.patterns import Kept, Pattern
from blocksparse_jax.transforms.leaves import Leaves


@dataclasses.dataclass(frozen=True, eq=False)
class FirstMasks:
    """How a method draws its first masks: see `first_masks`."""

    pattern: Pattern
    sparsity: float
    budget: Budget
    scores: scores_.Kind | PyTree
    key: Array

    @property
    def by_gradient(self) -> bool:
        """Whether the first update draws the masks anew, by its gradient."""
        return isinstance(self.scores, str) and self.scores == "gradient"

    def at_init(self, chosen: dict[str, Array]) -> dict[str, Kept]:
        """Masks by the scores; by magnitude where those of the gradient are to follow."""
        kind = "magnitude" if self.by_gradient else self.scores
        scores = scores_.make(kind, chosen, None, self.key)
        return draw(self.pattern, scores, self.sparsity, self.budget, with_layouts=True)

    def from_gradient(self, leaves: Leaves) -> dict[str, Kept]:
        """Masks by `|g|`."""
        scores = {name: scores_.magnitude(leaf.grad) for name, leaf in leaves.items()}
        return draw(self.pattern, scores, self.sparsity, self.budget)

    def density(self, chosen: dict[str, Array]) -> float:
        """The density that the budget asks of all layers together."""
        return target_density(self.budget, tree.shapes(chosen), self.sparsity)


def keep_all(pattern: Pattern, chosen: dict[str, Array]) -> dict[str, Kept]:
    """Masks that keep everything, of a method that prunes later; layouts are read from the masks.

    Raises:
      ValueError: a leaf that the pattern cannot divide.

    Example:
      >>> import jax.numpy as jnp
      >>> from blocksparse_jax.patterns import channel
      >>> kept = keep_all(channel("input"), {"conv": jnp.ones((3, 3, 8, 8))})["conv"]
      >>> bool(kept.mask.all()), kept.layout.group_size
      (True, 8)
    """
    pattern.check_leaves(chosen)
    return {
        name: Kept(jnp.ones(leaf.shape, bool), pattern.shrinking(leaf.shape))
        for name, leaf in chosen.items()
    }


def first_masks(
    sparsity: float | None,
    pattern: Pattern | None,
    budget: Budget,
    scores: scores_.Kind | PyTree,
    key: Array | None,
) -> FirstMasks:
    """Checks the arguments that decide the first masks.

    Args:
      sparsity: fraction to remove, in [0, 1); None where the pattern fixes it.
      pattern: which sets of weights are kept together; None is `patterns.unstructured()`.
      budget: how the layers share the density.
      scores: "magnitude", "gradient", "random", or a tree of arrays.
      key: JAX random key of random scores; None is `jax.random.key(0)`.

    Returns:
      What draws them.

    Raises:
      ValueError: a bad argument, or "gradient" with "global" and a pattern that has a layout.

    Example:
      >>> import jax.numpy as jnp
      >>> first = first_masks(0.75, None, "uniform", "magnitude", None)
      >>> int(first.at_init({"conv": jnp.ones((3, 3, 8, 8))})["conv"].mask.sum())
      144
    """
    pattern = check_pattern(pattern, budget)
    removed = pattern.sparsity(sparsity)
    if isinstance(scores, str):
        _checks.choice("scores", scores, scores_.KINDS)
    first = FirstMasks(pattern, removed, budget, scores, _checks.random_key("key", key))
    if first.by_gradient and budget == "global" and pattern.has_layout:
        raise ValueError(
            "scores: 'gradient' draws masks inside the training step, where budget='global' "
            f"cannot read the counts of {pattern.noun}, which are shapes; use another budget, or "
            "pass the scores as a tree, e.g. from snip"
        )
    return first
