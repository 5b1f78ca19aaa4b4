"""A journal of measurements: every finished unit is one line, so that a stopped run can continue.

`python -m experiments.bench.gpu.journal FILE...` marks as failed what was running when a process
crashed.
"""

import json
import math
import os
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

STOPPED = 75  # exit status: time is up; the same command continues
LOST = (
    70  # exit status: the device no longer answers, or a unit hung; the next call skips that unit
)
# What an error says when no other kernel can run in the same process.
FATAL = (
    "CUDA_ERROR",
    "illegal memory access",
    "launch failure",
    "misaligned address",
    "device-side",
)
MOST_LOST = 2  # units of a group that may hang, crash or lose the device; the others are skipped


class TimeUp(Exception):  # noqa: N818
    """No time is left for the next unit."""


class DeviceLost(Exception):  # noqa: N818
    """A kernel failed in such a way that no other can run in this process."""


class Journal:
    """A JSON-lines file of units of work: which began, finished or failed.

    A unit may run other units. The states of a line are "begun", "done" (with the result), "failed"
    (with the error) and "again" (as if it had not begun).

    Args:
      path: the file; it is created if it does not exist. A last line that was cut off is dropped.
      minutes: after so many minutes no further unit begins; None: no limit.
      unit_seconds: a unit that takes longer hangs: it counts as failed, and the process ends with
        the status `LOST`.

    Attributes:
      path: the file.
      records: the last line of each unit by its key, with the number of attempts as "begun".

    Example:
      >>> import tempfile
      >>> path = Path(tempfile.mkdtemp()) / "journal.jsonl"
      >>> Journal(path).run("a", lambda: 1), Journal(path).run("a", lambda: 2)
      (1, 1)
    """

    def __init__(self, path: str | Path, minutes: float | None = None, unit_seconds: float = 150):
        self.path = Path(path)
        self._unit_seconds = unit_seconds
        self._end = None if minutes is None else time.monotonic() + 60 * minutes
        self._longest_seconds: dict[str, float] = {}  # by kind of unit
        self._running: list[str] = []
        self.records: dict[str, dict[str, Any]] = {}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._read()

    def _read(self) -> None:
        lines = self.path.read_text().splitlines() if self.path.exists() else []
        for i, line in enumerate(lines):
            try:
                self._keep(json.loads(line))
            except json.JSONDecodeError:
                if i + 1 < len(lines):
                    raise ValueError(
                        f"{self.path}: line {i + 1} of {len(lines)} is no JSON; repair or delete it"
                    ) from None
                self.path.write_text("".join(f"{good}\n" for good in lines[:i]))

    def result(self, key: str) -> Any:
        """Returns the result of a finished unit; None if it did not finish."""
        return self.records.get(key, {}).get("result")

    def error(self, key: str) -> str | None:
        """Returns why a unit failed; None if it did not."""
        return self.records.get(key, {}).get("error")

    def has(self, key: str) -> bool:
        """Returns whether a unit finished or failed."""
        return self.records.get(key, {}).get("state") in ("done", "failed")

    def seconds_left(self) -> float:
        """Returns how many seconds are left; infinity without a limit."""
        return math.inf if self._end is None else self._end - time.monotonic()

    def run(
        self,
        key: str,
        function: Callable[[], Any],
        *,
        reserve: float = 0.0,
        limit: float | None = None,
        group: str = "",
    ) -> Any:
        """Runs a unit, unless it finished or failed before.

        A unit that was interrupted twice counts as failed.

        Args:
          key: its name; the first word is its kind.
          function: measures; returns what JSON can hold.
          reserve: seconds that must be left for it. If the longest unit of its kind took longer,
            that counts; after an interruption twice as many.
          limit: seconds after which it hangs; None: the limit of the journal.
          group: once two units of a group hung, crashed or lost the device, the others fail without
            being run.

        Returns:
          The result; None if the unit failed, now or before.

        Raises:
          TimeUp: too little time is left.
          DeviceLost: the unit failed, and no other can run in this process.
        """
        record = self.records.get(key, {})
        if self.has(key):
            return record.get("result")
        attempts = record.get("begun", 0)
        if attempts >= 2:
            self._fail(key, "interrupted twice: it hangs, or takes longer than a call", group)
            return None
        lost_units = self._lost_units(group)
        if len(lost_units) >= MOST_LOST:
            names = " and ".join(lost_units[:MOST_LOST])
            error = f"skipped: {names} hung, crashed or lost the device"
            self._fail(key, error, group, lost=False)
            return None
        needed = max(reserve, self._longest_seconds.get(_kind(key), 0.0)) * (1 + attempts)
        if self.seconds_left() < needed:
            raise TimeUp(key)
        return self._run_now(key, function, limit or self._unit_seconds, group)

    def _run_now(self, key: str, function: Callable[[], Any], seconds: float, group: str) -> Any:
        self._append({"key": key, "state": "begun", "group": group})
        self._running.append(key)
        start = time.monotonic()
        watch = threading.Timer(seconds, self._give_up, (key, seconds, group))
        watch.daemon = True
        watch.start()
        try:
            result = function()
        except (TimeUp, DeviceLost):  # of a unit inside this one
            self._append({"key": key, "state": "again"})
            raise
        except Exception as error:
            text = f"{type(error).__name__}: {error}"[:2000]
            lost = any(sign in text for sign in FATAL)
            self._fail(key, text, group, lost=lost)
            if lost:
                raise DeviceLost(key) from error
            return None
        finally:
            watch.cancel()
            self._running.remove(key)
        seconds = round(time.monotonic() - start, 2)
        self._append({"key": key, "state": "done", "seconds": seconds, "result": result})
        return result

    def _lost_units(self, group: str) -> list[str]:
        """The units of a group that hung, crashed or lost the device."""
        return [
            key
            for key, record in self.records.items()
            if group and record.get("group") == group and record.get("lost")
        ]

    def mark_crashed(self) -> list[str]:
        """Marks the innermost running unit as failed, and those around it as not begun.

        For the process that runs after a crash.

        Returns:
          The units that were marked as failed.
        """
        running = [key for key, record in self.records.items() if record["state"] == "begun"]
        for key in running[:-1]:
            self._append({"key": key, "state": "again"})
        for key in running[-1:]:
            self._fail(key, "the process crashed", self.records[key].get("group", ""))
        return running[-1:]

    def adopt(self, other: "Journal") -> None:
        """Takes over the units that finished or failed in another journal and are not in this one.

        Args:
          other: the journal of a process that worked for this one.

        Example:
          >>> import tempfile
          >>> mine, other = (Journal(Path(tempfile.mkdtemp()) / "j.jsonl") for _ in range(2))
          >>> _ = other.run("a", lambda: 1)
          >>> mine.adopt(other)
          >>> mine.result("a")
          1
        """
        for key, record in other.records.items():
            if other.has(key) and not self.has(key):
                self._append({name: value for name, value in record.items() if name != "begun"})

    def _fail(self, key: str, text: str, group: str, lost: bool = True) -> None:
        self._append({"key": key, "state": "failed", "error": text, "group": group, "lost": lost})
        print(f"FAILED {key}: {text}", file=sys.stderr, flush=True)

    def _give_up(self, key: str, seconds: float, group: str) -> None:
        """Ends the process, whose unit hangs."""
        for outer in self._running[: self._running.index(key)]:
            self._append({"key": outer, "state": "again"})
        self._fail(key, f"no result after {seconds:g} seconds", group)
        os._exit(LOST)

    def _append(self, record: dict[str, Any]) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps(record) + "\n")
            file.flush()
            os.fsync(file.fileno())
        self._keep(record)

    def _keep(self, record: dict[str, Any]) -> None:
        """Keeps a line as the last one of its unit, and counts the attempts."""
        key = record["key"]
        attempts = self.records.pop(key, {}).get("begun", 0) + (record["state"] == "begun")
        if record["state"] == "again":
            attempts = 0
        self.records[key] = record | {"begun": attempts}
        if "seconds" in record:
            longest = self._longest_seconds.get(_kind(key), 0.0)
            self._longest_seconds[_kind(key)] = max(longest, record["seconds"])


def _kind(key: str) -> str:
    return key.split()[0]


if __name__ == "__main__":
    for file in sys.argv[1:]:
        if Path(file).exists():
            for unit in Journal(file).mark_crashed():
                print(f"{file}: {unit} crashed")
