"""The rows of metrics.jsonl as TensorBoard events: `tensorboard --logdir runs` draws them."""

import os
import struct
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiments.training.files import naming

try:
    from tensorboardX.proto.event_pb2 import Event, SessionLog
    from tensorboardX.proto.summary_pb2 import Summary
    from tensorboardX.record_writer import masked_crc32c

    MISSING = False
except ModuleNotFoundError as error:
    if error.name != "tensorboardX":
        raise
    MISSING = True


class Events:
    """The events of one run, in one file in its folder.

    metrics.jsonl is what counts: its rows are written anew by each process, so that a run that was
    stopped and resumed has each of them once, whichever events were on the disk at the stop.

    Args:
      folder: of the run.
      rows: of metrics.jsonl so far.
    """

    def __init__(self, folder: Path, rows: Sequence[dict[str, Any]]):
        if MISSING:
            warnings.warn(
                "no TensorBoard events: tensorboardX is not installed; pip install tensorboardX "
                "brings them, from this run's next resume on for all of its rows",
                stacklevel=3,
            )
            return
        for path in folder.glob("events.out.tfevents.*"):
            # A TensorBoard that reads this file goes on to the next at its end, not if it is gone.
            if path.stat().st_size:
                os.truncate(path, 0)
            else:
                path.unlink()
        self._path = folder / f"events.out.tfevents.{time.time_ns()}"
        # It then drops what it has read from this step on.
        purge = Event(step=0, session_log=SessionLog(status=SessionLog.START))
        self._write(Event(file_version="brain.Event:2"), purge, *map(_event, rows))

    def append(self, row: dict[str, Any]) -> None:
        """Adds the numbers of one row, as KIND/NAME.

        Args:
          row: JSON values, with `kind` and `step`.
        """
        if not MISSING:
            self._write(_event(row))

    def _write(self, *events: Any) -> None:
        records = b"".join(_record(event.SerializeToString()) for event in events)
        with naming(self._path), open(self._path, "ab") as file:
            file.write(records)


def _event(row: dict[str, Any]) -> Any:
    values = [
        Summary.Value(tag=f"{row['kind']}/{name}", simple_value=value)
        for name, value in row.items()
        if name != "step" and isinstance(value, int | float)
    ]
    return Event(wall_time=time.time(), step=row["step"], summary=Summary(value=values))


def _record(data: bytes) -> bytes:
    """A TFRecord: the length and the data, each with its checksum."""
    length = struct.pack("<Q", len(data))
    checksums = (struct.pack("<I", masked_crc32c(part)) for part in (length, data))
    return length + next(checksums) + data + next(checksums)
