"""A journal of measurements: each finished unit is a line at once, so that a stopped run goes on where it was."""

import hashlib
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

STOPPED = 75  # exit status: time is up, the next call goes on
LOST = 70  # exit status: the device does not answer any more, or a unit hung; the next call leaves that unit out and goes on
FATAL = ("CUDA_ERROR", "illegal memory access", "launch failure", "misaligned address", "device-side")  # what spoils the whole process


class TimeUp(Exception):  # noqa: N818
    """No time is left for the next unit."""


class DeviceLost(Exception):  # noqa: N818
    """A kernel failed in a way that spoils what this process does next."""


class Journal:
    """A JSON-lines file of units: what began, what finished, what failed.

    Args:
      path: the file; made where it is absent. A last line that was cut off is dropped.
      minutes: from now on until no further unit begins; None: no limit.
      unit_seconds: a unit that takes longer hangs: it is booked as failed, and the process ends with status `LOST`.

    Attributes:
      records: key -> its last line; each has "key" and "state", and with the state "done" the "result", with "failed" the "error".

    Example:
      >>> import tempfile
      >>> path = Path(tempfile.mkdtemp()) / "journal.jsonl"
      >>> Journal(path).run("a", lambda: 1), Journal(path).run("a", lambda: 2)
      (1, 1)

    Reference: ours.
    """

    def __init__(self, path: str | Path, minutes: float | None = None, unit_seconds: float = 150):
        self._path, self._unit_seconds = Path(path), unit_seconds
        self._end = None if minutes is None else time.monotonic() + 60 * minutes
        self._longest = 0.0
        self.records: dict[str, dict[str, Any]] = {}
        self._path.parent.mkdir(parents=True, exist_ok=True)
        lines = self._path.read_text().splitlines() if self._path.exists() else []
        for i, line in enumerate(lines):
            try:
                self._book(json.loads(line))
            except json.JSONDecodeError:
                if i + 1 < len(lines):
                    raise ValueError(f"{path}: line {i + 1} of {len(lines)} is no JSON; mend or remove it") from None
                self._path.write_text("".join(f"{good}\n" for good in lines[:i]))

    def result(self, key: str) -> Any:
        """What a finished unit measured.

        Args:
          key: of the unit.

        Returns:
          Its result; None where it did not finish.

        Reference: ours.
        """
        return self.records.get(key, {}).get("result")

    def error(self, key: str) -> str | None:
        """Why a unit failed.

        Args:
          key: of the unit.

        Returns:
          The error; None where it did not fail.

        Reference: ours.
        """
        return self.records.get(key, {}).get("error")

    def run(self, key: str, function: Callable[[], Any]) -> Any:
        """Runs a unit, unless it finished or failed before; a unit that was cut off twice counts as failed.

        Args:
          key: its name.
          function: measures; returns what JSON can hold.

        Returns:
          The result; None where the unit failed, now or before.

        Raises:
          TimeUp: too little time is left for a unit as long as the longest so far.
          DeviceLost: the unit failed, and no other can run in this process.

        Reference: ours.
        """
        record = self.records.get(key, {})
        if record.get("state") in ("done", "failed"):
            return record.get("result")
        if record.get("begun", 0) >= 2:
            self._append({"key": key, "state": "failed", "error": "cut off twice: it hangs, or takes longer than a call"})
            return None
        if self._end is not None and time.monotonic() + self._longest > self._end:
            raise TimeUp(key)
        self._append({"key": key, "state": "begun"})
        start = time.monotonic()
        watch = threading.Timer(self._unit_seconds, self._give_up, (key,))
        watch.daemon = True
        watch.start()
        try:
            result = function()
        except Exception as error:
            text = f"{type(error).__name__}: {error}"[:2000]
            watch.cancel()
            self._append({"key": key, "state": "failed", "error": text})
            print(f"FAILED {key}: {text}", file=sys.stderr, flush=True)
            if any(sign in text for sign in FATAL):
                raise DeviceLost(key) from error
            return None
        finally:
            watch.cancel()
        seconds = time.monotonic() - start
        self._longest = max(self._longest, seconds)
        self._append({"key": key, "state": "done", "seconds": round(seconds, 2), "result": result})
        return result

    def _give_up(self, key: str) -> None:
        self._append({"key": key, "state": "failed", "error": f"no result after {self._unit_seconds:g} seconds"})
        print(f"FAILED {key}: no result after {self._unit_seconds:g} seconds", file=sys.stderr, flush=True)
        os._exit(LOST)

    def _append(self, record: dict[str, Any]) -> None:
        with self._path.open("a") as file:
            file.write(json.dumps(record) + "\n")
            file.flush()
            os.fsync(file.fileno())
        self._book(record)

    def _book(self, record: dict[str, Any]) -> None:
        begun = self.records.get(record["key"], {}).get("begun", 0) + (record["state"] == "begun")
        self.records[record["key"]] = record | {"begun": begun}


def fingerprint(paths: Iterable[Path]) -> str:
    """A short name for the contents of files: units of other contents are measured anew.

    Args:
      paths: of the files; those that are absent count as such.

    Returns:
      Eight hexadecimal digits.

    Example:
      >>> len(fingerprint([Path(__file__)]))
      8

    Reference: ours.
    """
    digest = hashlib.sha256()
    for path in sorted(paths):
        digest.update(path.name.encode() + b"\0" + (path.read_bytes() if path.is_file() else b"") + b"\0")
    return digest.hexdigest()[:8]
