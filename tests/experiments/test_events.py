"""TensorBoard events: each row of metrics.jsonl once, whatever stops and resumes there were."""

import struct

import pytest
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.record_writer import masked_crc32c
from tiny_runs import config

from experiments.training import events
from experiments.training.config import resolve
from experiments.training.run_folder import RunFolder


def events_of(folder):
    """The events of the one file there that is not empty, read as TFRecords."""
    [path] = (path for path in folder.glob("*tfevents*") if path.stat().st_size)
    data, found = path.read_bytes(), []
    while data:
        (length,) = struct.unpack("<Q", data[:8])
        record, data = data[: length + 16], data[length + 16 :]
        assert record[8:12] == struct.pack("<I", masked_crc32c(record[:8]))
        assert record[-4:] == struct.pack("<I", masked_crc32c(record[12:-4]))
        found.append(Event.FromString(record[12:-4]))
    return found


def scalars(folder):
    """(step, tag) -> value."""
    pairs = [
        ((event.step, value.tag), value.simple_value)
        for event in events_of(folder)
        for value in event.summary.value
    ]
    assert len(dict(pairs)) == len(pairs), "a step is there twice"
    return dict(pairs)


def row(step):
    return {"kind": "train", "step": step, "loss": step / 4, "lr": 0.5}


def expected(*steps):
    both = [{(n, "train/loss"): n / 4, (n, "train/lr"): 0.5} for n in steps]
    return {key: value for pair in both for key, value in pair.items()}


@pytest.fixture(name="folder")
def _folder(tmp_path):
    settings = resolve(config(tmp_path, log_every=1))
    folder = RunFolder.open(settings, resume=False)
    folder.start(settings)
    return folder


def resumed(folder, step):
    """The folder after a stop, as a process finds it that goes on from a step."""
    folder._lock.release()  # as the operating system does; the events stay as they are
    again = RunFolder.open(folder.config(), resume=True)
    again.rewind(step, log_every=1, steps_per_epoch=100)
    return again


def test_rows_without_numbers_and_text_leave_no_scalars(folder):
    folder.append({"kind": "epoch", "step": 3, "epoch": 0, "sad": None, "density": 0.25})
    folder.close()
    assert scalars(folder.path) == {(3, "epoch/epoch"): 0, (3, "epoch/density"): 0.25}


def test_a_resumed_run_has_each_row_once(folder):
    for step in (1, 2, 3):
        folder.append(row(step))
    assert scalars(folder.path) == expected(1, 2, 3)
    again = resumed(folder, step=2)
    for step in (3, 4):
        again.append(row(step))
    assert scalars(again.path) == expected(1, 2, 3, 4)
    version, purge, *_ = events_of(again.path)
    assert version.file_version == "brain.Event:2"
    assert (purge.step, purge.session_log.status) == (0, SessionLog.START)
    again.close()


def test_a_tensorboard_that_reads_the_old_file_finds_the_new_one(folder):
    """It reads files in the order of their names, and the old one stays as long as it may read."""
    for step in range(1, 5):
        folder.append(row(step))
        folder = resumed(folder, step)
    folder.append(row(5))
    old, new = sorted(folder.path.glob("*tfevents*"))
    assert old.stat().st_size == 0 < new.stat().st_size
    assert scalars(folder.path) == expected(1, 2, 3, 4, 5)
    folder.close()


def test_a_run_whose_events_were_lost_has_them_again(folder):
    folder.append(row(1))
    next(folder.path.glob("*tfevents*")).unlink()
    again = resumed(folder, step=1)
    again.append(row(2))
    assert scalars(again.path) == expected(1, 2)
    again.close()


def test_without_tensorboardx_a_run_says_so_once_and_goes_on(folder, monkeypatch):
    monkeypatch.setattr(events, "MISSING", True)
    with pytest.warns(UserWarning, match="tensorboardX is not installed; pip install") as caught:
        folder.append(row(1))
    folder.append(row(2))
    folder.close()
    assert len(caught) == 1
    assert [r["step"] for r in folder.metrics()] == [1, 2]
    assert not list(folder.path.glob("*tfevents*"))
