"""A journal of measurements: each finished unit is a line at once, so that a stopped run goes on
where it was.

`python -m experiments.bench.gpu.journal FILE...` books as failed what was under way when a process
crashed.
"""

import hashlib
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

STOPPED = 75  # exit status: time is up, the next call goes on
# exit status: the device does not answer any more, or a unit hung; the next call leaves that unit
# out and goes on
LOST = 70
FATAL = (
    "CUDA_ERROR",
    "illegal memory access",
    "launch failure",
    "misaligned address",
    "device-side",
)  # what spoils the whole process
MOST_LOST = 2  # units of a group that may hang, crash or lose the device; the rest is left out


class TimeUp(Exception):  # noqa: N818
    """No time is left for the next unit."""


class DeviceLost(Exception):  # noqa: N818
    """A kernel failed in a way that spoils what this process does next."""


def exit_status(work: Callable[[], Mapping[str, Any]]) -> int:
    """Runs a command, says in one line what stopped it, and tells the shell.

    Args:
      work: returns a report: "complete" says whether all is done, "failed" holds what failed.

    Returns:
      0, 1 when something failed or a result was wrong, 2 for a wrong argument, `LOST`, or `STOPPED`
      when time was up.

    Example:
      >>> exit_status(lambda: {"complete": True, "failed": []}), exit_status(lambda: {"complete": False, "failed": []})
      (0, 75)
    """
    try:
        report = work()
    except (ValueError, AssertionError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, ValueError) else 1
    except DeviceLost as unit:
        print(f"the device is lost at {unit}; the same command goes on behind it", file=sys.stderr)
        return LOST
    if not report["complete"]:
        return STOPPED
    return 1 if report["failed"] else 0


class Journal:
    """A JSON-lines file of units: what began, what finished, what failed. Units may run inside
    units.

    Args:
      path: the file; made where it is absent. A last line that was cut off is dropped.
      minutes: from now on until no further unit begins; None: no limit.
      unit_seconds: a unit that takes longer hangs: it is booked as failed, and the process ends
        with status `LOST`.

    Attributes:
      records: key -> its last line; each has "key" and "state", and with the state "done" the
        "result", with "failed" the "error".

    Example:
      >>> import tempfile
      >>> path = Path(tempfile.mkdtemp()) / "journal.jsonl"
      >>> Journal(path).run("a", lambda: 1), Journal(path).run("a", lambda: 2)
      (1, 1)
    """

    def __init__(self, path: str | Path, minutes: float | None = None, unit_seconds: float = 150):
        self._path, self._unit_seconds = Path(path), unit_seconds
        self._end = None if minutes is None else time.monotonic() + 60 * minutes
        self._longest: dict[str, float] = {}
        self._open: list[str] = []
        self.records: dict[str, dict[str, Any]] = {}
        self._path.parent.mkdir(parents=True, exist_ok=True)
        lines = self._path.read_text().splitlines() if self._path.exists() else []
        for i, line in enumerate(lines):
            try:
                self._book(json.loads(line))
            except json.JSONDecodeError:
                if i + 1 < len(lines):
                    raise ValueError(
                        f"{path}: line {i + 1} of {len(lines)} is no JSON; mend or remove it"
                    ) from None
                self._path.write_text("".join(f"{good}\n" for good in lines[:i]))

    def result(self, key: str) -> Any:
        """What a finished unit measured.

        Args:
          key: of the unit.

        Returns:
          Its result; None where it did not finish.
        """
        return self.records.get(key, {}).get("result")

    def error(self, key: str) -> str | None:
        """Why a unit failed.

        Args:
          key: of the unit.

        Returns:
          The error; None where it did not fail.
        """
        return self.records.get(key, {}).get("error")

    def run(
        self,
        key: str,
        function: Callable[[], Any],
        *,
        reserve: float = 0.0,
        limit: float | None = None,
        group: str = "",
    ) -> Any:
        """Runs a unit, unless it finished or failed before; a unit that was cut off twice counts as
        failed.

        Args:
          key: its name; the first word is its kind.
          function: measures; returns what JSON can hold.
          reserve: seconds that must be left for it, or as many as the longest of its kind took;
            after it was cut off, twice as many.
          limit: seconds after which it hangs; None: those of the journal.
          group: where two units of a group hung, crashed or lost the device, the others fail
            without being run.

        Returns:
          The result; None where the unit failed, now or before.

        Raises:
          TimeUp: too little time is left.
          DeviceLost: the unit failed, and no other can run in this process.
        """
        record, seconds = self.records.get(key, {}), limit or self._unit_seconds
        if record.get("state") in ("done", "failed"):
            return record.get("result")
        begun = record.get("begun", 0)
        if begun >= 2:
            return self._fail(key, "cut off twice: it hangs, or takes longer than a call", group)
        lost = [
            other
            for other, one in self.records.items()
            if group and one.get("group") == group and one.get("lost")
        ]
        if len(lost) >= MOST_LOST:
            return self._fail(
                key,
                f"left out: {' and '.join(lost[:MOST_LOST])} hung, crashed or lost the device",
                group,
                lost=False,
            )
        needed = max(reserve, self._longest.get(key.split()[0], 0.0)) * (1 + begun)
        if self._end is not None and time.monotonic() + needed > self._end:
            raise TimeUp(key)
        self._append({"key": key, "state": "begun", "group": group})
        self._open.append(key)
        start = time.monotonic()
        watch = threading.Timer(seconds, self._give_up, (key, seconds, group))
        watch.daemon = True
        watch.start()
        try:
            result = function()
        except (TimeUp, DeviceLost):  # of a unit inside
            self._append({"key": key, "state": "again"})
            raise
        except Exception as error:
            text = f"{type(error).__name__}: {error}"[:2000]
            lost_now = any(sign in text for sign in FATAL)
            self._fail(key, text, group, lost=lost_now)
            if lost_now:
                raise DeviceLost(key) from error
            return None
        finally:
            watch.cancel()
            self._open.remove(key)
        self._append(
            {
                "key": key,
                "state": "done",
                "seconds": round(time.monotonic() - start, 2),
                "result": result,
            }
        )
        return result

    def crashed(self) -> list[str]:
        """Books the innermost unit under way as failed, and those around it as not begun: for the
        process after a crash.

        Returns:
          What it booked as failed.
        """
        under_way = [key for key, record in self.records.items() if record["state"] == "begun"]
        for key in under_way[:-1]:
            self._append({"key": key, "state": "again"})
        for key in under_way[-1:]:
            self._fail(key, "the process crashed", self.records[key].get("group", ""))
        return under_way[-1:]

    def _fail(self, key: str, text: str, group: str, lost: bool = True) -> None:
        self._append({"key": key, "state": "failed", "error": text, "group": group, "lost": lost})
        print(f"FAILED {key}: {text}", file=sys.stderr, flush=True)

    def _give_up(self, key: str, seconds: float, group: str) -> None:
        for outer in self._open[: self._open.index(key)]:
            self._append({"key": outer, "state": "again"})
        self._fail(key, f"no result after {seconds:g} seconds", group)
        os._exit(LOST)

    def _append(self, record: dict[str, Any]) -> None:
        with self._path.open("a") as file:
            file.write(json.dumps(record) + "\n")
            file.flush()
            os.fsync(file.fileno())
        self._book(record)

    def _book(self, record: dict[str, Any]) -> None:
        key = record["key"]
        begun = (
            0
            if record["state"] == "again"
            else self.records.pop(key, {}).get("begun", 0) + (record["state"] == "begun")
        )
        self.records[key] = record | {"begun": begun}
        if "seconds" in record:
            kind = key.split()[0]
            self._longest[kind] = max(self._longest.get(kind, 0.0), record["seconds"])


def fingerprint(paths: Iterable[Path]) -> str:
    """A short name for the contents of files: units of other contents are measured anew.

    Args:
      paths: of the files; those that are absent count as such.

    Returns:
      Eight hexadecimal digits.

    Example:
      >>> len(fingerprint([Path(__file__)]))
      8
    """
    digest = hashlib.sha256()
    for path in sorted(paths):
        digest.update(
            path.name.encode() + b"\0" + (path.read_bytes() if path.is_file() else b"") + b"\0"
        )
    return digest.hexdigest()[:8]


if __name__ == "__main__":
    for journal in sys.argv[1:]:
        for crashed in Journal(journal).crashed() if Path(journal).exists() else ():
            print(f"{journal}: {crashed} crashed")
