"""The rows of a GPU report: the three passes of a layer, and their sum.

"forward + gradients" is the sum of the three medians. What the passes of the block-sparse kernels
share in one program (the gathered dy, the lists) is counted twice in it.
"""

from typing import Any

from experiments.bench.dense_forms import COMMON_DENSE
from experiments.measuring.row_names import CHOSEN, MASKED, PASS_NAMES, TOGETHER

Times = dict[str, dict[str, Any]]  # pass -> time record


def rows(
    about: dict[str, Any], dense: dict[str, Any], sparse: dict[str, dict[str, Any]]
) -> list[dict[str, Any]]:
    """Returns the rows of one layer and sparsity, in the form of the CPU report.

    "chosen" is the kernel with the least sum of the passes, as long as `implementation=None` picks
    no GPU kernel. "runs" is what should run the pass: the fastest kernel, or dense if that is
    faster still (without the transpositions that it may need in a network).

    Args:
      about: goes into each row.
      dense: of `measure_dense`.
      sparse: results of `measure_sparse` by name of the implementation.

    Returns:
      Rows; none if nothing block-sparse was timed.
    """
    timed = {name: result["ms"] for name, result in sparse.items() if "ms" in result}
    if not timed:
        return []
    times: dict[str, Times] = {
        name: {**passes, TOGETHER: _sum(passes)} for name, passes in (dense["ms"] | timed).items()
    }
    chosen = min(timed, key=lambda name: times[name][TOGETHER]["median"])
    times[CHOSEN] = times[chosen]
    shared = {
        "chosen": chosen,
        "l2": {name: r["l2"] for name, r in {"dense": dense, **sparse}.items() if "l2" in r},
        "refused": {name: r["refused"] for name, r in sparse.items() if "refused" in r},
    }
    report_rows = []
    for mode in (*PASS_NAMES, TOGETHER):
        ms = {name: passes[mode] for name, passes in times.items()}
        used_tiles = {name: r["tiles"].get(mode) for name, r in sparse.items() if r.get("tiles")}
        row = about | {"mode": mode, "ms": ms} | _comparison(ms, list(timed)) | shared
        report_rows.append(row | {"tiles": used_tiles, "sum_of_passes": mode == TOGETHER})
    return report_rows


def _comparison(ms: Times, implementations: list[str]) -> dict[str, Any]:
    """The fastest kernel, the fastest dense convolution, and the chosen kernel's speed-ups."""
    median = {name: record["median"] for name, record in ms.items()}
    best = min(implementations, key=median.__getitem__)
    best_dense = min(COMMON_DENSE, key=median.__getitem__)
    return {
        "best": best,
        "best_dense": best_dense,
        "regret": round(median[CHOSEN] / median[best] - 1, 3),
        "runs": best if median[best] < median[best_dense] else "dense",
        "speed_up_over_dense": round(median[best_dense] / median[CHOSEN], 3),
        "speed_up_over_masked": round(median[MASKED] / median[CHOSEN], 3),
    }


def _sum(passes: Times) -> dict[str, Any]:
    records = [passes[name] for name in PASS_NAMES]
    return {
        "median": round(sum(record["median"] for record in records), 6),
        "iqr": round(sum(record["iqr"] for record in records), 6),
        "repetitions": min(record["repetitions"] for record in records),
    }
