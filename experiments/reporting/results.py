"""The JSON reports that the benchmarks write and the tables read."""

import dataclasses
import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "experiments" / "results"
_PATHS = ("folder", "journal", "out", "table", "torch")  # settings that are paths on this machine


def settings(config: Any) -> dict[str, Any]:
    """Returns the fields of a benchmark's config that its report holds: all but paths.

    Args:
      config: a dataclass.

    Returns:
      Values by field name.
    """
    return {name: value for name, value in dataclasses.asdict(config).items() if name not in _PATHS}


def names(results: Path = RESULTS) -> list[str]:
    """Returns the names of the reports in a folder, without their endings."""
    return sorted(path.stem for path in results.glob("*.json"))


def read(name: str, results: Path = RESULTS) -> dict[str, Any]:
    """Reads the report `results/NAME.json`.

    Args:
      name: of the file, without its ending.
      results: the folder.

    Returns:
      The report.

    Raises:
      ValueError: there is no such file; the message lists those that are there.
    """
    path = results / f"{name}.json"
    if not path.exists():
        raise ValueError(
            f"results: expected the name of a file in {results.name} without its ending, got "
            f"{name!r}; there: {', '.join(names(results)) or 'none'}"
        )
    return json.loads(path.read_text())


def write(report: dict[str, Any], path: str | Path) -> None:
    """Writes a report as JSON and makes its folder.

    Args:
      report: what JSON can hold.
      path: of the file.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=1) + "\n")
