"""The run folder: whose it is, what its name may be, what it holds after any damage or crash."""

import contextlib
import dataclasses
import errno
import os
import resource
import shutil
import signal
import subprocess
import sys
import zipfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from tiny_runs import config, error_of

from experiments.training import folder_lock, metrics_log
from experiments.training.checkpoints import Checkpoints
from experiments.training.config import TrainConfig, resolve
from experiments.training.run_folder import RunFolder

LOG_EVERY, PER_EPOCH = 2, 3


def config_of(out, **fields):
    return resolve(dataclasses.replace(config(Path()), out=str(out), **fields))


def tree(step):
    return {
        "weights": jnp.arange(6.0).reshape(2, 3) * step,
        "half": jnp.full(3, step, jnp.bfloat16),
        "mask": jnp.array([True, False]),
        "none": jnp.zeros((0, 3)),
        "count": jnp.int32(step),
        "key": jax.random.key(step),
    }


def assert_equal_trees(a, b):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            x, y = jax.random.key_data(x), jax.random.key_data(y)
        np.testing.assert_array_equal(x, y)


def write_steps(folder, first, last):
    """Rows and checkpoints as a run writes them, one checkpoint a step."""
    for step in range(first, last + 1):
        if step and step % LOG_EVERY == 0:
            folder.append({"kind": "train", "step": step})
        if step and step % PER_EPOCH == 0:
            folder.append({"kind": "epoch", "step": step})
        folder.save(step, tree(step), {"step": step})


def begin(out):
    folder = RunFolder.open(config_of(out), resume=False)
    folder.start(config_of(out))
    return folder


def message_of_open(out, resume=False):
    with pytest.raises(ValueError, match=r"^(out|resume): ") as caught:
        RunFolder.open(config_of(out), resume)
    text = str(caught.value)
    assert "\n" not in text
    return text


def test_a_folder_belongs_to_one_run(tmp_path):
    first = begin(tmp_path / "run")
    for resume in (False, True):
        text = message_of_open(tmp_path / "run", resume)
        assert f"out: {tmp_path / 'run'} is in use by another run (process {os.getpid()} on" in text
    (tmp_path / "link").symlink_to(tmp_path / "run")
    assert "is in use" in message_of_open(tmp_path / "link", resume=True)
    first.close()
    assert folder_lock.NAME not in os.listdir(tmp_path / "run")
    RunFolder.open(config_of(tmp_path / "run"), resume=True).close()


def test_a_lock_ends_with_its_process(tmp_path):
    path = tmp_path / folder_lock.NAME
    code = (
        "import fcntl, sys, time; file = open(sys.argv[1], 'w'); fcntl.flock(file, fcntl.LOCK_EX); "
        "file.write('process 7'); file.flush(); print('locked', flush=True); time.sleep(60)"
    )
    holder = subprocess.Popen([sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE)
    assert holder.stdout.readline() == b"locked\n"
    assert "in use by another run (process 7)" in message_of_open(tmp_path)
    holder.kill()
    holder.communicate()
    assert path.exists()
    begin(tmp_path).close()


def test_a_file_system_without_locks_is_used_with_a_warning(tmp_path, monkeypatch):
    def flock(descriptor, operation):
        raise OSError(errno.EOPNOTSUPP, "Operation not supported")

    monkeypatch.setattr(folder_lock.fcntl, "flock", flock)
    with pytest.warns(UserWarning, match=r"cannot be locked \(Operation not supported\)"):
        begin(tmp_path / "run").close()


def test_a_folder_that_was_replaced_gets_no_rows(tmp_path):
    folder = begin(tmp_path / "run")
    shutil.rmtree(tmp_path / "run")
    other = begin(tmp_path / "run")
    for write in (lambda: folder.append({}), lambda: folder.save(1, tree(1), {})):
        with pytest.raises(OSError, match="was deleted or replaced"):
            write()
    folder.close()
    assert "is in use" in message_of_open(tmp_path / "run", resume=True)
    assert other.metrics() == []
    other.close()


ODD_NAMES = (
    "[red]x[/red]",
    "[a-z]",
    "a*?b",
    "{a,b}",
    "größe-模型",
    "two words\nand a line",
    "100%41",
    "~",
    "$HOME",
    "http:",
    "-x",
    "'quoted'",
    "x" * 255,
    "/".join(["y" * 200] * 15),
)


@pytest.mark.parametrize("name", ODD_NAMES)
def test_what_is_written_in_a_folder_of_any_name_is_read_back(tmp_path, name):
    folder = begin(tmp_path / name)
    write_steps(folder, 0, 4)
    folder.close()
    again = RunFolder.open(config_of(tmp_path / name), resume=True)
    assert again.latest() == 4
    assert again.checkpoints.meta(4) == {"step": 4}
    assert_equal_trees(again.checkpoints.restore(3, tree(0)), tree(3))
    assert [row["step"] for row in again.metrics()] == [2, 3, 4]
    again.close()


@pytest.mark.parametrize("out", ["run", "./run/", "../here/run", "sub/../run"])
def test_a_relative_folder(tmp_path, monkeypatch, out):
    (tmp_path / "here" / "sub").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here")
    begin(out).close()
    assert (tmp_path / "here" / "run" / "config.json").exists()


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("file/run", "cannot be written (Not a directory)"),
        ("file", "is a file; choose a folder"),
        ("dangling", "is a link to nothing"),
        ("x" * 256, "cannot be written (File name too long)"),
        ("/".join(["y" * 200] * 25), "cannot be written (File name too long)"),
        ("\udcc3\udca9", r"run/\udcc3\udca9' is not valid text in this locale; set PYTHONUTF8=1"),
    ],
)
def test_a_folder_that_cannot_be_is_named_in_one_line(tmp_path, capsys, name, words):
    root = tmp_path / "run"
    root.mkdir()
    (root / "file").write_text("mine")
    (root / "dangling").symlink_to(tmp_path / "nowhere")
    text = error_of(capsys, ["--out", str(root / name)])
    assert text.startswith("error: out: ")
    assert text.count("\n") == 1
    assert words in text
    assert sorted(os.listdir(root)) == ["dangling", "file"]
    assert (root / "file").read_text() == "mine"


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs a folder that root cannot write")
def test_a_folder_that_is_not_writable(capsys):
    text = error_of(capsys, ["--out", "/proc/a/b"])
    assert "error: out: /proc/a/b cannot be written (" in text
    assert text.count("\n") == 1


def test_a_stop_before_the_run_began_leaves_a_folder_that_can_be_used(tmp_path):
    (tmp_path / folder_lock.NAME).write_text("process 1")
    (tmp_path / "config.json.part").write_text("{")
    assert "is empty, so there is no run to go on with" in message_of_open(tmp_path, resume=True)
    begin(tmp_path).close()


@contextlib.contextmanager
def largest_file(size):
    """A disk on which no file can be larger."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


@pytest.mark.parametrize("size", [0, 100, 700])
def test_a_disk_that_is_full_keeps_what_was_written(tmp_path, size):
    folder = begin(tmp_path)
    write_steps(folder, 0, 2)
    files = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with largest_file(size):
        with pytest.raises(OSError, match=f"File too large: '{tmp_path}/checkpoints/3.zip'"):
            folder.save(3, tree(3), {})
        with pytest.raises(OSError, match=r"File too large: '.*/result.json'"):
            folder.write_result({"numbers": list(range(500))})
    for path in (*tmp_path.rglob("*.part"), tmp_path / "result.json"):
        path.unlink(missing_ok=True)
    assert files == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    folder.close()


@pytest.mark.parametrize("size", [0, 10, 200])
def test_a_full_disk_leaves_no_new_folder(tmp_path, size):
    def begin_or_discard():
        folder = RunFolder.open(settings, resume=False)
        try:
            folder.start(settings)
        except OSError:
            folder.discard()
            raise

    settings = config_of(tmp_path / "a" / "b")
    with largest_file(size), pytest.raises((ValueError, OSError), match="File too large"):
        begin_or_discard()
    assert os.listdir(tmp_path) == []


def test_space_for_the_checkpoints_to_come_is_checked(tmp_path, monkeypatch):
    folder = begin(tmp_path)
    folder.save(0, tree(0), {})
    size = folder.checkpoints.file(0).stat().st_size
    usage = shutil.disk_usage(tmp_path)
    for saved, needed in ((1, 2), (2, 1), (3, 1)):
        monkeypatch.setattr(shutil, "disk_usage", lambda _, n=needed: usage._replace(free=n * size))
        folder.checkpoints.check_space()
        monkeypatch.setattr(
            shutil, "disk_usage", lambda _, n=needed: usage._replace(free=n * size - 1)
        )
        with pytest.raises(
            OSError, match=f"checkpoints is full: .* need {needed * size / 1e6:.1f} MB"
        ):
            folder.checkpoints.check_space()
        folder.save(saved, tree(0), {})
    folder.close()


class Killed(BaseException):
    """The process ended here."""


@contextlib.contextmanager
def killed_at(monkeypatch, operation):
    """Everything that changes files fails from the given operation on, as when a process ends.

    Each file operation is done by half before the kill where it can be.
    """
    count = 0

    def wrap(owner, name):
        inner = getattr(owner, name)

        def call(*args, **kwargs):
            nonlocal count
            count += 1
            if count >= operation:
                raise Killed
            return inner(*args, **kwargs)

        patch.setattr(owner, name, call)

    with monkeypatch.context() as patch:
        for owner, name in (
            (Path, "replace"),
            (Path, "unlink"),
            (Path, "mkdir"),
            (Path, "rmdir"),
            (os, "fsync"),
            (os, "open"),
            (os, "pwrite"),
            (os, "ftruncate"),
            (shutil, "rmtree"),
            (zipfile.ZipFile, "writestr"),
            (zipfile.ZipFile, "open"),
            (metrics_log, "append"),
        ):
            wrap(owner, name)
        with contextlib.suppress(Killed):
            yield
            return
    assert count >= operation


def a_run(out, resume):
    """Four steps of a run, from where it is."""
    folder = RunFolder.open(config_of(out), resume)
    try:
        done = folder.latest() if resume else None
        if done is not None:
            assert_equal_trees(folder.checkpoints.restore(done, tree(0)), tree(done))
        folder.start(config_of(out))
        folder.rewind(done or 0, LOG_EVERY, PER_EPOCH)
        write_steps(folder, 0 if done is None else done + 1, 4)
        folder.write_result({"done": True})
    finally:
        descriptor, folder._lock._descriptor = folder._lock._descriptor, None
        if descriptor is not None:
            os.close(descriptor)  # all that the end of a process does


def test_a_kill_at_any_moment_loses_nothing(tmp_path, monkeypatch):
    """Twice in each run, and the run after them ends as one that nothing stopped."""
    a_run(tmp_path / "whole", resume=False)
    whole = RunFolder(tmp_path / "whole")
    operations = 0
    for operation in range(1, 1000):
        out = tmp_path / str(operation)
        with killed_at(monkeypatch, operation):
            a_run(out, resume=False)
        if RunFolder(out).result() is not None:
            break
        operations += 1
        with killed_at(monkeypatch, max(1, operation // 2)):
            a_run(out, resume=(out / "config.json").exists())
        a_run(out, resume=(out / "config.json").exists())
        again = RunFolder(out)
        assert again.metrics() == whole.metrics()
        assert again.checkpoints.steps() == whole.checkpoints.steps() == [3, 4]
        assert_equal_trees(again.checkpoints.restore(4, tree(0)), tree(4))
        assert not list(out.rglob("*.part"))
    assert operations > 60


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("checkpoint")
    checkpoints = Checkpoints(path)
    checkpoints.save(1, tree(1), {"step": 1})
    return checkpoints, checkpoints.file(1).read_bytes()


@hypothesis_settings(deadline=None, max_examples=300)
@given(data=st.data())
def test_a_damaged_checkpoint_is_refused_or_reads_as_it_was(checkpoint, data):
    checkpoints, whole = checkpoint
    at = data.draw(st.integers(0, len(whole) - 1))
    byte = bytes([whole[at] ^ data.draw(st.integers(1, 255))])
    damage = data.draw(st.sampled_from(["cut", "flip", "grow"]))
    tail = {"cut": b"", "flip": byte + whole[at + 1 :], "grow": byte + whole[at:]}[damage]
    checkpoints.file(1).write_bytes(whole[:at] + tail)
    try:
        meta, restored = checkpoints.meta(1), checkpoints.restore(1, tree(0))
    except ValueError as error:
        message = str(error)
    else:
        assert meta == {"step": 1}
        assert_equal_trees(restored, tree(1))
        return
    assert "1.zip: is damaged (" in message
    assert "delete it to go on from the checkpoint before it" in message


def test_files_that_are_no_checkpoints_are_left_alone(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    for step in range(4):
        checkpoints.save(step, tree(step), {})
    others = ("._3.zip", "best.zip", "3 (copy).zip", "notes.txt")
    for name in others:
        (tmp_path / "checkpoints" / name).write_text("mine")
    (tmp_path / "checkpoints" / "4.zip.part").write_text("cut")
    checkpoints.tidy()
    checkpoints.save(4, tree(4), {})
    assert sorted(os.listdir(tmp_path / "checkpoints")) == sorted(["3.zip", "4.zip", *others])
    assert checkpoints.steps() == [3, 4]


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda text: b"", "the row of step 2 is missing, and the run goes on from step 6"),
        (lambda text: text[: len(text) // 2], "the row of step 4 is missing"),
        (lambda text: text[:-1], None),  # the last row is whole
        (lambda text: text[:-2], "the row of step 6 is missing"),
        (lambda text: text + b'{"kind": "train", "st', None),  # cut short by a stop
        (lambda text: text[5:], "line 1 is not JSON"),
        (lambda text: b"\xff\n" + text, "line 1 is not JSON"),
        (lambda text: b"3\n" + text, "line 1 is not a row with kind and step"),
        (lambda text: b'{"step": "3"}\n' + text, "line 1 is not a row with kind and step"),
        (lambda text: text.replace(b"\n", b"\n\n", 1), "line 2 is not JSON"),
    ],
)
def test_lost_and_cut_metrics_are_named(tmp_path, damage, words):
    folder = begin(tmp_path)
    write_steps(folder, 1, 6)
    path = tmp_path / "metrics.jsonl"
    whole = folder.metrics()
    path.write_bytes(damage(path.read_bytes()))
    if words is None:
        folder.rewind(6, LOG_EVERY, PER_EPOCH)
        assert folder.metrics() == whole
        assert path.read_bytes().count(b"\n") == len(whole)
    else:
        before = path.read_bytes()
        with pytest.raises(ValueError, match=words) as caught:
            folder.rewind(6, LOG_EVERY, PER_EPOCH)
        if "missing" in words:
            assert "delete checkpoints/5.zip and checkpoints/6.zip to train" in str(
                caught.value
            ) or "delete checkpoints/6.zip to train" in str(caught.value)
        assert path.read_bytes() == before
    folder.close()


@given(
    step=st.integers(0, 40),
    log_every=st.integers(1, 9),
    steps_per_epoch=st.integers(1, 9),
    lost=st.sets(st.integers(0, 200)),
)
def test_the_first_missing_row_is_found(step, log_every, steps_per_epoch, lost):
    rows = [
        {"kind": kind, "step": at}
        for at in range(1, step + 10)
        for kind, every in (("train", log_every), ("epoch", steps_per_epoch))
        if at % every == 0
    ]
    kept = [row for number, row in enumerate(rows) if number not in lost]
    missing = [row["step"] for number, row in enumerate(rows) if number in lost]
    expected = min((at for at in missing if at <= step), default=None)
    assert metrics_log.first_missing(kept, step, log_every, steps_per_epoch) == expected


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('"epochs": 3', ""),
        ('"epochs": "3"', "config.json: epochs: expected an integer"),
        ('"epochs": null', "config.json: epochs 20"),
        ('"width": []', "config.json: width: expected a number above 0"),
        ('"dataset": "cifar11"', "did you mean 'cifar10'"),
        ('"group_size": 0', "config.json: group_size: expected an integer of at least 1"),
    ],
)
def test_a_config_with_a_wrong_value_is_named(tmp_path, text, words):
    begin(tmp_path).close()
    path = tmp_path / "config.json"
    name = text.split(":")[0]
    lines = path.read_text().splitlines()
    path.write_text(
        "\n".join(
            text + "," * line.endswith(",") if line.strip().startswith(name) else line
            for line in lines
        )
    )
    if not words:
        assert RunFolder(tmp_path).config() == config_of(tmp_path)
    elif "epochs 20" in words:
        assert RunFolder(tmp_path).config().epochs == 20
    else:
        with pytest.raises(ValueError, match=r"config\.json: ") as caught:
            RunFolder(tmp_path).config()
        assert words in str(caught.value)


SWEEP = (
    {},
    {"sparsity": 0.8},
    {"sparsity": 0.95},
    {"lr": 0.01},
    {"lr": 0.1, "momentum": 0.0},
    {"width": 2},
    {"epochs": 7},
    {"seed": 1},
    {"method": "rigl"},
    {"method": "gradual"},
    {"method": "subp"},
    {"model": "resnet20"},
    {"execution": "masked"},
    {"precision": "bfloat16"},
    {"optimizer": "adam"},
    {"weight_decay": 0.0},
    {"batch_size": 32},
    {"implementation": "xla"},
)


def test_the_default_folder_tells_the_runs_of_a_sweep_apart():
    configs = [TrainConfig(**fields) for fields in SWEEP]
    options = resolve(TrainConfig()).options
    configs += [
        TrainConfig(options=dataclasses.replace(options, **change))
        for change in ({"group_size": 8}, {"budget": "erk"}, {"block_density": 0.5})
    ]
    folders = [resolve(one).out for one in configs]
    assert len(set(folders)) == len(folders)
    assert folders[0] == "runs/digits-cnn-hrbp-0.9-seed0"
    assert "runs/digits-cnn-hrbp-0.9-seed0-lr0.01" in folders
    assert folders[-3] == "runs/digits-cnn-hrbp-0.9-seed0-group_size8"
    # What is the preset's, where it is given, changes nothing.
    assert resolve(TrainConfig(epochs=20, sparsity=0.9, options=options)).out == folders[0]


@given(
    lr=st.floats(1e-9, 1e9),
    sparsity=st.floats(0, 0.999),
    momentum=st.floats(0, 0.999),
    weight_decay=st.floats(0, 10),
    label_smoothing=st.floats(0, 0.9),
    width=st.floats(0.1, 10),
    others=st.booleans(),
)
def test_a_default_folder_is_one_short_name(others, **fields):
    if others:
        fields |= {"precision": "bfloat16", "optimizer": "adam", "implementation": "xla"}
    name = resolve(TrainConfig(**fields)).out.removeprefix("runs/")
    assert len(name.encode()) < 200
    assert "/" not in name
    assert resolve(TrainConfig(**fields | {"seed": 1})).out.removeprefix("runs/") != name
