"""The GPU training steps and gpu.sh without a GPU: checks, fallbacks, stops and crashes."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from experiments.bench.gpu import shapes, step_times, training
from experiments.bench.gpu.check_cases import BASE
from experiments.bench.gpu.fallback import Fallback
from experiments.bench.gpu.journal import STOPPED, Journal
from experiments.bench.gpu.step_check import check_layer, check_updates
from experiments.bench.shapes import convolve
from pallas_kernels.block_sparse_conv import choice, xla

ROOT = Path(__file__).resolve().parents[2]
TINY = dataclasses.replace(BASE, cin=16, height=4, width=3, batch=3, cout=16, kept=8, group_size=8)


@pytest.fixture(scope="module")
def dry(tmp_path_factory):
    folder = tmp_path_factory.mktemp("steps")
    config = training.GpuTrainingConfig(
        quick=True, journal=folder / "s.jsonl", out=folder / "bench_training_gpu.json"
    )
    assert training.run(dataclasses.replace(config, minutes=0.0)) == STOPPED
    assert training.run(config) == 0
    return config, json.loads(config.out.read_text()), config.journal.read_text().splitlines()


@pytest.mark.slow
def test_training_steps_stop_and_continue(dry, capsys):
    config, report, lines = dry
    assert [row["execution"] for row in report["rows"]] == ["dense", "masked", "packed", "sparse"]
    assert training.run(config) == 0
    assert "| cnn | 4 | 90% | " in capsys.readouterr().out
    assert config.journal.read_text().splitlines() == lines
    rows = [row for row in report["rows"] if row["implementation"]]
    assert {row["implementation"] for row in rows} == {"xla"}
    assert all(row["layers"].keys() == {"xla"} and row["cosine"] > 0.95 for row in rows)
    assert any('"layer ' in line and '"done"' in line for line in lines), (
        "each convolution is checked"
    )


@pytest.mark.slow
def test_steps_must_agree_with_the_masked_one(dry):
    masked = next(
        json.loads(line)["result"] for line in dry[-1] if " masked " in line and '"done"' in line
    )["sketch"]
    assert check_updates("packed", masked, masked, "float32") == pytest.approx(1)
    for factor in (-1.0, float("nan"), 0.0, 3.0):
        with pytest.raises(
            AssertionError, match=r"packed: the first step changes .*: cosine -1\.00"
        ):
            check_updates(
                "packed",
                {name: [factor * n for n in numbers] for name, numbers in masked.items()},
                masked,
                "bfloat16",
            )
    with pytest.raises(AssertionError, match="there is no masked step"):
        check_updates("packed", masked, None, "bfloat16")


@pytest.mark.slow
def test_a_step_with_a_wrong_gradient_is_not_timed(dry, tmp_path, monkeypatch):
    wrong = dataclasses.replace(
        xla.IMPLEMENTATION, weight_gradient=lambda *a: -xla.IMPLEMENTATION.weight_gradient(*a)
    )
    monkeypatch.setitem(choice.IMPLEMENTATIONS, "xla", wrong)
    monkeypatch.setattr(step_times, "check_layer", lambda *_: True)
    config = dataclasses.replace(dry[0], journal=tmp_path / "s.jsonl", out=tmp_path / "r.json")
    config.journal.write_text(
        "".join(f"{line}\n" for line in dry[-1] if " dense " in line or " masked " in line)
    )
    assert training.run(config) == 1
    report = json.loads(config.out.read_text())
    assert [row["execution"] for row in report["rows"]] == ["dense", "masked"]
    assert [
        "otherwise than the masked execution" in error for error in report["failed"].values()
    ] == [True, True]


@pytest.mark.parametrize("broken", ["forward", "input_gradient", "weight_gradient"])
def test_each_convolution_of_a_step_is_checked(broken):
    spec = dataclasses.replace(TINY, dtype="bfloat16")
    assert check_layer(spec, xla.IMPLEMENTATION)
    wrong = dataclasses.replace(
        xla.IMPLEMENTATION, **{broken: lambda *a: 1.02 * getattr(xla.IMPLEMENTATION, broken)(*a)}
    )
    with pytest.raises(
        AssertionError, match=f"the {broken.replace('_', ' ')} differs from float64"
    ):
        check_layer(spec, wrong)


def test_a_layer_that_is_refused_goes_to_the_next_implementation(monkeypatch):
    refuses = dataclasses.replace(
        xla.IMPLEMENTATION, supports=lambda spec: "one group only" if spec.groups > 1 else None
    )
    monkeypatch.setitem(choice.IMPLEMENTATIONS, "xla", refuses)
    fallback = Fallback("xla")
    with fallback.registered() as name:
        for groups in (1, 2):
            spec = dataclasses.replace(TINY, groups=groups, cout=8 * groups)
            x, _, values, *index = shapes.operands(spec)
            more = {"bias": jnp.ones(spec.cout), "relu": True}
            result, expected = (
                convolve(spec, server, x, values, *index, **more) for server in (name, "dense")
            )
            np.testing.assert_allclose(result, expected, atol=1e-3)
    assert fallback.layers() == {"xla": 1, "dense": 1}
    assert list(fallback.refused.values()) == ["dense: one group only"]
    assert name not in choice.available_implementations()


@pytest.mark.slow
def test_the_script_stops_continues_and_ends(tmp_path):
    def call(**more):
        settings = {
            "OUT": str(tmp_path),
            "QUICK": "1",
            "PYTHON": sys.executable,
            "COMMIT": "abc",
            "STAGES": "train profile tune layers two",
        }
        process = subprocess.run(
            ["bash", "experiments/bench/gpu.sh"],
            cwd=ROOT,
            env=os.environ | settings | more,
            capture_output=True,
            text=True,
        )
        print(process.stdout, process.stderr)
        output = process.stderr if process.returncode == 2 else process.stdout
        return process.returncode, output.splitlines()[-1]

    assert call(MINUTES="0") == (75, "time is up: call again")
    assert not list(tmp_path.glob("*.jsonl"))
    assert call(STAGES="train layer") == (
        2,
        "STAGES: expected some of train profile tune layers check two, got layer",
    )
    assert not list(tmp_path.iterdir())
    assert call(MINUTES="0.7")[0] == 75
    assert call(MINUTES="30") == (0, "all done")
    sizes = {path.name: len(path.read_text()) for path in tmp_path.glob("*.jsonl")}
    assert {
        "bench_kernels.jsonl",
        "bench_training.jsonl",
        "tune.jsonl",
        "two_of_four.jsonl",
    } <= set(sizes)
    assert json.loads((tmp_path / "bench_kernels_gpu.json").read_text())["complete"]
    assert call(MINUTES="30") == (0, "all done")
    assert {path.name: len(path.read_text()) for path in tmp_path.glob("*.jsonl")} == sizes, (
        "nothing is measured twice"
    )


def test_the_script_continues_after_a_crash_and_says_what_failed(tmp_path):
    python = tmp_path / "python"
    python.write_text(f"""#!/bin/bash
shift
case "$1 $*" in
    *gpu.journal*) exec {sys.executable} -m "$@" ;;
    *bench_training*) exit 1 ;;
    *bench_kernels*)
        echo x >> {tmp_path}/calls
        if [ $(wc -l < {tmp_path}/calls) = 1 ]; then exit 139; fi
        ;;
esac
""")
    python.chmod(0o755)
    (tmp_path / "bench_kernels.jsonl").write_text(
        '{"key": "check a", "state": "begun", "group": "g"}\n'
    )
    settings = {"OUT": str(tmp_path), "QUICK": "1", "PYTHON": str(python), "STAGES": "train layers"}
    process = subprocess.run(
        ["bash", "experiments/bench/gpu.sh"],
        cwd=ROOT,
        env=os.environ | settings,
        capture_output=True,
        text=True,
    )
    assert (process.returncode, process.stdout.splitlines()[-1]) == (1, "stopped with status 1"), (
        process.stderr
    )
    assert Journal(tmp_path / "bench_kernels.jsonl").error("check a") == "the process crashed"
    assert len((tmp_path / "calls").read_text().splitlines()) == 2
