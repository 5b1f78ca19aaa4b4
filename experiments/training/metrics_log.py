"""metrics.jsonl: the rows of a run, one JSON map a line."""

import json
from pathlib import Path
from typing import Any

from experiments.training.files import naming, replace_text


def append(path: Path, row: dict[str, Any]) -> None:
    """Adds one row.

    Args:
      path: of the file.
      row: JSON values, with `kind` and `step`.
    """
    with naming(path), open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


def read(path: Path) -> list[dict[str, Any]]:
    """Reads the rows.

    Args:
      path: of the file; one that does not exist has no rows.

    Returns:
      Rows in order; a last line that a stop cut short is left out.

    Raises:
      ValueError: any other line is not a row.
    """
    *lines, last = path.read_bytes().split(b"\n") if path.exists() else [b""]
    rows = [_row(path, number, line) for number, line in enumerate(lines, 1)]
    try:
        return [*rows, _row(path, len(lines) + 1, last)]
    except ValueError:  # empty, or cut short
        return rows


def _row(path: Path, number: int, line: bytes) -> dict[str, Any]:
    fix = "delete that line, or restore the file"
    try:
        row = json.loads(line)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: line {number} is not JSON ({error}); {fix}") from error
    if not isinstance(row, dict) or "kind" not in row or not isinstance(row.get("step"), int):
        raise ValueError(f"{path}: line {number} is not a row with kind and step; {fix}")
    return row


def rewind(path: Path, step: int) -> None:
    """Drops the rows after a step, which a resumed run will write again.

    Args:
      path: of the file.
      step: the last step to keep.
    """
    rows = [row for row in read(path) if row["step"] <= step]
    replace_text(path, "".join(json.dumps(row) + "\n" for row in rows))


def first_missing(
    rows: list[dict[str, Any]], step: int, log_every: int, steps_per_epoch: int
) -> int | None:
    """The first step whose row is missing.

    Args:
      rows: of the file.
      step: steps done.
      log_every: steps between two rows of a logging window.
      steps_per_epoch: steps between two rows of an epoch.

    Returns:
      A step, or None where all rows up to `step` are there.

    Example:
      >>> first_missing([{"kind": "train", "step": 2}], 5, log_every=2, steps_per_epoch=10)
      4
    """
    there = {(row["kind"], row["step"]) for row in rows}
    every = {"train": log_every, "epoch": steps_per_epoch}
    expected = {(kind, at) for kind, n in every.items() for at in range(n, step + 1, n)}
    return min((at for _, at in expected - there), default=None)
