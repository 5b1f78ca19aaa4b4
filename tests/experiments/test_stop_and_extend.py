"""Signals stop a run without loss, at any moment; a run that has ended says so, and is extended."""

import contextlib
import dataclasses
import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time

import jax
import numpy as np
import pytest
from new_process import host_devices, run_python
from tiny_runs import PER_EPOCH, assert_same_run, config, error_of, flags, output_of

from experiments import compare
from experiments.data.resident import Dataset
from experiments.train import cli
from experiments.training import checkpoints as checkpoints_module
from experiments.training import command_line, stopping
from experiments.training.config import resolve
from experiments.training.execution import masks_of
from experiments.training.optimizer import learning_rate
from experiments.training.run import Run
from experiments.training.run_folder import RunFolder
from experiments.training.stopping import Stopped

pytestmark = pytest.mark.usefixtures("without_pictures")

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that nothing stopped."""
    run = Run(config(tmp_path_factory.mktemp("whole"), method="hrbp-dynamic"))
    run.train()
    return run


def moved(run, tmp_path):
    """The config of a finished run, for another folder."""
    return dataclasses.replace(run.config, out=str(tmp_path / "run"))


def signal_in(monkeypatch, owner, name, numbers, at):
    """Raises signals within the call of `owner.name` that `at` accepts the first argument of."""
    inner = getattr(owner, name)

    def call(*args, **kwargs):
        if at(*args):
            for number in numbers:
                signal.raise_signal(number)
        return inner(*args, **kwargs)

    monkeypatch.setattr(owner, name, call)


def at_step(step):
    return lambda state, number, *_: number == step


@pytest.mark.parametrize(
    ("number", "step"),
    [
        (signal.SIGINT, 0),
        (signal.SIGTERM, 14),
        (signal.SIGHUP, PER_EPOCH - 1),
        (signal.SIGTERM, 3 * PER_EPOCH - 1),
    ],
)
def test_a_signal_ends_the_step_saves_and_says_how_to_go_on(
    whole, tmp_path, monkeypatch, number, step
):
    handlers = [signal.getsignal(one) for one in SIGNALS]
    run = Run(moved(whole, tmp_path))
    signal_in(monkeypatch, run.trainer, "step", [number], at_step(step))
    with pytest.raises(Stopped) as stop:
        run.train()
    assert stop.value.number == number
    assert str(stop.value) == (
        f"stopped; go on from step {step + 1} of 33 with: python -m experiments.train --resume "
        f"--out {tmp_path / 'run'}"
    )
    assert handlers == [signal.getsignal(one) for one in SIGNALS]
    again = Run(moved(whole, tmp_path), resume=True)
    assert again.step == step + 1
    assert again.train()["test_accuracy"] == whole.result["test_accuracy"]
    assert_same_run(again, whole)


def test_a_signal_during_a_save_lets_it_end(whole, tmp_path, monkeypatch):
    run = Run(moved(whole, tmp_path))
    signal_in(monkeypatch, checkpoints_module.os, "fsync", [signal.SIGTERM], lambda *_: True)
    with pytest.raises(Stopped, match=f"go on from step {PER_EPOCH} of 33"):
        run.train()
    monkeypatch.undo()
    again = Run(moved(whole, tmp_path), resume=True)
    again.train()
    assert_same_run(again, whole)


def test_a_second_signal_stops_at_once_and_loses_no_checkpoint(whole, tmp_path, monkeypatch):
    for owner, name in ((None, "step"), (checkpoints_module.os, "fsync")):
        out = tmp_path / name
        run = Run(moved(whole, out))
        at = at_step(14) if owner is None else lambda *_, run=run: run.step == 2 * PER_EPOCH
        signals = [signal.SIGINT, signal.SIGINT]
        signal_in(monkeypatch, owner or run.trainer, name, signals, at)
        with pytest.raises(Stopped, match=f"stopped at once; go on from step {PER_EPOCH} of 33"):
            run.train()
        monkeypatch.undo()
        again = Run(moved(whole, out), resume=True)
        again.train()
        assert_same_run(again, whole)


def test_a_signal_while_the_result_is_written_loses_nothing(whole, tmp_path, monkeypatch):
    run = Run(moved(whole, tmp_path))
    signal_in(monkeypatch, RunFolder, "write_result", [signal.SIGINT], lambda *_: True)
    with pytest.raises(Stopped, match="stopped at once; go on from step 33 of 33"):
        run.train()
    monkeypatch.undo()
    again = Run(moved(whole, tmp_path), resume=True)
    assert again.result is None
    assert again.train()["test_accuracy"] == whole.result["test_accuracy"]


@pytest.mark.parametrize("number", SIGNALS)
def test_the_command_line_ends_with_one_line(tmp_path, capsys, monkeypatch, number):
    settings = config(tmp_path, "dense", sparsity=None, epochs=1)
    signal_in(monkeypatch, Run, "_train_step", [number], lambda run, *_: run.step == 3)
    text = error_of(capsys, flags(settings), code=128 + number)
    assert text == (
        "stopped; go on from step 4 of 11 with: python -m experiments.train --resume --out "
        f"{tmp_path / 'run'}\n"
    )
    monkeypatch.undo()
    signal_in(monkeypatch, Run, "_restore", [number], lambda *_: True)
    resume = ["--resume", "--out", settings.out]
    assert error_of(capsys, resume, code=128 + number) == "stopped before training began\n"
    monkeypatch.undo()
    assert "test accuracy" in output_of(capsys, resume)


def test_a_stop_before_training_leaves_no_folder(tmp_path, capsys, monkeypatch):
    signal_in(monkeypatch, Run, "_save", [signal.SIGTERM], lambda *_: True)
    error_of(capsys, flags(config(tmp_path, "dense", sparsity=None)), code=128 + signal.SIGTERM)
    assert os.listdir(tmp_path) == []


def test_a_signal_that_is_ignored_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    try:
        with stopping.StopRequest() as request:
            signal.raise_signal(signal.SIGHUP)
            assert request.number is None
            signal.raise_signal(signal.SIGTERM)
            assert request.number == signal.SIGTERM
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_another_thread_leaves_the_handlers_alone():
    before, seen = signal.getsignal(signal.SIGINT), []

    def body():
        with stopping.StopRequest():
            seen.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=body)
    thread.start()
    thread.join()
    assert seen == [before]


def test_a_disk_that_becomes_full_ends_the_run_with_one_line(tmp_path, capsys, monkeypatch):
    def fsync(descriptor):
        if list((tmp_path / "run").glob("checkpoints/11.zip.part")):
            raise OSError(28, "No space left on device")

    settings = config(tmp_path, "dense", sparsity=None, epochs=2)
    monkeypatch.setattr(checkpoints_module.os, "fsync", fsync)
    text = error_of(capsys, flags(settings), code=1)
    assert text.count("\n") == 1
    assert f"No space left on device: '{tmp_path}/run/checkpoints/11.zip'; when that is" in text
    assert f"go on with: python -m experiments.train --resume --out {tmp_path}/run" in text
    monkeypatch.undo()
    again = Run(settings, resume=True)
    assert again.step == 0
    again.train()


def test_data_that_become_unreadable_end_the_run_with_one_line(tmp_path, capsys, monkeypatch):
    def cut(data, *args, start_step=0):
        yield from itertools.islice(batches(data, *args, start_step=start_step), 4)
        raise ValueError("train-00001: record 7 is cut")

    batches = Dataset.train_batches
    monkeypatch.setattr(Dataset, "train_batches", cut)
    text = error_of(capsys, flags(config(tmp_path, "dense", sparsity=None)), code=1)
    assert text.startswith("error: the data cannot be read: train-00001: record 7 is cut; when")
    assert text.count("\n") == 1


def test_a_signal_while_the_command_imports_ends_it_with_one_line():
    code = (
        "import os, runpy, signal, sys\n"
        "class Finder:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        name == 'jax' and os.kill(os.getpid(), signal.SIGINT)\n"
        "sys.meta_path.insert(0, Finder())\n"
        "runpy.run_module('experiments.train', run_name='__main__')"
    )
    done = run_python("-c", code)
    assert (done.returncode, done.stdout, done.stderr) == (
        128 + signal.SIGINT,
        "",
        "stopped before training began\n",
    )


def test_a_folder_is_free_after_training_and_taken_before(tmp_path, capsys):
    settings = config(tmp_path, "dense", sparsity=None, epochs=2)
    run = Run(settings)
    text = error_of(capsys, flags(settings))
    assert f"{tmp_path / 'run'} is in use by another run (process {os.getpid()} on" in text
    assert run.train(stop_after=3) is None
    other = Run(settings, resume=True)
    other.train(stop_after=7)
    with pytest.raises(
        ValueError, match=r"another process went on with the run in .*, beyond step 3"
    ):
        run.train()
    assert other.train()["steps"] == 22


def test_a_run_that_has_ended_says_so(whole, tmp_path, capsys):
    subprocess.run(["cp", "-r", str(whole.folder.path), str(tmp_path / "run")], check=True)
    out = output_of(capsys, ["--resume", "--out", str(tmp_path / "run")])
    assert (
        "the run has ended after 3 epochs; to extend it: python -m experiments.train --resume "
        in out
    )
    assert f"--out {tmp_path / 'run'} --epochs N\n" in out
    assert f"{whole.result['test_accuracy']:.2%}" in out
    (tmp_path / "run" / "result.json").write_text("{")
    text = error_of(capsys, ["--resume", "--out", str(tmp_path / "run")])
    assert "result.json: not JSON" in text
    assert text.count("\n") == 1


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("hrbp-dynamic", {}),
        ("dense", {}),
        pytest.param("gradual", {}, marks=pytest.mark.slow),
        pytest.param("subp", {"update_every": PER_EPOCH}, marks=pytest.mark.slow),
    ],
)
def test_a_run_that_has_ended_can_be_extended(tmp_path, method, options):
    """The learning rate is that of the longer run, the masks keep the schedule that they had."""
    sparsity = None if method == "dense" else 0.8
    settings = config(tmp_path, method, options, sparsity=sparsity, epochs=3)
    first = Run(settings)
    first.train()
    longer = dataclasses.replace(settings, epochs=5)
    run = Run(longer, resume=True)
    assert (run.step, run.length.total, run.result) == (3 * PER_EPOCH, 5 * PER_EPOCH, None)
    assert run.config.mask_epochs == 3
    assert run.folder.config() == run.config
    assert run.folder.result() is None
    run.train(stop_after=40)  # in the middle of an epoch
    run = Run(longer, resume=True)
    result = run.train()
    assert (result["epochs"], result["steps"]) == (5, 55)
    epochs = [row for row in run.folder.metrics() if row["kind"] == "epoch"]
    assert [row["step"] for row in epochs] == [PER_EPOCH * n for n in range(1, 6)]
    assert epochs[3]["lr"] == pytest.approx(float(learning_rate(run.config, run.length)(43)))
    assert epochs[3]["lr"] > epochs[2]["lr"]
    assert [row["sad"] for row in epochs[3:]] == [0, 0]
    for a, b in zip(jax.tree.leaves(masks_of(run.state)), jax.tree.leaves(masks_of(first.state))):
        np.testing.assert_array_equal(a, b)
    again = Run(dataclasses.replace(settings, epochs=6), resume=True)
    assert again.config.mask_epochs == 3
    assert again.step == 55


def test_an_extension_that_was_stopped_gives_the_same_bits(whole, tmp_path):
    runs = []
    for name, stops in (("a", ()), ("b", (34, 44))):
        out = str(tmp_path / name)
        subprocess.run(["cp", "-r", str(whole.folder.path), out], check=True)
        longer = dataclasses.replace(whole.config, out=out, epochs=5)
        for stop in stops:
            Run(longer, resume=True).train(stop_after=stop)
        runs.append(Run(longer, resume=True))
        runs[-1].train()
    assert_same_run(*runs)


def test_a_kill_while_a_run_is_extended_leaves_the_run_that_it_was(whole, tmp_path, monkeypatch):
    subprocess.run(["cp", "-r", str(whole.folder.path), str(tmp_path / "run")], check=True)
    settings = moved(whole, tmp_path)
    longer = dataclasses.replace(settings, epochs=4)
    monkeypatch.setattr("experiments.training.run_folder.write_json", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        Run(longer, resume=True)
    monkeypatch.undo()
    assert Run(settings, resume=True).train()["test_accuracy"] == whole.result["test_accuracy"]
    assert Run(longer, resume=True).length.total == 4 * PER_EPOCH


def test_a_run_whose_folder_is_damaged_is_not_extended(whole, tmp_path, capsys, monkeypatch):
    subprocess.run(["cp", "-r", str(whole.folder.path), str(tmp_path / "run")], check=True)
    longer = ["--resume", "--out", str(tmp_path / "run"), "--epochs", "4"]
    full = shutil.disk_usage(tmp_path)._replace(free=0)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: full)
    assert "checkpoints is full: " in error_of(capsys, longer)
    (tmp_path / "run" / "metrics.jsonl").unlink()
    assert "metrics.jsonl: the row of step 4 is missing" in error_of(capsys, longer)
    assert RunFolder(tmp_path / "run").config().epochs == 3
    assert RunFolder(tmp_path / "run").result() == whole.result


def test_only_a_run_that_has_ended_is_extended_and_none_is_cut(whole, tmp_path, capsys):
    out = str(tmp_path / "run")
    Run(moved(whole, tmp_path)).train(stop_after=2)
    text = error_of(capsys, ["--resume", "--out", out, "--epochs", "4"])
    assert "(epochs 3 -> 4); a run can be extended when it has ended, this one has not" in text
    resume = ["--resume", "--out", out]
    output_of(capsys, resume)
    assert "(epochs 3 -> 2); leave these flags out" in error_of(capsys, [*resume, "--epochs", "2"])
    changed = [*resume, "--epochs", "4", "--lr", "0.5"]
    assert "(lr 0.05 -> 0.5); leave" in error_of(capsys, changed)
    assert "epoch 4/4" in output_of(capsys, [*resume, "--epochs", "4"])
    assert json.loads((tmp_path / "run" / "config.json").read_text())["mask_epochs"] == 3


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--method", "SUBP"], "did you mean 'subp'"),
        (["--method", "Sr_Ste"], "did you mean 'sr-ste'"),
        (["--dataset", "CIFAR-10"], "did you mean 'cifar10'"),
        (["--model", "ResNet50"], "did you mean 'resnet50'"),
        (["--subp.block=32"], "--subp.block: an option of subp, and the method is hrbp; add"),
        (["--subp.no-soft"], "--subp.no-soft: an option of subp, and the method is hrbp; add"),
        (
            ["--subp.bloc", "32"],
            "--subp.bloc: subp has no such option, did you mean --subp.block?; all of them: "
            "python -m experiments.train --method subp --help",
        ),
        (
            ["--dense.x=3"],
            "--dense.x: dense has no such option; all of them: python -m experiments.train "
            "--method dense --help",
        ),
        (
            ["--method", "subp", "--subp.bloc", "32"],
            "python -m experiments.train --method subp --help",
        ),
        (["--methd", "subp"], "python -m experiments.train --help"),
    ],
)
def test_a_wrong_word_points_to_the_right_one(capsys, monkeypatch, arguments, words):
    monkeypatch.setenv("COLUMNS", "200")
    assert words in " ".join(error_of(capsys, arguments).replace("│", " ").split())


def test_the_help_says_what_out_and_epochs_mean(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit):
        cli(["--help"])
    text = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "runs/DATASET-MODEL-METHOD-SPARSITY-SEED" in text
    assert "--epochs may extend a run that has ended" in text
    assert "--mask-epochs" not in text


def test_a_resumed_run_needs_no_method_for_the_help_of_its_own_options(tmp_path):
    settings = config(tmp_path, "sr-ste", {"n": 1}, sparsity=None)
    RunFolder(settings.out).start(resolve(settings))
    read, resume = command_line.parse(["--resume", "--out", settings.out])
    assert resume
    assert read == resolve(settings)


def test_a_comparison_that_is_stopped_says_so(tmp_path, capsys, monkeypatch):
    signal_in(monkeypatch, Run, "_train_step", [signal.SIGTERM], lambda run, *_: run.step == 1)
    smoke = ["--smoke", "--methods", "dense", "--out", str(tmp_path / "all")]
    with pytest.raises(SystemExit) as stop:
        compare.cli(smoke)
    assert stop.value.code == 128 + signal.SIGTERM
    assert capsys.readouterr().err == "stopped; a comparison starts anew, with another --out\n"
    monkeypatch.undo()
    with pytest.raises(SystemExit) as stop:
        compare.cli(smoke)
    assert stop.value.code == 2
    assert capsys.readouterr().err == (
        f"error: out: {tmp_path / 'all'} is not empty; choose another --out\n"
    )


@pytest.mark.slow
def test_kills_at_random_moments_give_the_same_bits(tmp_path):
    """Real processes, real signals, SIGKILL among them, up to seconds after the run began."""
    settings = config(tmp_path, "hrbp-dynamic", epochs=4, checkpoint_every=2)
    whole = Run(dataclasses.replace(settings, out=str(tmp_path / "whole")))
    whole.train()
    folder, rng = RunFolder(settings.out), random.Random(0)
    rows = folder.path / "metrics.jsonl"
    cached = host_devices(1)  # the compilation cache of these tests
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGKILL, signal.SIGKILL):
        began = (folder.path / "config.json").exists()
        arguments = ["--resume", "--out", settings.out] if began else flags(settings)
        start = time.time()
        with open(tmp_path / "log", "w+") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "experiments.train", *arguments],
                stdout=log,
                stderr=log,
                env=os.environ | cached | {"JAX_PLATFORMS": "cpu"},
            )
            while process.poll() is None and not (rows.exists() and rows.stat().st_mtime > start):
                time.sleep(0.01)  # until it goes on from its checkpoint
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(rng.uniform(0, 6 if number == signal.SIGKILL else 2))
            process.send_signal(number)
            code = process.wait(120)
            log.seek(0)
            text = log.read()
        assert code in (0, -number, 128 + number), text
        assert "Traceback" not in text
        print(number, code, folder.latest())
    again = Run(settings, resume=True)
    again.train()
    assert_same_run(again, whole)
