"""Every method of the registry learns, runs with its defaults, and goes on where it was stopped."""

import dataclasses
import json

import pytest
from small_runs import fixes_sparsity
from tiny_runs import PER_EPOCH, assert_same_run, config, output_of

from experiments.training.config import TrainConfig
from experiments.training.registry import METHODS
from experiments.training.run import Run

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("method", METHODS)
def test_two_epochs_with_the_defaults(method, tmp_path, capsys):
    """The command that README and the table of methods promise."""
    out = tmp_path / "run"
    output_of(capsys, ["--method", method, "--epochs", "2", "--out", str(out)])
    result = json.loads((out / "result.json").read_text())
    assert result["method"] == method
    assert result["nonzero_pruned"] == 0 or METHODS[method].options.make_pattern() is None


@pytest.mark.parametrize("method", METHODS)
def test_a_cnn_learns_digits(method, tmp_path):
    """At 80% sparsity, or at what the method fixes."""
    sparsity = None if fixes_sparsity(method) else 0.8
    settings = TrainConfig(
        method=method, sparsity=sparsity, epochs=12, width=0.5, out=str(tmp_path / "run")
    )
    assert Run(settings).train()["test_accuracy"] >= 0.9


@pytest.mark.parametrize("method", METHODS)
def test_a_run_that_is_stopped_amid_its_schedule_gives_the_same_bits(method, tmp_path):
    """The masks are drawn on from the checkpoint as without the stop."""
    sparsity = None if fixes_sparsity(method) else 0.8
    settings = config(tmp_path, method=method, sparsity=sparsity, epochs=2)
    whole = Run(dataclasses.replace(settings, out=str(tmp_path / "whole")))
    whole.train()
    for stop in (PER_EPOCH // 2, PER_EPOCH + 3):
        run = Run(settings, resume=stop > PER_EPOCH)
        assert run.train(stop_after=stop) is None
    resumed = Run(settings, resume=True)
    resumed.train()
    assert_same_run(resumed, whole)
