"""Variational dropout and Deep Compression in the trainer: what a run leaves, and resumes."""

import dataclasses

import jax
import numpy as np
import pytest
from tiny_runs import PER_EPOCH, assert_same_run, config

import blocksparse_jax as bsj
from experiments.training.config import TrainConfig, resolve
from experiments.training.execution import masks_of
from experiments.training.methods import DeepCompression, VariationalDropout
from experiments.training.run import Run

pytestmark = pytest.mark.usefixtures("without_pictures")


def run_and_resumed(settings, tmp_path, stop):
    run = Run(settings)
    result = run.train()
    again = dataclasses.replace(settings, out=str(tmp_path / "resumed"))
    Run(again).train(stop_after=stop)
    resumed = Run(again, resume=True)
    resumed.train()
    assert_same_run(resumed, run)
    return run, result


def test_deep_compression_leaves_a_coded_network(tmp_path):
    """Stopped while its centroids train."""
    settings = config(tmp_path, "deep-compression", {"conv_bits": 4, "dense_bits": 3})
    run, result = run_and_resumed(settings, tmp_path, stop=27)
    data = (run.folder.path / "network.bsjc").read_bytes()
    network = {"params": run.state.params, "batch_stats": run.state.batch_stats}
    decoded = bsj.decompress(data, network)
    for before, after in zip(jax.tree.leaves(network), jax.tree.leaves(decoded), strict=True):
        np.testing.assert_array_equal(before, after)
    assert result["compression_rate"] == result["uncompressed_bits"] / (8 * len(data))
    assert sum(result["compressed_bits"].values()) == 8 * len(data)
    assert result["compression_rate"] > 10
    assert result["density"] == pytest.approx(0.2, abs=0.005)
    for name, most in (("conv1", 16), ("conv3", 16), ("stem", 16), ("classifier", 8)):
        kernel = np.asarray(run.state.params[name]["kernel"])
        assert np.unique(kernel[kernel != 0]).size <= most


@pytest.mark.parametrize("sparsity", [None, pytest.param(0.75, marks=pytest.mark.slow)])
def test_variational_dropout_prunes_by_its_threshold_or_to_a_sparsity(tmp_path, sparsity):
    options = {"variance_lr": 0.5, "initial_log_sigma2": -4.0}
    settings = config(tmp_path, "variational-dropout", options, epochs=2, sparsity=sparsity)
    run, result = run_and_resumed(settings, tmp_path, stop=PER_EPOCH - 2)
    expected = bsj.variational_masks(run.state.params, sparsity=sparsity)
    masks = masks_of(run.state)
    for name in ("conv1", "conv2", "conv3"):
        mask = masks[name]["kernel"]
        np.testing.assert_array_equal(mask, expected[name]["kernel"])
        assert np.asarray(run.state.params[name]["kernel"])[~np.asarray(mask)].any()  # trains on
    if sparsity is None:
        assert 0 < result["density"] < 0.999
        assert result["sparsity"] == 0
    else:
        assert result["density"] == pytest.approx(0.25, abs=0.001)


def test_fractions_of_the_run_are_in_order():
    for name, options, message in (
        ("deep-compression", DeepCompression(share_at=0.3), "prune_until < share_at"),
        ("deep-compression", DeepCompression(conv_bits=20), "conv_bits: expected 1 to 16 bits"),
        ("variational-dropout", VariationalDropout(warm_up_end=0.0), "warm_up_start < warm_up_end"),
        ("variational-dropout", VariationalDropout(variance_lr=0.0), "variance_lr"),
    ):
        with pytest.raises(ValueError, match=message):
            resolve(TrainConfig(method=name, options=options))
