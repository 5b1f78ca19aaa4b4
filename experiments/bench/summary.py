"""What a benchmark of many layers comes to: geometric means, the worst, the best and the losers."""

import statistics
from typing import Any

BASELINES = {
    "speed_up_over_dense": "dense",
    "speed_up_over_convolution": "XLA's convolution",
    "speed_up_over_torch": "PyTorch dense",
}


def summary(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns one line for each baseline, sparsity and mode.

    Args:
      rows: with "layer", "sparsity", "mode" and the speed-ups of `BASELINES`; a baseline that was
        not measured has no line.

    Returns:
      Lines with the number of layers, the geometric mean of the speed-ups, the worst and the best
      layer, and the names of the layers below 1.

    Example:
      >>> row = {"layer": "a", "sparsity": 0.9, "mode": "forward", "speed_up_over_dense": 2.0}
      >>> [line] = summary([row, row | {"layer": "b", "speed_up_over_dense": 0.5}])
      >>> line["geometric_mean"], line["slower"]
      (1.0, ['b'])
    """
    lines = []
    for key, baseline in BASELINES.items():
        speed_ups: dict[tuple[float, str], dict[str, float]] = {}
        for row in rows:
            if key in row:
                by_layer = speed_ups.setdefault((row["sparsity"], row["mode"]), {})
                by_layer[row["layer"]] = row[key]
        for (sparsity, mode), by_layer in speed_ups.items():
            worst = min(by_layer, key=by_layer.__getitem__)
            best = max(by_layer, key=by_layer.__getitem__)
            lines.append(
                {
                    "against": baseline,
                    "sparsity": sparsity,
                    "mode": mode,
                    "shapes": len(by_layer),
                    "geometric_mean": round(statistics.geometric_mean(by_layer.values()), 3),
                    "worst": {"layer": worst, "speed_up": by_layer[worst]},
                    "best": {"layer": best, "speed_up": by_layer[best]},
                    "slower": [layer for layer, speed_up in by_layer.items() if speed_up < 1],
                }
            )
    return lines
