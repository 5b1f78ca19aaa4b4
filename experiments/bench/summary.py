"""What a benchmark of many shapes comes to: geometric means, the worst, the best, and the shapes
that lose.
"""

import statistics
from typing import Any

AGAINST = {
    "speed_up_over_dense": "dense",
    "speed_up_over_convolution": "XLA's convolution",
    "speed_up_over_torch": "PyTorch dense",
}


def summary(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One line for each baseline, sparsity and mode.

    Args:
      rows: with "layer", "sparsity", "mode" and the speed-ups of `AGAINST`; a baseline that was not
        measured has no line.

    Returns:
      Lines with the number of shapes, the geometric mean, the worst and the best layer, and the
      names of those below 1.

    Example:
      >>> row = {"layer": "a", "sparsity": 0.9, "mode": "forward", "speed_up_over_dense": 2.0}
      >>> [line] = summary([row, row | {"layer": "b", "speed_up_over_dense": 0.5}])
      >>> line["geometric_mean"], line["slower"]
      (1.0, ['b'])
    """
    lines = []
    for key, against in AGAINST.items():
        for sparsity, mode in dict.fromkeys(
            (row["sparsity"], row["mode"]) for row in rows if key in row
        ):
            ups = {
                row["layer"]: row[key]
                for row in rows
                if (row["sparsity"], row["mode"]) == (sparsity, mode)
            }
            worst, best = (
                {"layer": layer, "speed_up": ups[layer]}
                for layer in (min(ups, key=ups.__getitem__), max(ups, key=ups.__getitem__))
            )
            lines.append(
                {
                    "against": against,
                    "sparsity": sparsity,
                    "mode": mode,
                    "shapes": len(ups),
                    "geometric_mean": round(statistics.geometric_mean(ups.values()), 3),
                    "worst": worst,
                    "best": best,
                    "slower": [layer for layer, up in ups.items() if up < 1],
                }
            )
    return lines
