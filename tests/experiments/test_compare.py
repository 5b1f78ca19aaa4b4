"""The main job: one table of all methods, its pictures, SUBP's schedule in it, and the README's
tables made of such reports.
"""

import io
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from rich.console import Console

import blocksparse_jax as bsj
from experiments import compare
from experiments.reporting.reports import compare as compare_report
from experiments.training.config import TrainConfig, resolve
from experiments.training.length import Length
from experiments.training.methods import Setup
from experiments.training.registry import METHODS
from experiments.training.run_folder import RunFolder


def test_subp_prunes_in_steps_and_is_tested_when_it_has_settled():
    """Its updates are the last steps of epochs, so that each epoch has its own masks from its first
    step on; the last one is well before the end.
    """
    length, main_job = Length(22, 220), compare.CompareConfig()
    config = resolve(TrainConfig(method="subp", **compare._options(main_job, "subp")))
    setup = Setup(config.sparsity, jax.random.key(0), length, None)
    transform = bsj.sparse(METHODS["subp"].build(config.options, setup), optax.sgd(0.0))
    params = {"w": jnp.ones((1, 1, 100, 16))}
    state, densities = transform.init(params), []
    spec = bsj.get_spec(state)
    steps = [step for step in range(length.total) if spec.changes(step)]
    assert all((step + 1) % length.steps_per_epoch == 0 for step in steps)
    update = jax.jit(transform.update)
    for step in range(steps[-1] + 1):
        _, state = update(params, state, params)
        if step in steps:
            densities.append(float(bsj.get_masks(state)["w"].mean()))
    assert np.diff(densities).max() < 0
    assert len(densities) == 7
    assert densities[-1] == pytest.approx(0.1)
    assert steps[-1] < 0.75 * length.total


def test_lottery_tickets_have_the_epochs_of_the_others_in_every_pass():
    main_job = compare.CompareConfig()
    assert compare._options(main_job, "lottery")["epochs"] == 12 * main_job.epochs
    assert compare._options(main_job, "rigl")["epochs"] == main_job.epochs


def test_compare_prints_one_table(tmp_path, capsys):
    settings = compare.CompareConfig(
        out=str(tmp_path / "all"),
        methods=(*compare.SMOKE, "sr-ste"),
        smoke=True,
        results=str(tmp_path / "new" / "comparison.json"),
    )
    report = compare.main(settings)
    out = capsys.readouterr().out
    columns = (
        "method",
        "test accuracy",
        "density",
        "kept FLOPs",
        "training FLOPs",
        "masked step",
        "packed step",
        "dense step",
        "speed-up",
    )
    assert all(word in out for word in columns)
    dense, hrbp, sr_ste = report["rows"]
    assert dense["training_flops_fraction"] == 1
    assert hrbp["kept_flops_fraction"] < hrbp["training_flops_fraction"] < 0.4
    assert dense["density"] == 1
    assert dense["kept_flops_fraction"] == 1
    assert dense["packed_step_ms_median"] is None
    assert hrbp["packed_step_ms_median"] > 0
    assert hrbp["packed_speed_up_over_dense"] == pytest.approx(
        report["dense_step_ms_median"] / hrbp["packed_step_ms_median"], abs=1e-3
    )
    assert "medians of 3 steps of each" in report["step_times"]
    assert hrbp["kept_flops_fraction"] < 0.3
    assert sr_ste["density"] == pytest.approx(0.5)
    assert sr_ste["packed_step_ms_median"] is None
    for folder in ("all", "new"):
        assert json.loads((tmp_path / folder / "comparison.json").read_text()) == report
    assert f"({hrbp['packed_speed_up_over_dense']:.2f}x)" in compare_report.table(report)
    assert (
        RunFolder(tmp_path / "all" / "hrbp-dynamic").metrics()[-1]["sad"] > 0
    )  # a step in the sparse form moved the masks
    assert (tmp_path / "all" / "hrbp-dynamic" / "result.json").exists()
    assert (tmp_path / "all" / "learning_curves.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"methods": ()}, "methods: expected names of the registry, got none"),
        ({"methods": ("dense", "hrpb")}, "did you mean 'hrbp'"),
        ({"repetitions": 0}, "repetitions: expected an integer of at least 1, got 0"),
        ({"results": "."}, "results: . is a folder; name a file in it"),
    ],
)
def test_what_cannot_end_well_is_said_before_any_training(tmp_path, change, words):
    with pytest.raises(ValueError, match=words):
        compare.main(compare.CompareConfig(out=str(tmp_path / "all"), **change))
    assert not (tmp_path / "all").exists()


def test_the_comparison_fits_80_columns():
    row = {
        "method": "hrbp-dynamic",
        "test_accuracy": 0.9889,
        "density": 0.0997,
        "kept_flops_fraction": 1.0,
        "training_flops_fraction": 1.0,
    }
    row |= {
        "masked_step_ms_median": 135.4,
        "packed_step_ms_median": 108.8,
        "packed_speed_up_over_dense": 14.22,
    }
    report = {
        "model": "cnn",
        "dataset": "digits",
        "epochs": 10,
        "device": "a cpu",
        "step_times": "medians",
        "dense_step_ms_median": 137.1,
    }
    console = Console(width=80, file=io.StringIO())
    console.print(compare._table(report | {"rows": [row, row]}))
    assert (
        sum(
            "hrbp-dynamic" in line and "14.22x" in line and "98.89%" in line
            for line in console.file.getvalue().splitlines()
        )
        == 2
    )
