"""The journal and the clock of the GPU measurements."""

import dataclasses
import json
import re
import subprocess
import sys
import time
from pathlib import Path

import described_gpu
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from requirements import needs

from experiments.bench.command import exit_status
from experiments.bench.gpu import clock
from experiments.bench.gpu.fingerprint import fingerprint
from experiments.bench.gpu.journal import FATAL, LOST, STOPPED, DeviceLost, Journal, TimeUp
from pallas_kernels.devices import H200

ROOT = Path(__file__).resolve().parents[2]


def states(path):
    return [json.loads(line)["state"] for line in path.read_text().splitlines()]


def test_the_clock_calls_once_for_each_set_and_round():
    log = []

    def function(a):
        y = 2 * a
        jax.debug.callback(lambda value: log.append(float(value)), y[0], ordered=False)
        return y

    sets = clock.Sets(tuple((jnp.full(2, float(i)),) for i in range(3)), 24)
    program = clock.Program(function, sets, 4)
    assert program() > 0
    jax.effects_barrier()
    assert sorted(log) == sorted([0.0, 2.0, 4.0] * 4)
    np.testing.assert_array_equal(program.output(), [0.0, 0.0])
    body = clock.chained(lambda a: a @ a, 5).lower(*[(jnp.ones((8, 8)),)] * 2).as_text()
    assert body.count("dot_general") == 2
    assert body.count("optimization_barrier") == 2, "nothing leaves the loop and nothing merges"


def test_sets_exceed_the_cache_or_say_that_they_do_not(monkeypatch):
    small = dataclasses.replace(H200, l2_bytes=1000)
    monkeypatch.setattr(clock, "this_device", lambda: small)
    assert clock.rotate(lambda seed: (jnp.zeros(200),)).describe() == {
        "sets": 3,
        "megabytes": 0.0,
        "l2": "cold",
    }
    assert clock.rotate(lambda seed: (jnp.zeros(50),)).describe()["l2"] == "warm"
    assert len(clock.rotate(lambda seed: (jnp.zeros(5000),)).operands) == 1


def test_no_timed_program_is_short(monkeypatch):
    sets = clock.rotate(lambda seed: (jnp.ones(8),))
    monkeypatch.setattr(clock, "DRY_RUN_MS", 2.0)
    assert clock.rounds(1e9, sets) == 1
    assert clock.rounds(0.0, sets) == 500
    counts = []

    class Counted(clock.Program):
        def __init__(self, function, sets, count):
            counts.append(count)
            super().__init__(function, sets, count)

        def __call__(self):
            super().__call__()
            return 0.01  # milliseconds of a launch

    monkeypatch.setattr(clock, "Program", Counted)
    programs = clock.build({"a": lambda a: a + 1, "b": lambda a: a - 1}, sets, 2, threads=2)
    assert counts == [2, 2, 50, 50], "2 ms of 4 launches in each round"
    np.testing.assert_array_equal(programs["b"].output(), jnp.zeros(8))
    counts.clear()
    clock.build({"a": lambda a: a + 1}, sets, 20)
    assert counts == [20], "long enough"


@needs(described_gpu.missing())
def test_the_compiled_loop_holds_the_calls_and_nothing_else():
    def function(a, b):
        return jnp.tanh(a) @ b

    shapes_ = (
        jax.ShapeDtypeStruct((256, 128), "bfloat16", sharding=described_gpu.described_h200()),
    ) * 2
    shapes_ = (
        shapes_[0],
        jax.ShapeDtypeStruct((128, 64), "bfloat16", sharding=described_gpu.described_h200()),
    )
    text = clock.chained(function, 7).lower(shapes_, shapes_, shapes_).compile().as_text()
    body = re.search(r"while\(.*body=%?([\w.-]+).*", text)
    assert body, text[-2000:]
    loop = re.search(rf"%?{re.escape(body[1])} \(.*?\n}}", text, re.DOTALL)[0]
    assert len(re.findall(r"= \S+ tanh|kind=kLoop|kind=kCustom|custom-call", loop)) >= 3
    assert not re.search(r"= \S+ (copy|transpose|broadcast)\(", loop), loop
    assert '"known_trip_count":{"n":"7"}' in text


def test_a_journal_continues_after_a_kill(tmp_path):
    path = tmp_path / "j.jsonl"
    code = """
import os, sys
from experiments.bench.gpu.journal import Journal
journal = Journal(sys.argv[1])
journal.run("a", lambda: {"ms": 1.5})
journal.run("b", lambda: os._exit(9))
"""
    for _ in range(2):
        assert subprocess.run([sys.executable, "-c", code, str(path)], cwd=ROOT).returncode == 9
    assert states(path) == ["begun", "done", "begun", "begun"], (
        "a finished unit is not measured again"
    )
    with path.open("a") as file:
        file.write('{"key": "c", "sta')  # the line was cut off
    journal = Journal(path)
    assert journal.result("a") == {"ms": 1.5}
    assert journal.run("b", lambda: 1) is None
    assert "interrupted twice" in journal.error("b")
    assert journal.run("c", lambda: 3) == 3
    assert Journal(path).records.keys() == {"a", "b", "c"}
    path.write_text("nonsense\n" + path.read_text())
    with pytest.raises(ValueError, match="line 1 of"):
        Journal(path)


def test_a_journal_leaves_time_for_a_unit(tmp_path):
    path = tmp_path / "j.jsonl"
    with pytest.raises(TimeUp):
        Journal(path, minutes=1).run("step a", lambda: 1, reserve=90)
    assert not path.exists(), "it did not begin, so it was not interrupted"
    path.write_text(
        '{"key": "step x", "state": "begun"}\n{"key": "step x", "state": "done", "seconds": 70, '
        '"result": 1}\n'
    )
    journal = Journal(path, minutes=1)
    with pytest.raises(TimeUp):
        journal.run("step a", lambda: 1)
    assert journal.run("check a", lambda: 1) == 1, "of another kind"
    with path.open("a") as file:
        file.write('{"key": "step a", "state": "begun"}\n')
    with pytest.raises(TimeUp):
        Journal(path, minutes=2).run("step a", lambda: 1), "interrupted once: twice as long"
    assert Journal(path, minutes=3).run("step a", lambda: 1) == 1


def test_a_crash_fails_the_innermost_unit_and_two_of_them_end_a_group(tmp_path):
    code = """
import os, sys
from experiments.bench.gpu.journal import Journal
journal = Journal(sys.argv[1])
first = lambda: journal.run("first 2", lambda: os.abort(), group="g")
journal.run("tune", lambda: journal.run("first 1", lambda: 1) and first() or "rest", group="g")
"""
    path = tmp_path / "j.jsonl"
    assert subprocess.run([sys.executable, "-c", code, str(path)], cwd=ROOT).returncode < 0
    assert (
        subprocess.run(
            [sys.executable, "-m", "experiments.bench.gpu.journal", str(path)], cwd=ROOT
        ).returncode
        == 0
    )
    assert Journal(path).error("first 2") == "the process crashed"
    assert Journal(path).records["tune"]["begun"] == 0, "the outer unit is not to blame"
    assert subprocess.run([sys.executable, "-c", code, str(path)], cwd=ROOT).returncode == 0
    assert Journal(path).result("tune") == "rest"

    def spoiled():
        raise RuntimeError(f"{FATAL[0]}_ILLEGAL_ADDRESS")

    journal = Journal(path)
    with pytest.raises(DeviceLost):
        journal.run("tune again", lambda: journal.run("third", spoiled, group="g"), group="g")
    journal = Journal(path)
    assert journal.run("tune again", lambda: pytest.fail("it ran"), group="g") is None
    assert (
        journal.error("tune again") == "skipped: first 2 and third hung, crashed or lost the device"
    )
    assert journal.run("tune another", lambda: 5, group="another") == 5


def test_a_journal_stops_in_time_and_keeps_failures(tmp_path, capsys):
    journal = Journal(tmp_path / "j.jsonl", minutes=0.3 / 60)
    assert journal.run("unit slow", lambda: time.sleep(0.2) or 1) == 1
    with pytest.raises(TimeUp):
        journal.run("unit next", lambda: 2)
    journal = Journal(tmp_path / "j.jsonl")
    assert journal.run("unit slow", lambda: pytest.fail("measured again")) == 1
    assert journal.run("bad", lambda: [][0]) is None
    assert "IndexError" in journal.error("bad")
    assert "FAILED bad" in capsys.readouterr().err

    def spoiled():
        raise RuntimeError(f"{FATAL[0]}_ILLEGAL_ADDRESS")

    with pytest.raises(DeviceLost):
        journal.run("spoiled", spoiled)
    assert Journal(tmp_path / "j.jsonl").run("spoiled", lambda: 1) is None, (
        "the next process skips it"
    )


def test_a_unit_that_hangs_ends_the_process(tmp_path):
    code = """
import sys, time
from experiments.bench.gpu.journal import Journal
Journal(sys.argv[1], unit_seconds=0.2).run("h", lambda: time.sleep(60))
"""
    assert (
        subprocess.run(
            [sys.executable, "-c", code, str(tmp_path / "j")], cwd=ROOT, timeout=50
        ).returncode
        == LOST
    )
    assert "no result after 0.2 seconds" in Journal(tmp_path / "j").error("h")


def test_a_fingerprint_follows_the_contents(tmp_path):
    file = tmp_path / "a.py"
    file.write_text("1")
    first = fingerprint([file])
    file.write_text("2")
    assert len({first, fingerprint([file]), fingerprint([tmp_path / "none"])}) == 3


def test_the_exit_status_says_how_a_command_ended(capsys):
    def ends(error):
        def work():
            raise error

        return exit_status(work)

    assert exit_status(lambda: {"complete": True, "failed": ["a"]}) == 1
    assert exit_status(lambda: {"complete": False, "failed": ["a"]}) == STOPPED
    assert [
        ends(error)
        for error in (ValueError("argument"), AssertionError("result"), DeviceLost("unit a"))
    ] == [2, 1, LOST]
    assert capsys.readouterr().err.splitlines() == [
        "error: argument",
        "error: result",
        "the device was lost at unit a; call the same command again, it goes on after it",
    ]
