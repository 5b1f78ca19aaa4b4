"""Small text files that a stop at any moment leaves whole: the old one or the new one."""

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Puts a path into the OSErrors of a block; those of a write, on a full disk, name none."""
    try:
        yield
    except OSError as error:
        if error.errno is None or error.filename is not None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error


def replace_text(path: Path, text: str) -> None:
    """Writes a file in one step.

    Args:
      path: of the file.
      text: its new contents.
    """
    part = path.with_name(path.name + ".part")
    with naming(path), open(part, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)


def write_json(path: Path, value: Any) -> None:
    """Writes a value as JSON, in one step."""
    replace_text(path, json.dumps(value, indent=2) + "\n")


def read_json_map(path: Path, fix: str) -> dict[str, Any]:
    """Reads a JSON file that holds a map.

    Args:
      path: of the file.
      fix: what to do about a file that is not what was written.

    Returns:
      The map.

    Raises:
      ValueError: the file is missing, is not JSON or holds something else.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise ValueError(f"{path}: missing, so {path.parent} is not the folder of a run") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not JSON ({error}); {fix}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path}: expected a map of fields, got {type(value).__name__}; {fix}")
    return value
