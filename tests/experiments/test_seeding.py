"""The masks of a finished run seed another: with new weights, or with earlier ones of that run."""

import dataclasses

import jax
import numpy as np
import pytest
from tiny_runs import assert_same_run, config, error_of

from experiments import evaluate
from experiments.training import command_line
from experiments.training.execution import checkpoint_like, masks_of, to_form
from experiments.training.run import Run

pytestmark = pytest.mark.usefixtures("without_pictures")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of RigL whose masks have moved, with a checkpoint of step 7."""
    folder = tmp_path_factory.mktemp("finished")
    run = Run(config(folder, "rigl", epochs=2, keep_checkpoint=7))
    first = masks_of(run.state)
    run.train()
    assert not same(first, masks_of(run.state))
    return run


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    run = Run(config(tmp_path_factory.mktemp("packed"), "hrbp-dynamic", epochs=1))
    run.train()
    return run


def same(a, b):
    leaves = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return all(np.array_equal(x, y) for x, y in leaves)


def seeded(run, tmp_path, **fields):
    fields = {"out": str(tmp_path / "seeded"), "keep_checkpoint": None, "epochs": 1} | fields
    return dataclasses.replace(run.config, masks=str(run.folder.path), **fields)


def weights(run):
    return to_form("masked", run.state).params


def test_the_masks_stay_and_the_weights_are_new(finished, tmp_path):
    run = Run(seeded(finished, tmp_path))
    masks = masks_of(finished.state)
    assert same(masks_of(run.state), masks)
    initial, _ = finished.trainer.initial()
    new, kept = weights(run)["conv2"]["kernel"], np.asarray(masks["conv2"]["kernel"])
    assert not np.any(np.asarray(new)[~kept])
    overlap = np.asarray(new)[kept] == np.asarray(initial["conv2"]["kernel"])[kept]
    assert not overlap.any()
    run.train()
    assert same(masks_of(run.state), masks)
    assert run.result["nonzero_pruned"] == 0
    assert run.result["method"] == "rigl"


@pytest.mark.slow
def test_a_packed_run_seeds_a_packed_one(packed, tmp_path):
    run = Run(seeded(packed, tmp_path))
    assert run.state.form == "packed"
    assert same(run.state.layouts, packed.state.layouts)
    run.train()
    assert same(masks_of(run.state), masks_of(packed.state))


@pytest.mark.parametrize("step", [0, 7])
def test_rewinding_takes_the_weights_of_a_step(finished, tmp_path, step):
    """Also those that the masks of that step had pruned, where they are the initial ones."""
    run = Run(seeded(finished, tmp_path, rewind=step))
    if step:
        like = checkpoint_like(finished.state.form, finished.state)
        then, *_ = finished.folder.checkpoints.restore(step, like)
        params, batch_stats = then.params, then.batch_stats
    else:
        params, batch_stats = finished.trainer.initial()
    masks = masks_of(finished.state)
    expected = jax.tree.map(lambda w, mask: np.where(mask, w, 0), params, masks)
    assert same(weights(run), expected)
    assert same(run.state.batch_stats, batch_stats)
    assert same(masks_of(run.state), masks)


def test_a_seeded_run_stops_resumes_and_is_evaluated(finished, tmp_path, capsys):
    whole = Run(seeded(finished, tmp_path / "whole"))
    whole.train()
    settings = seeded(finished, tmp_path / "stopped")
    Run(settings).train(stop_after=5)
    resumed = Run(settings, resume=True)
    resumed.train()
    assert_same_run(resumed, whole)
    found = evaluate.main(evaluate.EvaluateConfig(run=str(resumed.folder.path)))
    assert found["test_accuracy"] == pytest.approx(whole.result["test_accuracy"])


def test_the_config_of_the_run_with_the_masks_stands_for_flags(finished, tmp_path):
    path = str(finished.folder.path)
    new, resume = command_line.parse(["--masks", path, "--lr", "0.5"])
    assert not resume
    assert (new.method, new.width, new.lr, new.masks) == ("rigl", 0.25, 0.5, path)
    assert (new.keep_checkpoint, new.rewind, new.mask_epochs) == (None, None, None)
    assert new.options == finished.config.options
    assert new.out != finished.config.out
    assert "masksrun" in new.out


def test_a_kept_checkpoint_stays(finished):
    assert finished.folder.checkpoints.steps() == [7, 11, 22]


def test_what_cannot_be_seeded_is_refused(finished, tmp_path, capsys):
    path = str(finished.folder.path)
    new = ["--masks", path, "--out", str(tmp_path / "new")]
    text = error_of(capsys, [*new, "--model", "resnet20"])
    assert "is a run with model 'cnn', not 'resnet20'" in text
    assert "width 0.25, not 0.5" in error_of(capsys, [*new, "--width", "0.5"])
    text = error_of(capsys, [*new, "--method", "snfs"])
    assert "method 'rigl', not 'snfs'" in text
    text = error_of(capsys, [*new, "--rewind", "8"])
    assert "has checkpoints of the steps 7, 11, 22" in text
    assert "none of step 8; train it with --keep-checkpoint 8" in text
    text = error_of(capsys, ["--masks", str(tmp_path / "none")])
    assert "none is no run folder" in text
    assert "rewind: 3 is a step of the run" in error_of(capsys, ["--rewind", "3"])
    text = error_of(capsys, ["--keep-checkpoint", "999", "--epochs", "1", *new[2:]])
    assert "keep_checkpoint: expected a step up to 22" in text
    assert not (tmp_path / "new").exists()


def test_a_run_without_masks_or_end_is_refused(tmp_path, capsys):
    dense = Run(config(tmp_path / "dense", "dense", epochs=1, sparsity=None))
    new = ["--masks", str(dense.folder.path), "--out", str(tmp_path / "new")]
    dense.train(stop_after=3)
    assert "has not ended; finish it first" in error_of(capsys, new)
    dense.train()
    assert "is a dense run, which has no masks" in error_of(capsys, new)
