"""The measured times on a CPU: those of XLA's formulations and of the native kernels.

The tables hold layers of real networks, block-sparse ones in `TABLE` and whole kernels in `WHOLE`.
Any other shape is judged by its neighbours: a tuned shape at distance d (in log space, see
`features`) weighs `exp(-2 d^2)`, which also smooths the noise of single measurements.
"""

import functools
import json
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pallas_kernels.block_sparse_conv.spec import ConvSpec
from pallas_kernels.block_sparse_conv.tuned_tables import FOLDER

MODES = {"forward": False, "forward + gradients": True}
"""What is measured of each shape, and `ConvSpec.gradients` there."""
TABLE = FOLDER / "tuned_xla_cpu.json"
WHOLE = FOLDER / "tuned_whole_cpu.json"
NATIVE = "cpu"
"""The native kernels' name in the table; all other names are XLA's formulations."""
UNKNOWN_IMAGES = 16
"""Stands for a batch size that is not known yet, as in `jax.export` of a symbolic batch."""


@functools.cache
def read(table: Path = TABLE) -> dict[str, Any]:
    """A table.

    Args:
      table: its file.

    Returns:
      `{"environment": where it was measured, "entries": [{"name", "features", "milliseconds"}]}`;
      the milliseconds are `{mode or pass: {formulation: median}}`.

    Example:
      >>> read()["environment"]["device"]
      'cpu'
    """
    return json.loads(table.read_text())


def mode(spec: ConvSpec) -> str:
    """The measured mode that is a spec's.

    Args:
      spec: the static sizes, and whether the gradients follow.

    Returns:
      A key of `MODES`.
    """
    return "forward + gradients" if spec.gradients else "forward"


def formulations(milliseconds: dict[str, float]) -> dict[str, float]:
    """The times of XLA's formulations.

    Args:
      milliseconds: all times of one shape, by name.

    Returns:
      Those without the native kernels'.

    Example:
      >>> formulations({"rows": 2.0, "cpu": 1.0})
      {'rows': 2.0}
    """
    return {name: ms for name, ms in milliseconds.items() if name != NATIVE}


def weights(spec: ConvSpec, table: Path = TABLE) -> list[float]:
    """How much each shape of a table counts for a spec.

    Args:
      spec: the static sizes.
      table: its file.

    Returns:
      One weight for each entry of the table, in its order; the nearest has weight 1.
    """
    point = features(spec)
    squared = [math.dist(point, entry["features"]) ** 2 for entry in read(table)["entries"]]
    nearest = min(squared)
    return [math.exp(2 * (nearest - distance)) for distance in squared]


def losses(times: Sequence[Mapping[str, float]], weights: Sequence[float]) -> dict[str, float]:
    """How much slower than the best each formulation was, over the shapes of a table.

    Args:
      times: milliseconds by formulation, for each shape; not every formulation runs every shape.
      weights: how much each shape counts.

    Returns:
      The weighted mean of `log(time / best time)`, by formulation.

    Example:
      >>> losses([{"rows": 1.0, "taps": 2.0}, {"rows": 1.0}], [0.5, 0.5])
      {'rows': 0.0, 'taps': 0.6931471805599453}
    """
    loss = defaultdict[str, float](float)
    total_weight = defaultdict[str, float](float)
    for milliseconds, weight in zip(times, weights, strict=True):
        best = min(milliseconds.values())
        for name in milliseconds:
            loss[name] += weight * math.log(milliseconds[name] / best)
            total_weight[name] += weight
    return {name: loss[name] / total for name, total in total_weight.items() if total > 0}


def features(spec: ConvSpec) -> list[float]:
    """What the times depend on, in log2.

    These are pixels, images, channels, groups, the sides of the packed block, and strides.

    Args:
      spec: the static sizes.

    Returns:
      A point; its distance to a tuned point says how alike two convolutions are.

    Example:
      >>> spec = ConvSpec(cin=8, height=4, width=4, batch=2, kernel=(1, 1), cout=8, groups=2,
      ...                 kept=4, kept_taps=1, group_size=4)
      >>> features(spec)
      [4.0, 1.0, 3.0, 1.0, 2.0, 0.0, 2.0, 0.0]
    """
    sizes = (
        spec.out_height * spec.out_width,
        spec.batch if spec.has_known_batch else UNKNOWN_IMAGES,
        spec.cin,
        spec.groups,
        max(1, spec.kept),
        max(1, spec.kept_taps),
        spec.group_size,
        math.prod(spec.strides),
    )
    return [round(math.log2(size), 3) for size in sizes]
