"""The command line, the run folder, stop and resume, and the errors a user meets."""

import dataclasses
import json
import os
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import optax
import pytest
from new_process import cache
from tiny_runs import PER_EPOCH, assert_same_run, config, error_of, flags, output_of

from experiments import evaluate, report
from experiments.train import cli
from experiments.training import command_line, methods, plots, progress
from experiments.training.config import TrainConfig, resolve
from experiments.training.execution import layouts_of, masks_of
from experiments.training.run import Run
from experiments.training.run_folder import RunFolder

RESULT = {
    *(
        "method",
        "dataset",
        "model",
        "seed",
        "sparsity",
        "density",
        "test_accuracy",
        "kept_flops_fraction",
        "step_ms_median",
    ),
    *("step_ms_iqr", "epochs", "versions", "device", "execution", "precision", "commit"),
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """One whole run of packed dynamic HRBP."""
    settings = config(tmp_path_factory.mktemp("finished"), method="hrbp-dynamic")
    run = Run(settings)
    result = run.train()
    return settings, run, result


def test_the_command_of_the_readme(tmp_path):
    command = (
        "-m experiments.train --dataset digits --model cnn --method hrbp --sparsity 0.9 --epochs 1 "
        "--seed 0 --width 0.25 --out"
    )
    done = subprocess.run(
        [sys.executable, *command.split(), str(tmp_path / "a")],
        capture_output=True,
        text=True,
        env=os.environ | cache(),
    )
    assert done.returncode == 0, done.stderr
    first, *_ = done.stdout.splitlines()
    assert first.startswith("hrbp on digits: cnn, 1 epochs of batches of 64, packed, float32; cpu")
    assert f"run folder {tmp_path / 'a'}" in first
    assert "test accuracy" in done.stdout
    assert "conv1/kernel" in done.stdout
    assert json.loads((tmp_path / "a" / "result.json").read_text())["density"] == pytest.approx(
        0.1, abs=0.002
    )


def test_run_folder(finished):
    settings, run, result = finished
    folder = run.folder.path
    assert set(result) >= RESULT
    assert json.loads((folder / "result.json").read_text()) == result
    assert run.folder.config() == run.config == resolve(settings)
    assert json.loads((folder / "config.json").read_text())["options"]["group_size"] == 16
    assert result["density"] == pytest.approx(0.2, abs=0.001)
    assert result["test_accuracy"] > 0.3
    assert (
        0.19 < result["kept_flops_fraction"] < 0.5
    )  # the stem, dense, weighs more in a small network
    assert result["step_ms_median"] > 0
    rows = run.folder.metrics()
    epochs = [row for row in rows if row["kind"] == "epoch"]
    assert [row["step"] for row in epochs] == [PER_EPOCH, 2 * PER_EPOCH, 3 * PER_EPOCH]
    assert epochs[0]["sad"] > 0
    assert epochs[-1]["lr"] < epochs[0]["lr"]
    assert [row["step"] for row in rows if row["kind"] == "train"] == [4, 8, 12, 16, 20, 24, 28, 32]
    for picture in ("learning_curves.png", "block_structure.png"):
        assert (folder / picture).read_bytes().startswith(b"\x89PNG")
    assert run.folder.latest() == 3 * PER_EPOCH


def test_block_structure_draws_each_sparse_layer(finished):
    _, run, _ = finished
    masks, layouts = masks_of(run.state), layouts_of(run.state)
    drawn = [ax for ax in plots.block_structure(masks, layouts).axes if ax.images]
    assert [ax.get_title().split("\n")[0] for ax in drawn] == [
        "conv1/kernel",
        "conv2/kernel",
        "conv3/kernel",
    ]
    kernels = (
        np.asarray(masks["conv1"]["kernel"])
        .mean((0, 1))
        .T[np.asarray(layouts["conv1"]["kernel"].filters).reshape(-1)]
    )
    np.testing.assert_allclose(drawn[0].images[0].get_array(), kernels)
    assert len(drawn[0].lines) == layouts["conv1"]["kernel"].filters.shape[0] - 1
    figure = plots.block_structure(masks, layouts, title="hrbp-dynamic: cnn on digits")
    assert figure.get_suptitle() == "hrbp-dynamic: cnn on digits"
    assert (
        "white keeps no tap, black keeps all; red lines separate the groups"
        in figure.get_supxlabel()
    )
    assert "red lines" not in plots.block_structure(masks, {}).get_supxlabel()


@pytest.mark.parametrize(
    ("sads", "final"), [((0.0, 0.3, 0.1, 0.0, 0.0), 3), ((0.0, 0.0, 0.0), None), ((0.1, 0.1), None)]
)
def test_learning_curves_say_where_the_masks_became_final(sads, final):
    numbers = dict.fromkeys(("loss", "train_accuracy", "test_accuracy", "density"), 0.5)
    figure = plots.learning_curves(
        [{"kind": "epoch", "epoch": i, "sad": sad, **numbers} for i, sad in enumerate(sads)]
    )
    for ax in figure.axes:
        marks = [line for line in ax.lines if line.get_label().startswith("masks final")]
        assert [(line.get_label(), line.get_xdata()[0]) for line in marks] == (
            [(f"masks final in epoch {final}", final)] if final else []
        )


def test_a_report_shows_the_run(finished, tmp_path):
    """Every curve, layer and result, with the numbers of the run."""
    _, run, result = finished
    out = tmp_path / "report.html"
    settings = report.ReportConfig(runs=(str(run.folder.path),), out=str(out))
    assert report.main(settings) == []
    text = out.read_text()
    last = run.folder.metrics()[-1]
    for title, value in (
        ("Test accuracy", result["test_accuracy"]),
        ("Density", result["density"]),
        ("SAD", last["sad"]),
        ("Exploration (ITOP)", result["itop"]),
    ):
        assert f'aria-label="{title} over the epochs: run ends at {value:.4g}"' in text
    assert "No run has a value yet" not in text
    for name in ("kept_flops_fraction", "training_flops_fraction"):
        assert f"<td class='n'>{result[name]:.1%}</td>" in text
    for name, mask in masks_of(run.state).items():
        if "kernel" in mask and mask["kernel"].ndim:
            kernel = mask["kernel"]
            assert f"{kernel.sum():,} of {kernel.size:,}</td>" in text
            assert f"Mask of {name}/kernel: {kernel.shape[3]} filters down" in text


def test_evaluate_gives_the_accuracy_of_the_run(finished, capsys):
    _, run, result = finished
    assert (
        evaluate.main(evaluate.EvaluateConfig(run=str(run.folder.path)))["test_accuracy"]
        == result["test_accuracy"]
    )
    assert "hrbp-dynamic" in capsys.readouterr().out
    with pytest.raises(
        ValueError, match=rf"has no checkpoint of step 3; it has {2 * PER_EPOCH}, {3 * PER_EPOCH}$"
    ):
        evaluate.main(evaluate.EvaluateConfig(run=str(run.folder.path), step=3))


def test_resume_of_an_ended_run_changes_nothing(finished, capsys):
    """The folder alone says what the run is; its seconds are those of all sessions."""
    settings, run, result = finished
    before = (run.folder.path / "metrics.jsonl").read_text()
    assert Run(settings, resume=True).train() == result
    assert f"{result['test_accuracy']:.2%}" in output_of(
        capsys, ["--out", settings.out, "--resume"]
    )
    assert "sparsity 0.8 -> 0.5" in error_of(
        capsys, ["--out", settings.out, "--resume", "--sparsity", "0.5"]
    )
    assert (run.folder.path / "metrics.jsonl").read_text() == before


def test_resume_gives_the_same_bits(finished, tmp_path):
    """Stopped at an epoch's end and in the middle of one."""
    settings, run, _ = finished
    settings = dataclasses.replace(settings, out=str(tmp_path / "again"))
    assert Run(settings).train(stop_after=PER_EPOCH) is None
    resumed = Run(settings, resume=True)
    assert resumed.step == PER_EPOCH
    assert resumed.train(stop_after=18) is None
    resumed = Run(settings, resume=True)
    assert resumed.step == 18
    resumed.seconds += 1000
    assert resumed.train()["train_seconds"] > 1000
    assert_same_run(resumed, run)
    assert Run(settings, resume=True).seconds > 1000


def test_resume_after_crashes_gives_the_same_bits(tmp_path, monkeypatch):
    """SUBP crashes in its soft phase, and again after it, packed."""
    options = {"method": "subp", "options": {"update_every": PER_EPOCH}}
    run = Run(config(tmp_path, out=str(tmp_path / "whole"), **options))
    run.train()
    settings = config(tmp_path, checkpoint_every=7, **options)
    resumed = Run(settings)
    for crash_at, last, form in ((20, 14, "masked"), (30, 28, "packed")):
        inner = resumed.trainer.step

        def crash(state, number, images, labels, inner=inner, crash_at=crash_at):
            if number == crash_at:
                raise KeyboardInterrupt
            return inner(state, number, images, labels)

        monkeypatch.setattr(resumed.trainer, "step", crash)
        with pytest.raises(KeyboardInterrupt):
            resumed.train()
        resumed = Run(settings, resume=True)
        assert resumed.step == last
        assert resumed.state.form == form
    resumed.train()
    assert_same_run(resumed, run)


@pytest.mark.parametrize(
    ("flag", "value", "nearest"),
    [
        ("dataset", "cifar1O", "cifar10"),
        ("model", "resnet33", "resnet3"),
        ("method", "hrpb", "hrbp"),
        ("execution", "paked", "packed"),
        ("precision", "bfloat", "bfloat16"),
        ("optimizer", "sdg", "sgd"),
        ("hrbp.budget", "erkk", "erk"),
        ("hrbp.scores", "magnitud", "magnitude"),
        ("subp.criterion", "l11", "l1"),
        ("gradual.pattern", "kernels", "kernel"),
        ("drop-and-grow.grow", "randm", "random"),
    ],
)
def test_a_typo_names_the_nearest_option(tmp_path, capsys, flag, value, nearest):
    method, _, name = flag.rpartition(".")
    chosen = ["--method", method] if method else []
    text = error_of(capsys, [*chosen, f"--{flag}", value, "--out", str(tmp_path / "run")])
    assert f"{name}: " in text
    assert value in text
    assert f"did you mean '{nearest}" in text
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--sparsity", "1.0"], "sparsity: expected a number in [0.0, 1.0)"),
        (["--hrbp.group-size", "0"], "group_size: expected an integer of at least 1"),
        (["--method", "rigl", "--execution", "packed"], "hrbp, hrbp-dynamic, subp, random-channel"),
        (["--dataset", "cifar10"], "python -m experiments.prepare_data --dataset cifar10"),
        (["--batch-size", "4096"], "batch_size: "),
        (["--implementation", "cuda"], "expected one of 'xla', 'cpu', 'dense'"),
        (["--implementation", "mosaic_gpu"], "cannot run here"),
        (
            ["--method", "sr-ste", "--sr-ste.m", "5"],
            "params['conv1/kernel']: m: 5 does not divide the input axis of length 64",
        ),
        (["--method", "ste", "--ste.n", "5"], "n: expected at most m=4, got 5"),
        (
            ["--method", "sr-ste", "--sparsity", "0.9"],
            "sparsity: sr-ste has 0.5 (NOfM(n=2, m=4, axis='input')); leave --sparsity out",
        ),
        (
            ["--method", "rigl", "--subp.block", "32"],
            "--subp.block: an option of subp, and the method is rigl; add --method subp",
        ),
        (
            ["--hrbp.channel-order"],
            "channel_order: it serves runs of channels by magnitude, expected channel_block=8",
        ),
        (
            ["--method", "gradual", "--gradual.pattern", "unstructured:3"],
            "pattern: 'unstructured' does not take the arguments of 'unstructured:3'",
        ),
        (
            ["--method", "rigl", "--rigl.update-every", "0"],
            "update_every: expected an integer of at least 1",
        ),
        (
            ["--method", "dense", "--sparsity", "0.9"],
            "sparsity: dense has 0; leave --sparsity out, got 0.9",
        ),
        (["--stem", "imagenet"], "stem: "),
        (
            ["--method", "rigl", "--rigl.budget", "nonsense"],
            "budget: expected one of 'uniform', 'erk', 'er', 'global', got 'nonsense'",
        ),
        (["--lr", "-1"], "lr: expected a number above 0, got -1.0"),
        (["--width", "0"], "width: expected a number above 0, got 0.0"),
        (["--weight-decay", "-0.1"], "weight_decay: expected a number of at least 0"),
        (["--momentum", "1"], "momentum: expected a number in [0.0, 1.0)"),
        (
            ["--method", "rigl", "--rigl.drop-fraction", "1.5"],
            "drop_fraction: expected a number in [0.0, 1.0]",
        ),
        (["--hrbp.block-density", "0"], "block_density: expected"),
        (
            ["--method", "gradual", "--gradual.pattern", "n_of_m:2:4"],
            "pattern: 'n_of_m:2:4' always keeps 0.5 of the weights, so there is nothing to prune",
        ),
        (
            ["--method", "gradual", "--gradual.pattern", "block:x"],
            "pattern: 'block:x': group_size: expected an integer of at least 1, got 'x'",
        ),
        (["--method", "subp", "--subp.block", "0"], "error: block: expected an integer of at"),
        (["--resume"], "does not exist, so there is no run to go on with; leave --resume out"),
    ],
)
def test_bad_input_ends_with_one_line(tmp_path, capsys, arguments, words):
    data = ["--data-dir", str(tmp_path / "data")]
    assert words in error_of(capsys, [*arguments, *data, "--out", str(tmp_path / "run")])
    assert not (tmp_path / "run").exists()


def test_a_full_folder_is_not_overwritten(tmp_path, capsys):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "notes.txt").write_text("mine")
    assert "--resume" in error_of(capsys, ["--out", str(tmp_path / "run")])
    for resume in ([], ["--resume"]):
        assert "notes.txt is a file; choose a folder" in error_of(
            capsys, ["--out", str(tmp_path / "run" / "notes.txt"), *resume]
        )
    assert "config.json: missing" in error_of(capsys, ["--out", str(tmp_path / "run"), "--resume"])
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["notes.txt"]


@pytest.fixture
def stopped(finished, tmp_path):
    """A copy of the finished run, as if stopped before its end."""
    settings, run, _ = finished
    settings = dataclasses.replace(settings, out=str(tmp_path / "copy"))
    subprocess.run(["cp", "-r", str(run.folder.path), settings.out], check=True)
    folder = RunFolder(settings.out)
    (folder.path / "result.json").unlink()
    return settings, folder


def test_resume_with_another_config_names_the_fields(stopped, capsys):
    settings, _ = stopped
    options = dataclasses.replace(settings.options, group_size=8)
    other = dataclasses.replace(settings, sparsity=0.5, seed=3, options=options)
    text = error_of(capsys, [*flags(other), "--resume"])
    assert "seed 0 -> 3" in text
    assert "hrbp-dynamic.group_size 16 -> 8" in text
    assert "sparsity 0.8 -> 0.5" in text
    assert "epochs" not in text


@pytest.fixture
def one_of_four(tmp_path):
    """The flags that go on with a run of one weight in four; its config is all there is."""
    settings = config(tmp_path, "sr-ste", {"n": 1}, sparsity=None)
    RunFolder(settings.out).start(resolve(settings))
    return ["--resume", "--out", settings.out]


def test_resume_reads_the_method_from_the_folder(one_of_four):
    settings, resume = command_line.parse([*one_of_four, "--sr-ste.n", "1"])
    assert (settings.method, settings.options.n, settings.sparsity, resume) == (
        "sr-ste",
        1,
        0.75,
        True,
    )


@pytest.mark.parametrize(
    ("arguments", "changed"),
    [
        (["--sr-ste.n", "2"], "sr-ste.n 1 -> 2"),
        (["--method", "sr-ste", "--sr-ste.n", "2"], "sr-ste.n 1 -> 2"),
        (["--sparsity", "0.5"], "sparsity 0.75 -> 0.5"),
        (["--method", "hrbp"], "method 'sr-ste' -> 'hrbp'"),
    ],
)
def test_resume_names_only_what_was_given(one_of_four, capsys, arguments, changed):
    text = error_of(capsys, [*one_of_four, *arguments])
    assert f"is a run with another config ({changed}); leave these flags out" in text


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "not JSON"),
        ("[]", "expected a map of fields, got list"),
        ('{"dataset": "digits"}', "other fields"),
        ('{"method": "rigl", "options": {"depth": 3}}', "other fields"),
    ],
)
def test_a_garbled_config_is_named(stopped, capsys, text, words):
    settings, folder = stopped
    (folder.path / "config.json").write_text(text)
    message = error_of(capsys, [*flags(settings), "--resume"])
    assert "config.json" in message
    assert words in message


def test_a_truncated_checkpoint_is_named_and_the_one_before_works(stopped, capsys):
    settings, folder = stopped
    last = folder.path / "checkpoints" / f"{3 * PER_EPOCH}.zip"
    last.write_bytes(last.read_bytes()[: last.stat().st_size // 2])
    message = error_of(capsys, [*flags(settings), "--resume"])
    assert f"{last}: " in message
    assert "is damaged" in message
    assert "delete it to go on from the checkpoint before it" in message
    last.unlink()
    resumed = Run(settings, resume=True)
    assert resumed.step == 2 * PER_EPOCH
    resumed.train()


def test_a_garbled_row_of_metrics_is_named(stopped, capsys):
    settings, folder = stopped
    path = folder.path / "metrics.jsonl"
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines, lines[0][:10]]))  # cut short by a stop: left out
    assert len(folder.metrics()) == len(lines)
    path.write_text("\n".join([lines[0][:10], *lines[1:]]))
    message = error_of(capsys, [*flags(settings), "--resume"])
    assert "metrics.jsonl" in message
    assert "line 1" in message


def test_evaluate_of_no_run(tmp_path):
    with pytest.raises(
        ValueError, match=r"config\.json: missing, so .* is not the folder of a run$"
    ):
        evaluate.main(evaluate.EvaluateConfig(run=str(tmp_path)))


def test_a_loss_that_is_not_finite_ends_the_run(tmp_path, capsys):
    settings = config(tmp_path, "dense", sparsity=None, lr=1e30, epochs=1)
    text = error_of(capsys, flags(settings), code=1)
    assert "the loss is " in text
    assert "lower --lr (1e+30)" in text


def test_without_a_terminal_a_slow_run_says_how_far_it_is(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(progress, "_QUIET", -1)
    out = output_of(capsys, flags(config(tmp_path, "random-channel", epochs=1)))
    assert "random-channel step 4/11: loss " in out
    # The name of the command line, not of the transformation.
    assert "\nrandom-channel: sparse layers keep 0.19" in out
    evaluate.main(evaluate.EvaluateConfig(run=str(tmp_path / "run")))
    assert "\nrandom-channel: sparse layers keep 0.19" in capsys.readouterr().out


def test_the_methods_that_fix_their_sparsity_store_it():
    assert [resolve(TrainConfig(method=name)).sparsity for name in ("dense", "sr-ste", "hrbp")] == [
        0.0,
        0.5,
        0.9,
    ]
    one_of_four = TrainConfig(method="ste", options=methods.NOfM(n=1))
    assert resolve(one_of_four).sparsity == 0.75
    with pytest.raises(ValueError, match="options: expected Subp"):
        resolve(TrainConfig(method="subp", options=methods.NOfM()))


def test_help_shows_the_options_of_the_chosen_method_only(capsys):
    with pytest.raises(SystemExit):
        cli(["--method", "subp", "--help"])
    text = capsys.readouterr().out
    assert "--subp.block" in text
    assert "--lr" in text
    assert "group-size" not in text


def test_a_run_says_how_many_pruned_weights_are_not_zero(tmp_path, capsys):
    """Nothing keeps them zero when a user's optimizer moves them after the method's chain."""
    run = Run(config(tmp_path, "rigl", epochs=1))
    for name in ("conv1", "conv2"):
        run.state.params[name]["kernel"] += 1
    run._train_step(*next(iter(run.data.train_batches(0, 128, 0))))
    line, _ = run._log_epoch(0)
    assert run.folder.metrics()[-1]["nonzero_pruned"] == 0, "keep_zeros has set them back"
    assert "not zero" not in line
    for name in ("conv1", "conv2"):
        run.state.params[name]["kernel"] += 1
    masks = masks_of(run.state)
    pruned = sum(int((~masks[name]["kernel"]).sum()) for name in ("conv1", "conv2"))
    run._train_step(*next(iter(run.data.train_batches(0, 128, 0))))
    for name in ("conv1", "conv2"):
        run.state.params[name]["kernel"] += 1
    line, _ = run._log_epoch(0)
    assert f"{pruned} pruned weights are not zero" in line
    assert run.folder.metrics()[-1]["nonzero_pruned"] == pruned > 0


def test_a_run_says_what_is_not_finite(tmp_path, capsys):
    """Moments that overflow while the loss is still a number, and masks that could not change."""
    run = Run(config(tmp_path, "rigl", epochs=1))
    run._train_step(*next(iter(run.data.train_batches(0, 128, 0))))
    trace = optax.tree_utils.tree_get(run.state.opt_state, "trace")
    trace["conv1"]["kernel"] = trace["conv1"]["kernel"].at[0, 0, 0, :3].set(jnp.inf)
    opt_state = optax.tree_utils.tree_set(
        run.state.opt_state, trace=trace, nonfinite_updates=jnp.int32(2)
    )
    run.state = dataclasses.replace(run.state, opt_state=opt_state)
    line, _ = run._log_epoch(0)
    assert ", 3 weights and moments are not finite, 2 updates of the masks left out" in line
    row = run.folder.metrics()[-1]
    assert (row["nonfinite_values"], row["mask_updates_left_out"]) == (3, 2)
