"""Lottery tickets in a run: rounds that fit its length, exact rewinding, stop and resume."""

import jax
import numpy as np
import pytest
from tiny_runs import PER_EPOCH, assert_same_run, config

import blocksparse_jax as bsj
from experiments.training.config import TrainConfig, resolve
from experiments.training.execution import masks_of, to_form
from experiments.training.length import Length, Passes
from experiments.training.methods import Lottery
from experiments.training.optimizer import learning_rate, passes
from experiments.training.run import Run

pytestmark = pytest.mark.usefixtures("without_pictures")

OPTIONS = {"prune_fraction": 0.4, "rewind_fraction": 0.2}


def test_the_passes_fill_the_run():
    """Of all lengths: equal ends, as many rounds as the sparsity needs."""
    for total in (12, 44, 100, 62400):
        for fraction in (0.0, 0.03, 0.5):
            options = Lottery(rewind_fraction=fraction)
            found = options.passes(Length(10, total), 0.9)
            assert found.count == len(bsj.lottery_sparsities(0.9)) + 1 == 12
            assert len(found.ends) == 11
            last = total - found.ends[-1] + found.early
            assert found.end <= last < found.end + 12
            assert abs(found.early - fraction * found.end) <= 1
            positions = [found.position(step) for step in range(found.ends[1])]
            once = list(range(found.end))
            assert positions == once + once[found.early :]
    with pytest.raises(ValueError, match=r"11 rounds of pruning need at least 12 steps, .* has 11"):
        Lottery().passes(Length(11, 11), 0.9)
    assert Lottery().passes(Length(11, 11), 0.0) == Passes(0, 11, 1)


def test_the_learning_rate_starts_anew_in_each_pass():
    settings = resolve(TrainConfig(method="lottery", lr=2.0, options=Lottery(**OPTIONS)))
    length = Length(22, 440)
    found = passes(settings, length)
    rate = learning_rate(settings, length)
    np.testing.assert_allclose([rate(0), rate(found.end)], [2, 0], atol=1e-6)
    # the same schedule as that of a run as long as one pass
    alone = learning_rate(resolve(TrainConfig(method="dense", lr=2.0)), Length(22, found.end))
    np.testing.assert_allclose(rate(found.early), alone(found.early))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run of four passes, and its states before and after the first round."""
    run = Run(config(tmp_path_factory.mktemp("whole"), "lottery", options=OPTIONS))
    states = {}
    step = run.trainer.step
    wanted = passes(run.config, run.length)

    def recorded(state, number, *batch):
        after, metrics = step(state, number, *batch)
        if number + 1 in (wanted.early, *wanted.ends):
            states[number + 1] = jax.tree.map(np.asarray, to_form("masked", after))
        return after, metrics

    run.trainer.step = recorded
    run.train()
    return run, wanted, states


def test_each_round_prunes_what_is_left_and_goes_back(whole):
    run, wanted, states = whole
    assert wanted.early > 0
    early, before = states[wanted.early], None
    total = sum(leaf.size for leaf in jax.tree.leaves(masks_of(run.state)) if np.ndim(leaf))
    sparsities = bsj.lottery_sparsities(run.config.sparsity, OPTIONS["prune_fraction"])
    for end, sparsity in zip(wanted.ends, sparsities, strict=True):
        masks = masks_of(states[end])
        kept = sum(int(leaf.sum()) for leaf in jax.tree.leaves(masks) if np.ndim(leaf))
        assert kept == round((1 - sparsity) * total)
        if before is not None:  # nothing comes back
            again = jax.tree.map(lambda new, old: bool((new & ~old).any()), masks, before)
            assert not any(jax.tree.leaves(again))
        before = masks
        rewound = bsj.apply_masks(early.params, masks)
        jax.tree.map(np.testing.assert_array_equal, states[end].params, rewound)
        jax.tree.map(np.testing.assert_array_equal, states[end].batch_stats, early.batch_stats)
    assert run.result["density"] == pytest.approx(1 - run.config.sparsity, abs=1e-3)
    assert run.result["nonzero_pruned"] == 0


def test_the_logged_learning_rate_is_that_of_the_pass(whole):
    run, wanted, _ = whole
    rate = learning_rate(run.config, run.length)
    for row in run.folder.metrics():
        assert row["lr"] == pytest.approx(float(rate(wanted.position(row["step"] - 1))))


@pytest.mark.parametrize("stop", ["early", "between"])
def test_a_stop_and_a_resume_give_the_same_bits(whole, tmp_path, stop):
    """Before the weights to go back to are kept, and in the midst of a later pass."""
    run, wanted, _ = whole
    steps = {"early": max(1, wanted.early - 1), "between": wanted.ends[1] + 1}
    assert steps["between"] < 3 * PER_EPOCH
    settings = config(tmp_path, "lottery", options=OPTIONS)
    Run(settings).train(stop_after=steps[stop])
    resumed = Run(settings, resume=True)
    assert resumed.step == steps[stop]
    resumed.train()
    assert_same_run(resumed, run)
