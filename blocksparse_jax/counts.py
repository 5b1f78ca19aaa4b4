"""Whole counts: how many sets of weights each layer keeps to come closest to a density."""

import math
import warnings
from collections.abc import Mapping
from typing import NamedTuple

from blocksparse_jax.erk import Shapes
from blocksparse_jax.kernels import kernels

TOLERANCE = 0.005  # half a percentage point: |density - target|, both as fractions of all weights
RELATIVE = 0.05  # of the target itself: a larger error is worth a warning
BLOCK_DENSITY = 1 / 3  # of the taps, where none is asked for and it can hold a layer's density


class Units(NamedTuple):
    """How a pattern divides one kernel.

    Attributes:
      rows: rows that each keep the same number of sets.
      sets: sets in a row.
      weights: weights in a set.
    """

    rows: int
    sets: int
    weights: int


class BlockCount(NamedTuple):
    """What each group of an HRBP layer keeps.

    Attributes:
      kept: input channels.
      kept_taps: kernel positions.
    """

    kept: int
    kept_taps: int


def weight_counts(densities: Mapping[str, float], shapes: Shapes) -> dict[str, int]:
    """Gives each layer `round(density * size)` weights, at least 1; of stacked kernels, each one.

    Args:
      densities: layer name -> density.
      shapes: layer name -> parameter shape.

    Returns:
      Layer name -> kept weights.

    Example:
      >>> weight_counts({"a": 0.1}, {"a": (3, 3, 4, 4)})
      {'a': 14}
    """
    return {name: max(1, round(densities[name] * math.prod(shapes[name][-4:]))) for name in shapes}


def set_counts(densities: Mapping[str, float], units: Mapping[str, Units]) -> dict[str, int]:
    """Gives each layer the number of sets in a row whose total density comes closest to the target.

    Every layer starts at the nearest number, at least 1; then layers move by one set in each row,
    the cheapest move first, while the total comes closer. A layer whose rows have one set only
    (a window of a 1x1 kernel) stays dense, and the others do not make up for it. A warning gives
    the density reached where it is off by more than half a percentage point of all weights or by
    5% of the target.

    Args:
      densities: layer name -> density.
      units: layer name -> how the pattern divides it.

    Returns:
      Layer name -> kept sets of each row.

    Example:
      >>> set_counts({"a": 1 / 3}, {"a": Units(rows=4, sets=9, weights=1)})
      {'a': 3}
    """
    step = {name: unit.rows * unit.weights for name, unit in units.items()}
    most = {name: unit.sets for name, unit in units.items()}
    ideal = {name: densities[name] * most[name] for name in units}
    reachable = sum(min(max(ideal[name], 1), most[name]) * step[name] for name in units)
    counts = _move_towards(reachable, ideal, step, most)
    size = sum(step[name] * most[name] for name in units)
    target = sum(ideal[name] * step[name] for name in units)
    error = abs(sum(counts[name] * step[name] for name in units) - target) / size
    warn_if_off(error, target / size, "whole sets", "another pattern or more layers")
    return counts


def block_counts(
    shapes: Shapes,
    densities: Mapping[str, float],
    *,
    block_density: float | None,
    channel_blocks: Mapping[str, int],
) -> dict[str, BlockCount]:
    """Gives each layer the kept channels and taps whose total density comes closest to the target.

    A layer keeps `ceil(block_density * kh * kw)` taps and the nearest number of channels, at least
    one run. Without a `block_density` that is 1/3, and in a layer whose density is above it as few
    taps as hold that density, of which a warning tells. Then layers move by one run of channels at
    a time, the cheapest move first, while the total comes closer. Where that does not reach half a
    percentage point of all weights (very few, narrow layers), the number of taps of a layer moves
    too; where nothing reaches it, or where the density is off by more than 5% of the target itself
    (targets below 0.1), a warning gives the density reached.

    Args:
      shapes: layer name -> parameter shape, of a leaf that holds kernels.
      densities: layer name -> target density.
      block_density: fraction of the taps that a block keeps, in (0, 1]; None = 1/3, more where a
        layer's density needs it.
      channel_blocks: layer name -> channels come in runs of this many.

    Returns:
      Layer name -> `BlockCount(kept, kept_taps)`.

    Raises:
      ValueError: with all channels kept, `block_density` is still below the target.

    Example:
      >>> shapes, runs = {"a": (3, 3, 64, 64)}, {"a": 1}
      >>> block_counts(shapes, {"a": 0.1}, block_density=1 / 3, channel_blocks=runs)
      {'a': BlockCount(kept=19, kept_taps=3)}

    Reference: block density ratio of Ma et al., "HRBP", CPAL 2024.
    """
    target = sum(densities[name] * math.prod(shape) for name, shape in shapes.items())
    size = sum(math.prod(shape) for shape in shapes.values())
    columns = {name: _columns(shape) for name, shape in shapes.items()}
    fraction = BLOCK_DENSITY if block_density is None else block_density
    taps = {
        name: max(1, math.ceil(fraction * column.taps - 1e-9)) for name, column in columns.items()
    }
    if block_density is None:
        taps |= _more_taps(columns, densities, taps)
    most = sum(taps[name] * column.cin * column.filters for name, column in columns.items())
    if target > most + TOLERANCE * size:
        raise ValueError(
            f"block_density: {fraction:.4g} keeps at most {most / size:.4f} of the weights, "
            f"but the sparsity asks for density {target / size:.4f}; raise block_density or the "
            "sparsity"
        )
    best = dict[str, BlockCount]()
    best_error = math.inf
    for name, count in _tap_choices(columns, taps):
        trial = taps if name is None else {**taps, name: count}
        kept = _channel_counts(columns, densities, trial, channel_blocks, target)
        error = abs(sum(kept[n] * trial[n] * columns[n].filters for n in shapes) - target) / size
        if error < best_error:
            best = {n: BlockCount(kept[n], trial[n]) for n in shapes}
            best_error = error
        if best_error <= TOLERANCE:
            break
    fix = "block_density=1, a smaller channel_block or more layers"
    warn_if_off(best_error, target / size, "whole blocks", fix)
    return best


def _more_taps(
    columns: Mapping[str, "_Columns"], densities: Mapping[str, float], taps: Mapping[str, int]
) -> dict[str, int]:
    """Taps of the layers whose density is above what `taps` hold; a warning tells of them."""
    more = {
        name: math.ceil(densities[name] * column.taps - 1e-9)
        for name, column in columns.items()
        if densities[name] > taps[name] / column.taps + TOLERANCE
    }
    if more:
        name = next(iter(more))
        others = (
            f", and {len(more) - 1} more layers more than 1/3 of theirs" if len(more) > 1 else ""
        )
        warnings.warn(
            f"block_density: 1/3 of the taps cannot hold density {densities[name]:.4f} at "
            f"{name!r}, which keeps {more[name]} of {columns[name].taps} taps{others}; pass "
            "block_density to choose yourself",
            stacklevel=4,
        )
    return more


def warn_if_off(error: float, target: float, what: str, fix: str) -> None:
    """Warns where the density reached differs from the target by more than the tolerance."""
    if error > min(TOLERANCE, RELATIVE * target) + 1e-9:
        warnings.warn(
            f"sparsity: density {target:.4f} cannot be reached by {what}, the nearest is off by "
            f"{error:.4f}; use {fix}",
            stacklevel=3,
        )


class _Columns(NamedTuple):
    """The sizes of a layer's kernels.

    Attributes:
      taps: kernel positions.
      cin: input channels.
      filters: of all stacked kernels together.
    """

    taps: int
    cin: int
    filters: int


def _columns(shape: tuple[int, ...]) -> _Columns:
    of = kernels("shapes", shape)
    kh, kw, cin, cout = of.conv_shape
    return _Columns(kh * kw, cin, of.count * cout)


def _tap_choices(
    columns: Mapping[str, _Columns], taps: Mapping[str, int]
) -> list[tuple[str | None, int]]:
    """No change first, then one layer's tap count changed, the smallest changes first."""
    moves = [
        (name, t)
        for name, column in columns.items()
        for t in range(1, column.taps + 1)
        if t != taps[name]
    ]
    return [(None, 0), *sorted(moves, key=lambda move: abs(move[1] - taps[move[0]]))]


def _channel_counts(
    columns: Mapping[str, _Columns],
    densities: Mapping[str, float],
    taps: Mapping[str, int],
    runs: Mapping[str, int],
    target: float,
) -> dict[str, int]:
    """Kept channels of each layer, in whole runs."""
    step = {name: runs[name] * taps[name] * column.filters for name, column in columns.items()}
    most = {name: column.cin // runs[name] for name, column in columns.items()}
    ideal = {
        name: densities[name] * math.prod(column) / step[name] for name, column in columns.items()
    }
    counts = _move_towards(target, ideal, step, most)
    return {name: counts[name] * runs[name] for name in columns}


def _move_towards(
    target: float,
    ideal: Mapping[str, float],
    step: Mapping[str, int],
    most: Mapping[str, int],
) -> dict[str, int]:
    """Whole numbers near the ideal ones, moved by single steps while the total approaches `target`.

    `step` is the number of weights by which the total changes when a layer's count moves by one.
    """
    counts = {name: min(max(round(ideal[name]), 1), most[name]) for name in ideal}
    error = sum(counts[name] * step[name] for name in ideal) - target
    while True:
        move = 1 if error < 0 else -1
        movable = [
            name
            for name in ideal
            if 1 <= counts[name] + move <= most[name]
            and abs(error + move * step[name]) < abs(error) - 1e-6
        ]
        if not movable:
            return counts
        cheapest = min(
            movable,
            key=lambda name: (
                abs(counts[name] + move - ideal[name]) / ideal[name],
                abs(error + move * step[name]),
            ),
        )
        counts[cheapest] += move
        error += move * step[cheapest]
