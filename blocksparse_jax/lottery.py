"""Lottery tickets: rounds of training, pruning by magnitude and rewinding."""

import math

import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from blocksparse_jax import _checks, tree
from blocksparse_jax.budgets import Budget
from blocksparse_jax.masks import check_pattern, masks_from_scores, per_leaf
from blocksparse_jax.patterns import Pattern
from blocksparse_jax.patterns.block import Block


def lottery_sparsities(sparsity: float, prune_fraction: float = 0.2) -> tuple[float, ...]:
    """The sparsity after each round of iterative pruning.

    Round i leaves `max(1 - sparsity, (1 - prune_fraction)^i)`, i = 1, 2, ...

    Args:
      sparsity: after the last round, in [0, 1).
      prune_fraction: of what is left, pruned in each round, in (0, 1).

    Returns:
      Increasing sparsities, of which the last is `sparsity`; none where that is 0.

    Raises:
      ValueError: an argument out of range.

    Example:
      >>> [round(sparsity, 3) for sparsity in lottery_sparsities(0.5)]
      [0.2, 0.36, 0.488, 0.5]

    Reference: Frankle & Carbin, "The lottery ticket hypothesis", ICLR 2019. That the last round
    prunes less, down to the sparsity asked for, is our choice.
    """
    _checks.fraction("sparsity", sparsity)
    _checks.fraction("prune_fraction", prune_fraction, low_open=True)
    rounds = math.ceil(math.log(1 - sparsity) / math.log(1 - prune_fraction) - 1e-9)
    before = tuple(1 - (1 - prune_fraction) ** i for i in range(1, rounds))
    return (*before, sparsity) if rounds else ()


def lottery_ticket(
    params: PyTree,
    masks: PyTree | None,
    sparsity: float,
    *,
    pattern: Pattern | None = None,
    budget: Budget = "global",
    where: tree.Where | None = None,
) -> PyTree:
    """One round of iterative magnitude pruning: the smallest trained weights go, none comes back.

    The lottery ticket is what the masks leave of the weights of an early step. To find it, train,
    prune and rewind::

        masks = None
        for sparsity in bsj.lottery_sparsities(0.9):  # prunes 20% of what is left in each round
            params = early if masks is None else bsj.apply_masks(early, masks)
            trained = train(params, masks)  # with a fresh optimizer, under the masks
            masks = bsj.lottery_ticket(trained, masks, sparsity)

    `early` are the weights at initialisation (Frankle & Carbin, 2019) or those of an early step of
    training (Frankle et al., 2020), with batch statistics and learning rate of that step. The masks
    and the number of rounds done are all that a search needs to go on after a stop.

    Args:
      params: the trained parameters, any pytree.
      masks: what they were trained under; None before the first round, where all weights were.
      sparsity: fraction of the chosen weights that is pruned after this round, in [0, 1).
      pattern: which sets of weights are kept together; None is `patterns.unstructured()`.
      budget: "global" (one threshold through all layers), "uniform", "erk", "er", or a map layer
        name -> sparsity.
      where: predicate (name, leaf) of the sparse leaves, default conv kernels except the stem.

    Returns:
      The masks of the next round, for `fixed_masks`, `apply_masks` or `replace_masks`: bool arrays,
      and the scalar True for the other leaves.

    Raises:
      ValueError: a bad argument, masks of another tree, or a pattern that draws its sets anew
        (HRBP's blocks) or fixes its density (N:M), and so has no rounds.

    Example:
      >>> params = {"w": jnp.arange(1.0, 6.0).reshape(5, 1)}
      >>> def every(name, leaf):
      ...     return True
      >>> masks = lottery_ticket(params, None, 0.2, where=every)
      >>> masks = lottery_ticket({"w": 6 - params["w"]}, masks, 0.4, where=every)
      >>> masks["w"].reshape(-1).tolist()
      [False, True, True, True, False]

    Reference: Frankle & Carbin, "The lottery ticket hypothesis", ICLR 2019; Frankle et al., "Linear
    mode connectivity and the lottery ticket hypothesis", ICML 2020 (rewinding).
    """
    pattern = check_pattern(pattern, budget)
    if isinstance(pattern, Block) or pattern.density is not None:
        why = "fixes its density" if pattern.density is not None else "groups the filters anew"
        raise ValueError(
            f"pattern: {pattern} {why} at each draw, so rounds of pruning do not lead to it; use "
            "patterns.unstructured(), one_by_n(...), kernel(), channel(...) or window(...)"
        )
    chosen = tree.choose(where, params)
    names = [tree.path_name(path) for path, _ in jax.tree.leaves_with_path(params)]
    nodes = [True] * len(names) if masks is None else tree.match("masks", masks, params)
    alive = dict(zip(names, nodes, strict=True))
    # below all kept weights, so that what is pruned comes last
    scores = {name: jnp.where(alive[name], jnp.abs(leaf), -1) for name, leaf in chosen.items()}
    return masks_from_scores(
        per_leaf(params, scores, jnp.zeros(())),
        sparsity,
        pattern=pattern,
        budget=budget,
        where=lambda name, leaf: name in scores,
    )
