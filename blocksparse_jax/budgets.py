"""Budgets: how the density of a network is shared among its layers, and the whole counts that come
closest to it.
"""

import math
import warnings
from collections.abc import Mapping
from typing import Literal

from blocksparse_jax import _checks

Shapes = Mapping[str, tuple[int, ...]]
Budget = Literal["uniform", "erk", "er"] | Mapping[str, float]

TOLERANCE = 0.005  # half a percentage point: |density - target|, both as fractions of all weights
RELATIVE = 0.05  # of the target itself: more is worth a warning


def layer_densities(budget: Budget, shapes: Shapes, sparsity: float) -> dict[str, float]:
    """The density of each layer.

    "uniform": the same everywhere. "erk": `eps * sum(shape) / prod(shape)`; "er" the same over
    (cin, cout) only; eps is solved so that the total fits, layers above 1 become dense and eps is
    solved again. A map gives the *sparsity* of the layers it names; the others take `sparsity`.

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
    if isinstance(budget, Mapping):
        unknown = [name for name in budget if name not in shapes]
        if unknown:
            raise ValueError(
                f"budget: {unknown[0]!r} is no sparse layer, expected names among "
                f"{list(shapes)[:8]}"
            )
        given = {
            name: _checks.fraction(f"budget[{name!r}]", value) for name, value in budget.items()
        }
        return {name: 1 - given.get(name, sparsity) for name in shapes}
    _checks.choice("budget", budget, ("uniform", "erk", "er"))
    if budget == "uniform":
        return dict.fromkeys(shapes, 1 - sparsity)
    raw = {
        name: _erdos_renyi(shape if budget == "erk" else shape[-2:])
        for name, shape in shapes.items()
    }
    size = {name: math.prod(shape) for name, shape in shapes.items()}
    target, dense = (1 - sparsity) * sum(size.values()), set[str]()
    while True:
        rest = [name for name in shapes if name not in dense]
        if not rest:
            return dict.fromkeys(shapes, 1.0)
        eps = (target - sum(size[name] for name in dense)) / sum(
            raw[name] * size[name] for name in rest
        )
        full = {name for name in rest if eps * raw[name] > 1}
        if not full:
            return {name: 1.0 if name in dense else eps * raw[name] for name in shapes}
        dense |= full


def _erdos_renyi(shape: tuple[int, ...]) -> float:
    return sum(shape) / math.prod(shape)


def weight_counts(densities: Mapping[str, float], shapes: Shapes) -> dict[str, int]:
    """The number of kept weights of each layer: `round(density * size)`, at least 1.

    Args:
      densities: layer name -> density.
      shapes: layer name -> parameter shape.

    Returns:
      Layer name -> kept weights.

    Example:
      >>> weight_counts({"a": 0.1}, {"a": (3, 3, 4, 4)})
      {'a': 14}
    """
    return {name: max(1, round(densities[name] * math.prod(shapes[name]))) for name in shapes}


def block_counts(
    shapes: Shapes,
    densities: Mapping[str, float],
    *,
    block_density: float,
    channel_blocks: Mapping[str, int],
) -> dict[str, tuple[int, int]]:
    """Kept channels and kept taps of each layer: the whole numbers whose total density comes
    closest to the target.

    A layer keeps `ceil(block_density * kh * kw)` taps and the nearest number of channels, at least
    one run; then layers move by one run of channels at a time, the cheapest move first, while the
    total comes closer. Where that does not reach half a percentage point of all weights (very few,
    narrow layers), the number of taps of a layer moves too; where nothing reaches it, or where the
    density is off by more than 5% of the target itself (targets below 0.1), a warning gives the
    density reached.

    Args:
      shapes: layer name -> `(kh, kw, cin, cout)`.
      densities: layer name -> target density.
      block_density: fraction of the taps that a block keeps, in (0, 1].
      channel_blocks: layer name -> channels come in runs of this many.

    Returns:
      Layer name -> `(kept, kept_taps)`.

    Raises:
      ValueError: with all channels kept, `block_density` is still below the target.

    Example:
      >>> block_counts({"a": (3, 3, 64, 64)}, {"a": 0.1}, block_density=1 / 3, channel_blocks={"a": 1})
      {'a': (19, 3)}

    Reference: block density ratio of Ma et al., "HRBP", CPAL 2024.
    """
    target = sum(densities[name] * math.prod(shape) for name, shape in shapes.items())
    size = sum(math.prod(shape) for shape in shapes.values())
    taps = {
        name: max(1, math.ceil(block_density * shape[0] * shape[1] - 1e-9))
        for name, shape in shapes.items()
    }
    most = sum(taps[name] * shape[2] * shape[3] for name, shape in shapes.items())
    if target > most + TOLERANCE * size:
        raise ValueError(
            f"block_density: {block_density:.4g} keeps at most {most / size:.4f} of the weights, "
            f"but the sparsity asks for density "
            f"{target / size:.4f}; raise block_density or the sparsity"
        )
    best, best_error = dict[str, tuple[int, int]](), math.inf
    for name, count in _tap_choices(shapes, taps):
        trial = taps if name is None else {**taps, name: count}
        kept = _channel_counts(shapes, densities, trial, channel_blocks, target)
        error = abs(sum(kept[n] * trial[n] * shapes[n][3] for n in shapes) - target) / size
        if error < best_error:
            best, best_error = {n: (kept[n], trial[n]) for n in shapes}, error
        if best_error <= TOLERANCE:
            break
    if best_error > min(TOLERANCE, RELATIVE * target / size) + 1e-9:
        warnings.warn(
            f"sparsity: density {target / size:.4f} cannot be reached by whole blocks, the nearest "
            f"is off by {best_error:.4f}; "
            "use block_density=1, a smaller channel_block or more layers",
            stacklevel=2,
        )
    return best


def _tap_choices(shapes: Shapes, taps: Mapping[str, int]) -> list[tuple[str | None, int]]:
    """No change first, then one layer's tap count changed, the smallest changes first."""
    moves = [
        (name, t)
        for name, shape in shapes.items()
        for t in range(1, shape[0] * shape[1] + 1)
        if t != taps[name]
    ]
    return [(None, 0), *sorted(moves, key=lambda move: abs(move[1] - taps[move[0]]))]


def _channel_counts(
    shapes: Shapes,
    densities: Mapping[str, float],
    taps: Mapping[str, int],
    runs: Mapping[str, int],
    target: float,
) -> dict[str, int]:
    """Kept channels near each layer's target, moved by single runs while the total kept count comes
    closer to `target`.
    """
    step = {name: runs[name] * taps[name] * shape[3] for name, shape in shapes.items()}
    most = {name: shape[2] // runs[name] for name, shape in shapes.items()}
    ideal = {
        name: densities[name] * math.prod(shape) / step[name] for name, shape in shapes.items()
    }
    units = {name: min(max(round(ideal[name]), 1), most[name]) for name in shapes}
    error = sum(units[name] * step[name] for name in shapes) - target
    while True:
        move = 1 if error < 0 else -1
        open_ = [
            name
            for name in shapes
            if 1 <= units[name] + move <= most[name]
            and abs(error + move * step[name]) < abs(error) - 1e-6
        ]
        if not open_:
            return {name: units[name] * runs[name] for name in shapes}
        best = min(
            open_,
            key=lambda name: (
                abs(units[name] + move - ideal[name]) / ideal[name],
                abs(error + move * step[name]),
            ),
        )
        units[best] += move
        error += move * step[best]
