"""Budgets: how the density of a network is shared among its layers.

Uniform, Erdos-Renyi (ER), Erdos-Renyi-Kernel (ERK), or one threshold over all layers.
"""

import math
from collections.abc import Mapping
from typing import Any, Literal, get_args

from blocksparse_jax import _checks
from blocksparse_jax.erk import Shapes, er_densities, erk_densities

Named = Literal["uniform", "erk", "er", "global"]
Budget = Named | Mapping[str, float]
NAMES: tuple[Named, ...] = get_args(Named)


def check_budget(budget: Any) -> None:
    """Raises a ValueError unless it is the name of a budget, or a map to sparsities.

    Whether the names in a map are layers shows when masks are drawn.
    """
    if isinstance(budget, Mapping):
        for name, value in budget.items():
            _checks.fraction(f"budget[{name!r}]", value)
    else:
        _checks.choice("budget", budget, NAMES)


def layer_densities(budget: Budget, shapes: Shapes, sparsity: float) -> dict[str, float]:
    """Shares a density among layers.

    "uniform": the same everywhere. "erk" and "er": larger layers get sparser (see `erk.py`). A map
    gives the *sparsity* of the layers it names; the others take `sparsity`. "global" draws one
    threshold through the scores of all layers, so shapes alone do not decide it: see
    `masks.masks_from_scores`.

    Args:
      budget: "uniform", "erk", "er", or a map layer name -> sparsity.
      shapes: layer name -> parameter shape.
      sparsity: the fraction to remove over all layers, in [0, 1).

    Returns:
      Layer name -> density in (0, 1].

    Raises:
      ValueError: an unknown budget, a name that is no layer, or a sparsity outside [0, 1).

    Example:
      >>> densities = layer_densities("erk", {"a": (3, 3, 8, 8), "b": (3, 3, 64, 64)}, 0.8)
      >>> {name: round(d, 3) for name, d in densities.items()}
      {'a': 1.0, 'b': 0.187}

    Reference: Evci et al., "RigL", ICML 2020 (ERK); Mocanu et al., "SET", 2018 (ER).
    """
    sparsity = _checks.fraction("sparsity", sparsity)
    check_budget(budget)
    if isinstance(budget, Mapping):
        return _by_map(budget, shapes, sparsity)
    if budget == "global":
        raise ValueError(
            "budget: 'global' compares scores, and here are only shapes; expected 'uniform', "
            "'erk', 'er' or a map layer name -> sparsity"
        )
    if budget == "uniform":
        return dict.fromkeys(shapes, 1 - sparsity)
    densities = erk_densities if budget == "erk" else er_densities
    return densities(shapes, 1 - sparsity)


def target_density(budget: Budget, shapes: Shapes, sparsity: float) -> float:
    """The density that a budget asks of all layers together.

    Args:
      budget: as in `layer_densities`, or "global".
      shapes: layer name -> parameter shape.
      sparsity: the fraction to remove over all layers, in [0, 1).

    Returns:
      A number in (0, 1].

    Raises:
      ValueError: as `layer_densities`.

    Example:
      >>> target_density({"a": 0.5}, {"a": (2, 4), "b": (2, 4)}, 0.75)
      0.375
    """
    if budget == "global":
        return 1 - sparsity
    densities = layer_densities(budget, shapes, sparsity)
    sizes = {name: math.prod(shape) for name, shape in shapes.items()}
    return sum(densities[name] * size for name, size in sizes.items()) / sum(sizes.values())


def _by_map(budget: Mapping[str, float], shapes: Shapes, sparsity: float) -> dict[str, float]:
    unknown = [name for name in budget if name not in shapes]
    if unknown:
        raise ValueError(
            f"budget: {unknown[0]!r} is no sparse layer, expected names among {list(shapes)[:8]}"
        )
    return {name: 1 - float(budget.get(name, sparsity)) for name in shapes}
