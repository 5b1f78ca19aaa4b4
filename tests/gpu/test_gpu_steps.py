"""The GPU training steps and gpu.sh without a GPU: checks, fallbacks, stops and crashes."""

import dataclasses
import functools
import gzip
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache

from experiments.bench.gpu import ahead, shapes, step_times, training, training_units
from experiments.bench.gpu.check_cases import BASE
from experiments.bench.gpu.fallback import Fallback
from experiments.bench.gpu.journal import STOPPED, Journal
from experiments.bench.gpu.step_check import check_layer, check_updates
from experiments.bench.gpu.step_setup import STEP, set_up
from experiments.bench.gpu.torch_steps import measure_torch_steps
from experiments.bench.gpu.trace_events import gpu_kernels
from experiments.bench.gpu.training_units import (
    NETWORKS,
    QUICK_NETWORKS,
    Network,
    StepOptions,
    Unit,
    training_waves,
)
from experiments.bench.shapes import convolve
from experiments.measuring.kernel_names import by_category
from experiments.measuring.row_names import TORCH as TORCH_EXECUTION
from experiments.reporting.reports import gpu_profile, gpu_training
from experiments.training.stepper import stepper
from pallas_kernels.block_sparse_conv import choice, norm_passes, xla

TORCH = os.environ.get("TORCH_PYTHON")  # a Python that has PyTorch, where there is one
needs_torch = pytest.mark.skipif(
    TORCH is None, reason="TORCH_PYTHON names no Python that has PyTorch"
)
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


def test_what_the_goals_name_is_timed_first(monkeypatch):
    monkeypatch.setattr(
        training_units, "present_implementations", lambda: dict.fromkeys(["triton", "mosaic_gpu"])
    )
    alone, first, rest = training_waves(("triton", "mosaic_gpu"), list(NETWORKS), torch=True)
    assert alone == [Unit(NETWORKS[0], "dense")], "its row waits for no kernel of ours"
    sizes = [(one.model, one.batch_size, one.sparsities[0]) for one in NETWORKS]
    assert sizes == [
        ("vgg19", 128, 0.9),
        ("vgg19", 1024, 0.9),
        ("resnet32", 128, 0.9),
        ("resnet32", 1024, 0.9),
        ("resnet50", 256, 0.8),
    ]
    for network in NETWORKS:
        sparsity = network.sparsities[0]
        assert [unit for unit in alone + first if unit.network == network] == [
            Unit(network, "dense"),
            Unit(network, TORCH_EXECUTION),
            Unit(network, "masked", sparsity),
            Unit(network, "packed", sparsity, "triton"),
            Unit(network, "packed", sparsity, "mosaic_gpu"),
            Unit(network, "packed", 0.0, "triton"),  # dense in the kernels that fuse batch norm
        ]
    assert {unit.execution for unit in rest} == {"masked", "packed", "sparse"}


@pytest.mark.slow
def test_steps_are_compiled_and_checked_ahead(tmp_path):
    """The process that times a step finds its program in the cache, and its checks done."""
    unit = Unit(QUICK_NETWORKS[0], "packed", 0.9, "xla")
    options = StepOptions("float32", 8, 1, 1, True)
    journal = Journal(tmp_path / "steps.jsonl")
    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before = {name: getattr(jax.config, name) for name in names}
    try:
        for name, value in zip(names, (str(tmp_path / "compiled"), 0), strict=True):
            jax.config.update(name, value)
        compilation_cache.reset_cache()
        ahead.compile_ahead(options, [unit], journal, processes=1, seconds=300)
        programs = set((tmp_path / "compiled").glob("*train_step*-cache"))
        assert len(programs) == 1
        assert len([key for key in journal.records if key.startswith("layer ")]) == 3
        assert all(journal.has(key) for key in journal.records)
        assert list(tmp_path.glob("*.jsonl")) == [journal.path]
        step_times.measure_steps(options, Unit(unit.network, "masked", 0.9), None, journal)
        fallback = Fallback("xla")
        with fallback.registered() as name:
            setup = set_up(options, unit, name)
            stepper(setup.trainer, setup.state, STEP, setup.images, setup.labels)()
        after = set((tmp_path / "compiled").glob("*train_step*-cache"))
        assert len(after - programs) == 1, "only the masked step's program is new"
    finally:
        for name, value in before.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()


def test_a_process_that_crashed_in_a_check_costs_that_check(tmp_path):
    journal, path = Journal(tmp_path / "j.jsonl"), tmp_path / "other.jsonl"
    lines = [
        {"key": "layer a", "state": "done", "seconds": 1.0, "result": True},
        {"key": "layer b", "state": "begun", "group": ""},
    ]
    for status, error in ((0, None), (-11, "the process crashed")):
        path.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
        ahead._take_over(journal, path, status)
        assert journal.result("layer a") is True
        assert journal.error("layer b") == error
        assert not path.exists()


@needs_torch
@pytest.mark.slow
def test_torch_starts_from_the_same_loss():
    options = StepOptions("float32", 8, 1, 2, True)
    large = Network("resnet50", 2, (), 0.25, "imagenet2012", 64)
    for network in (large, Network("vgg19", 2, (), 0.25), Network("resnet20", 2, ())):
        dense = step_times.measure_steps(options, Unit(network, "dense"), None, None)
        unit = Unit(network, TORCH_EXECUTION)
        result = measure_torch_steps(options, unit, TORCH, dense)
        assert result["loss"] == pytest.approx(dense["loss"], rel=1e-3)
        assert result["step_ms_median"] > 0
        assert not result["captured"], "no GPU here"
        with pytest.raises(AssertionError, match="nothing was timed"):
            measure_torch_steps(options, unit, TORCH, dense | {"loss": 1.1 * dense["loss"]})


def test_pytorch_has_a_column_beside_dense():
    def row(execution, step_ms, sparsity=0.0, implementation=""):
        return {
            "model": "vgg19",
            "batch_size": 128,
            "sparsity": sparsity,
            "execution": execution,
            "implementation": implementation,
            "step_ms_median": step_ms,
            "speed_up_over_dense": 4 / step_ms,
        }

    rows = [row("dense", 4.0), row("masked", 5.0, 0.9), row("packed", 2.0, 0.9, "triton")]
    table = gpu_training.table({"rows": rows, "failed": {}}).splitlines()
    assert (
        table[0]
        == "| network | batch | sparsity | dense NHWC, ms | masked, ms | packed triton, ms |"
    )
    assert table[2:] == ["| vgg19 | 128 | 90% | 4.00 | 5.00 (0.80x) | 2.00 (2.00x) |"]
    rows.append(row(TORCH_EXECUTION, 3.2))
    table = gpu_training.table({"rows": rows, "failed": {}}).splitlines()
    assert "| dense NHWC, ms | PyTorch dense, ms | masked, ms |" in table[0]
    assert table[2:] == [
        "| vgg19 | 128 | 90% | 4.00 | 3.20 (1.25x) | 5.00 (0.80x) | 2.00 (2.00x) |"
    ]
    rows.append(row("packed", 2.5, implementation="triton"))
    table = gpu_training.table({"rows": rows, "failed": {}}).splitlines()
    assert "| PyTorch dense, ms | dense in the kernels of triton, ms | masked, ms |" in table[0]
    assert "| 3.20 (1.25x) | 2.50 (1.60x) | 5.00 (0.80x) |" in table[2]


@pytest.mark.parametrize("wrong", [None, "forward_with_sums", "norm_input_gradient"])
def test_the_passes_between_batch_norms_are_checked_with_a_layer(wrong):
    """With the first sum wrong, each pass is found."""
    forward = functools.partial(norm_passes.forward_with_sums, xla.IMPLEMENTATION.forward)
    backward = functools.partial(norm_passes.norm_input_gradient, xla.IMPLEMENTATION.input_gradient)
    passes = {"forward_with_sums": forward, "norm_input_gradient": backward}

    def broken(*operands):
        first, sums, *rest = passes[wrong](*operands)
        return first, sums.at[0, 0].mul(2), *rest

    record = dataclasses.replace(xla.IMPLEMENTATION, **passes)
    spec = dataclasses.replace(TINY, dtype="bfloat16")
    if wrong is None:
        assert check_layer(spec, record)
        return
    with pytest.raises(AssertionError, match=r"the sums .*differs from float64"):
        check_layer(spec, dataclasses.replace(record, **{wrong: broken}))


def test_a_profile_is_summed_by_kernel_and_category(tmp_path):
    def event(name, ts, dur, tid=7):
        return {"ph": "X", "pid": 1, "tid": tid, "name": name, "ts": ts, "dur": dur}

    def name_of(kind, name, **ids):
        return {"ph": "M", "name": kind, "args": {"name": name}, **ids}

    events = [
        name_of("process_name", "/device:GPU:0", pid=1),
        name_of("thread_name", "Stream #7(Compute)", pid=1, tid=7),
        name_of("thread_name", "XLA Ops", pid=1, tid=8),
        event("gather_product", 0, 40),
        event("sm90_xmma_fprop", 50, 20),
        event("gather_product", 100, 60),
        event("a span that holds kernels", 0, 1000, tid=8),
    ]
    folder = tmp_path / "plugins"
    folder.mkdir()
    with gzip.open(folder / "perfetto_trace.json.gz", "wt") as file:
        json.dump({"traceEvents": events}, file)
    profile = gpu_kernels(tmp_path, steps=2)
    assert profile == {
        "busy_ms": 0.06,
        "span_ms": 0.08,
        "kernels": {"gather_product": [1, 50.0], "sm90_xmma_fprop": [0.5, 10.0]},
    }
    assert by_category(profile["kernels"]) == {
        "block-sparse kernels": (1, 50.0),
        "cuDNN and cuBLAS": (0.5, 10.0),
    }
    row = {"model": "vgg19", "batch_size": 128, "execution": "packed", "implementation": "triton"}
    table = gpu_profile.table(
        {"rows": [row | {"sparsity": 0.9, "step_ms": 0.1} | profile], "failed": {}}
    )
    assert "vgg19 n128 packed triton 90%" in table
    assert "| block-sparse kernels, ms | 0.05 (1) |" in table
    with pytest.raises(ValueError, match="expected a profile"):
        gpu_kernels(tmp_path / "nothing", steps=2)


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
