"""Training FLOPs and ITOP of runs equal what NumPy makes of the masks of every step."""

import numpy as np
import pytest
from tiny_runs import PER_EPOCH, assert_same_run, config

import blocksparse_jax as bsj
from experiments.training.execution import masks_of
from experiments.training.run import Run

pytestmark = pytest.mark.usefixtures("without_pictures")

# The CNN of a quarter width on digits: the stem and conv1 see 8x8 pixels, the others 4x4.
POSITIONS = {"stem": 64, "conv1": 64, "conv2": 16, "conv3": 16, "classifier": 1}
SIZES = {"stem": 144, "conv1": 4608, "conv2": 9216, "conv3": 18432, "classifier": 640}
DENSE = 144 * 64 + 4608 * 64 + 9216 * 16 + 18432 * 16 + 640


def recorded(run):
    """Trains, and gives the masks with which each step began."""
    masks, step_of = [], run.trainer.step

    def step(state, step, images, labels):
        masks.append(
            {
                name: np.asarray(mask["kernel"])
                for name, mask in masks_of(state).items()
                if name in SIZES
            }
        )
        return step_of(state, step, images, labels)

    run.trainer.step = step
    run.train()
    masks.append({name: np.asarray(masks_of(run.state)[name]["kernel"]) for name in SIZES})
    return masks


def expected(masks, dense_gradient, steps):
    """The fraction of dense training: forward pass, input and kernel gradients of each step."""
    total = 0
    for step in range(steps):
        kept = {n: int(m.sum()) if m.ndim else SIZES[n] for n, m in masks[step].items()}
        forward = sum(kept[name] * positions for name, positions in POSITIONS.items())
        total += 2 * forward + (DENSE if dense_gradient(step) else forward)
    return total / (3 * DENSE * steps)


def explored(masks):
    sparse = [name for name, mask in masks[0].items() if mask.ndim]
    ever = [np.logical_or.reduce([at[name] for at in masks]) for name in sparse]
    return sum(mask.sum() for mask in ever) / sum(mask.size for mask in ever)


@pytest.mark.parametrize(
    ("method", "execution", "needs_dense"),
    [
        ("rigl", "masked", lambda step: step in (5, 10, 15)),
        ("campfire", "masked", lambda step: False),
        pytest.param(
            *("hrbp-dynamic", "packed", lambda step: step in (5, 10, 15)), marks=pytest.mark.slow
        ),
        pytest.param("sr-ste", "masked", lambda step: True, marks=pytest.mark.slow),
    ],
)
def test_a_run_counts_every_step_with_its_masks(tmp_path, method, execution, needs_dense):
    fields = {"sparsity": None} if method == "sr-ste" else {}
    run = Run(config(tmp_path, method, execution=execution, epochs=2, **fields))
    masks = recorded(run)
    steps = 2 * PER_EPOCH
    assert run.result["training_flops_fraction"] == pytest.approx(
        expected(masks, needs_dense, steps), rel=1e-12
    )
    assert run.result["itop"] == pytest.approx(explored(masks), rel=1e-6)
    assert run._history.density() == pytest.approx(run.result["density"], rel=1e-6)
    epochs = [row for row in run.folder.metrics() if row["kind"] == "epoch"]
    assert epochs[0]["training_flops_fraction"] == pytest.approx(
        expected(masks, needs_dense, PER_EPOCH), rel=1e-12
    )
    assert epochs[0]["itop"] == pytest.approx(explored(masks[: PER_EPOCH + 1]), rel=1e-6)
    if method == "campfire":
        fractions = [row["training_flops_fraction"] for row in epochs]
        assert run.result["kept_flops_fraction"] < fractions[1] < fractions[0] < 1
        assert run.result["itop"] == 1  # it begins dense
    else:
        assert run.result["density"] < run.result["itop"] < 1  # weights move


def test_dense_training_takes_all_flops_and_activates_all_weights(tmp_path):
    result = Run(config(tmp_path, "dense", sparsity=None, epochs=1)).train()
    assert result["training_flops_fraction"] == 1
    assert result["itop"] == 1


def test_variational_dropout_computes_means_variances_and_the_pruned_network(tmp_path):
    """All of its weights train; masks save nothing but in the pass without noise."""
    result = Run(config(tmp_path, "variational-dropout", epochs=1)).train()
    noisy = DENSE - SIZES["stem"] * POSITIONS["stem"] - SIZES["classifier"]
    expected = (3 * DENSE + 3 * noisy + DENSE) / (3 * DENSE)  # nothing is pruned before the end
    assert result["training_flops_fraction"] == pytest.approx(expected, rel=1e-12)
    assert result["kept_flops_fraction"] < 0.5


@pytest.mark.slow
def test_masks_that_stay_cost_what_they_keep(tmp_path):
    result = Run(config(tmp_path, "magnitude", epochs=1)).train()
    assert result["training_flops_fraction"] == pytest.approx(result["kept_flops_fraction"])
    assert result["itop"] == pytest.approx(result["density"])


@pytest.mark.parametrize(
    ("method", "stop"), [("campfire", 3), pytest.param("rigl", 7, marks=pytest.mark.slow)]
)
def test_a_resumed_run_counts_as_without_the_stop(tmp_path, method, stop):
    """Stopped while masks change; steps and masks before the stop are in the checkpoint."""
    whole = Run(config(tmp_path / "whole", method, epochs=2))
    whole.train()
    settings = config(tmp_path / "stopped", method, epochs=2)
    assert Run(settings).train(stop_after=stop) is None
    resumed = Run(settings, resume=True)
    resumed.train()
    assert_same_run(resumed, whole)
    for name in ("training_flops_fraction", "itop"):
        assert resumed.result[name] == whole.result[name]
    assert 0 < whole.result["training_flops_fraction"] < 1


def test_campfire_reports_what_elimination_in_the_classifier_saves(tmp_path):
    run = Run(config(tmp_path, "campfire", {"kind": "ck", "fc": "fine"}, sparsity=0.98, epochs=1))
    result = run.train()
    masks = masks_of(run.state)
    dead = ~np.asarray(masks["conv3"]["kernel"]).any((0, 1, 2))
    assert result["fc_eliminated_inputs"] == dead.sum() > 0
    classifier = np.asarray(masks["classifier"]["kernel"])
    assert result["fc_eliminated_weights"] == (~classifier[dead]).sum() > 0
    assert classifier.any(0).all()
    assert classifier[dead].sum() <= 10
    assert bsj.get_spec(run.state.opt_state).method == "campfire"
