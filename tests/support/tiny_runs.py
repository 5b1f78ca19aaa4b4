"""Tiny training runs for the trainer's tests: config, command line, what resumed runs equal."""

import dataclasses

import jax
import numpy as np
import pytest
from small_runs import small_options

from experiments.train import cli
from experiments.training.config import TrainConfig

TINY = TrainConfig(
    model="cnn", width=0.25, sparsity=0.8, batch_size=128, epochs=3, log_every=4, lr=0.05
)
PER_EPOCH = 11
TIMES = ("step_ms_median", "step_ms_iqr")


def config(tmp_path, method="hrbp", options=None, **fields):
    options = small_options(method, **(options or {}))
    fields = {"out": str(tmp_path / "run"), "method": method, "options": options} | fields
    return dataclasses.replace(TINY, **fields)


def flags(settings):
    arguments, fields = [], dataclasses.asdict(settings)
    options = {f"{settings.method}.{name}": value for name, value in fields.pop("options").items()}
    for field, value in (fields | options).items():
        name = field.replace("_", "-")
        if isinstance(value, bool):
            group, _, flag = name.rpartition(".")
            no = f"{group}.no-{flag}" if group else f"no-{flag}"
            arguments.append(f"--{name}" if value else f"--{no}")
        elif value is not None:
            arguments += [f"--{name}", str(value)]
    return arguments


def error_of(capsys, arguments, code=2):
    with pytest.raises(SystemExit) as stop:
        cli(arguments)
    text = capsys.readouterr().err
    assert stop.value.code == code
    assert "Traceback" not in text
    return text


def output_of(capsys, arguments):
    cli(arguments)
    return capsys.readouterr().out


def assert_same_run(resumed, run):
    assert (
        jax.tree.structure(resumed.state) == jax.tree.structure(run.state)
        or resumed.trainer is not run.trainer
    )
    for a, b in zip(jax.tree.leaves(resumed.state), jax.tree.leaves(run.state), strict=True):
        np.testing.assert_array_equal(a, b)
    rows, expected = (
        [{k: v for k, v in r.items() if k not in TIMES} for r in run.folder.metrics()]
        for run in (resumed, run)
    )
    assert rows == expected
