"""Puts the times of the kernels' benchmark into the table that `implementation=None` reads."""

import json
from pathlib import Path
from typing import Any

from experiments.bench.gpu import shapes
from experiments.measuring.row_names import PASS_NAMES
from pallas_kernels.block_sparse_conv import PASSES, ConvSpec, tuned_tables
from pallas_kernels.block_sparse_conv.choice import GPU_KERNELS
from pallas_kernels.devices import short_name

DENSE_FORMS = ("dense NHWC", "dense NCHW")


def write_layers(report: Path, folder: Path | None) -> Path:
    """Writes the layers of a report into its GPU's table; the table's other layers stay.

    Args:
      report: what `experiments.bench.kernels --device gpu` wrote.
      folder: of the tables; None is the one that the kernels read.

    Returns:
      The table.

    Raises:
      ValueError: a layer of the report is not what this version times under its name.
    """
    measured = json.loads(report.read_text())
    layers: dict[str, dict[str, Any]] = {}
    fields = dict(zip(PASS_NAMES, PASSES, strict=True))
    for row in measured["rows"]:
        if row["mode"] not in fields:
            continue
        about = {
            "name": f"{row['layer']} {row['sparsity']:.0%}",
            "milliseconds": {},
            **{name: row[name] for name in ("device", "versions", "commit")},
        }
        layer = layers.setdefault(tuned_tables.layer_key(_spec(row)), about)
        layer["milliseconds"][fields[row["mode"]]] = _medians(row["ms"])
    file = tuned_tables.path(short_name(measured["device"]), folder)
    tuned_tables.write_layers(file, layers)
    return file


def _medians(times: dict[str, dict[str, Any]]) -> dict[str, float]:
    """The median of each kernel, and of the faster one of cuDNN's formats."""
    dense = min(times[name]["median"] for name in DENSE_FORMS)
    kernels = {name: times[name]["median"] for name in GPU_KERNELS if name in times}
    return {tuned_tables.DENSE: dense, **kernels}


def _spec(row: dict[str, Any]) -> ConvSpec:
    """The convolution of a row; ValueError where its blocks are not the row's."""
    (case,) = (case for case in shapes.cases() if case.name == row["layer"])
    tile = row["tile"]
    spec = shapes.case_spec(
        case,
        sparsity=row["sparsity"],
        group_size=tile["group_size"],
        channel_block=tile["channel_block"],
        kept_taps=tile["kept_taps"],
        dtype=row["shape"]["dtype"],
    )
    blocks = {name: getattr(spec, name) for name in tile}
    if blocks != tile:
        raise ValueError(f"rows: {case.name} is now in blocks {blocks}, got {tile}; time it again")
    return spec
