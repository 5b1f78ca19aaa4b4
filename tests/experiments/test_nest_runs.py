"""NeST runs: channels grow from a narrow seed beside the weights."""

import dataclasses

import numpy as np
import pytest
from tiny_runs import assert_same_run, config

import blocksparse_jax as bsj
from experiments.models.spaces import channel_spaces
from experiments.training.registry import METHODS
from experiments.training.run import Run


def dormant(run):
    """How many channels of each space are dormant, where it can have such."""
    masks = bsj.get_masks(run.state.opt_state)
    spaces = channel_spaces(run.state.params)
    found = bsj.dormant_channels(run.state.params, masks, spaces)
    return {space: int(channels.sum()) for space, channels in found.items()}


def test_channels_grow_in_equal_portions_and_a_run_resumes_to_the_same_bits(tmp_path):
    """The schedule is 0 to 24, every 3 steps, and grows through 12; channels come one step later.

    The two spaces between sparse layers have 32 channels; the classifier and the stem are dense.
    """
    settings = config(tmp_path, "nest", {"update_every": 3}, sparsity=0.8, width=0.25)
    whole = Run(dataclasses.replace(settings, out=str(tmp_path / "whole")))
    total = {space: 2 * count for space, count in dormant(whole).items()}
    assert set(total) == {"conv1", "conv2"}
    counts = {}
    for step in (1, 4, 6, 7, 10, 13, 20):
        assert whole.train(stop_after=step) is None
        counts[step] = dormant(whole)
        assert bsj.nonzero_pruned(whole.state.params, whole.state.opt_state) == 0
    for space, size in total.items():
        left = [size // 2 - -(-size // 2 * n // 5) for n in range(1, 6)]
        portions = [counts[step][space] for step in (1, 4, 7, 10, 13)]
        np.testing.assert_allclose(portions, left, atol=1)
        assert portions[-1] == 0
        assert counts[6][space] == portions[1]
    result = whole.train()
    assert result["density"] == pytest.approx(0.2, abs=0.01)
    assert Run(settings).train(stop_after=6) is None
    resumed = Run(settings, resume=True)
    resumed.train()
    assert_same_run(resumed, whole)


def test_other_patterns_keep_all_channels():
    options = METHODS["nest"].options
    kernels = dataclasses.replace(options, pattern="kernel")
    kernels.check()
    assert kernels.operations(None) == {}
    with pytest.raises(ValueError, match="seed_channels: channels grow by single weights"):
        dataclasses.replace(kernels, seed_channels=0.5).check()
    with pytest.raises(ValueError, match="seed_channels: expected a number above 0"):
        dataclasses.replace(options, seed_channels=0.0).check()
