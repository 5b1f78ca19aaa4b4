"""The benchmarks on a CPU: dense baselines, turns of the timer, PyTorch's process, and reports."""

import dataclasses
import functools
import itertools
import json
import math
import os
import sys
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import blocksparse_jax as bsj
from experiments.bench import (
    dense_forms,
    inference,
    inference_networks,
    kernels,
    parts,
    shapes,
    training,
    training_steps,
    tune,
    unchanged,
)
from experiments.bench.inference_times import PATTERNS, Execution, check_logits
from experiments.bench.summary import summary
from experiments.bench.torch_baseline.process import POLICIES, TorchProcess
from experiments.bench.training_steps import Variant
from experiments.measuring.timing import BURST_MS, StepTimer, time_in_turn, timed
from experiments.models.flops import conv_positions
from experiments.reporting import tables
from experiments.training.stepper import stepper
from pallas_kernels import dense_conv

TORCH = os.environ.get("TORCH_PYTHON")  # a Python that has PyTorch, where there is one
needs_torch = pytest.mark.skipif(
    TORCH is None, reason="TORCH_PYTHON names no Python that has PyTorch"
)


def logged_calls(times_ms):
    """Calls by name that take so many milliseconds, and the log of who was called."""
    log = []

    def call(name):
        log.append(name)
        return times_ms[name]

    return {name: functools.partial(call, name) for name in times_ms}, log


def test_calls_are_timed_in_turn_in_bursts_and_slow_ones_once():
    calls, log = logged_calls({"a": 1.0, "b": 3.0, "slow": 50.0})
    times = time_in_turn(calls, patience=0.04, rounds=5)
    assert {name: len(t) for name, t in times.items()} == {"a": 5, "b": 5, "slow": 1}
    assert log[:6] == ["a", "a", "b", "b", "slow", "slow"]
    turns = [
        (name, len(list(calls))) for name, calls in itertools.groupby(log[6:])
    ]  # neighbouring rounds may begin with the same call
    bursts = {"a": 2 * math.ceil(BURST_MS / 1.0), "b": 2 * math.ceil(BURST_MS / 3.0)}
    assert all(count % bursts[name] == 0 for name, count in turns)
    assert {name: log[6:].count(name) for name in bursts} == {
        name: 5 * count for name, count in bursts.items()
    }
    assert len(turns) > 5, "in turn, not one after the other"
    assert len(time_in_turn(calls, patience=0.06, rounds=7)["slow"]) == 7
    assert timed(lambda: jnp.ones(3))() > 0


def test_without_bursts_every_call_counts_and_seconds_add_rounds():
    calls, log = logged_calls({"a": 1.0, "b": 3.0})
    times = time_in_turn(calls, rounds=3, burst_ms=0)
    assert {name: len(t) for name, t in times.items()} == {"a": 3, "b": 3}
    assert len(log) == 4 + 6
    assert len(time_in_turn(calls, rounds=3, seconds=0.04, burst_ms=0)["a"]) == 10
    assert len(time_in_turn(calls, rounds=3, seconds=1.2)["a"]) == 10


def test_the_first_steps_after_a_compilation_do_not_count():
    timer = StepTimer(warm_up=2)
    for program in ("first", "first", "first", "second", "second", "second", "second"):
        assert timer.time("step", program, lambda: jnp.ones(3)).tolist() == [1, 1, 1]
    assert len(timer.milliseconds("step")) == 1 + 2
    assert timer.milliseconds("another") == []


def test_a_summary_names_who_loses():
    rows = [
        {"layer": layer, "sparsity": 0.9, "mode": "forward", "speed_up_over_dense": up, **more}
        for layer, up, more in (
            ("a", 4.0, {"speed_up_over_torch": 2.0}),
            ("b", 0.25, {"speed_up_over_torch": 8.0}),
        )
    ]
    dense, torch = summary(rows)
    assert (dense["against"], dense["geometric_mean"], dense["slower"], dense["shapes"]) == (
        "dense",
        1.0,
        ["b"],
        2,
    )
    assert (dense["worst"], dense["best"]) == (
        {"layer": "b", "speed_up": 0.25},
        {"layer": "a", "speed_up": 4.0},
    )
    assert (torch["geometric_mean"], torch["slower"]) == (4.0, [])


TINY = kernels.KernelConfig(sparsities=(0.9,), batch=2, seconds=0.01, layers="64-128@16/2")


@pytest.fixture(name="kernels_report", scope="module")
def _kernels_report(tmp_path_factory):
    out = tmp_path_factory.mktemp("results") / "bench_kernels_cpu.json"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shapes, "VGG19", ())
        report = kernels.main(dataclasses.replace(TINY, out=str(out), torch=TORCH))
    return report, out


def test_the_baseline_is_the_fastest_dense_convolution(kernels_report):
    report, out = kernels_report
    dense = {"dense NHWC", "dense CHWN", "dense NCHW", "dense taps NHWC", "dense taps CHWN"}
    built = {name for name, reason in bsj.available_implementations().items() if reason is None}
    built -= {"dense"}
    torch = {f"PyTorch dense, {policy}" for policy in POLICIES} if TORCH else set()
    for row in report["rows"]:
        ms = {name: times["median"] for name, times in row["ms"].items()}
        assert set(ms) == {*dense, *built, *torch, "masked dense", "chosen"}, (
            "formulations are off by default"
        )
        assert ms[row["best_dense"]] == min(ms[name] for name in dense)
        assert row["speed_up_over_dense"] == pytest.approx(
            ms[row["best_dense"]] / ms["chosen"], rel=0.01
        )
        assert row["speed_up_over_convolution"] == pytest.approx(
            min(ms["dense NHWC"], ms["dense NCHW"]) / ms["chosen"], rel=0.01
        )
        assert ms[row["best"]] == min(ms[name] for name in built)
    assert [line["mode"] for line in report["summary"]][:2] == ["forward", "forward + gradients"]
    assert report["summary"] == summary(report["rows"])
    text = out.read_text()
    assert "/" not in json.loads(text)["config"]["layers"].replace("@16/2", "")
    assert str(out.parent) not in text, "no paths of this machine"


def test_a_wrong_dense_baseline_fails_loudly(monkeypatch):
    monkeypatch.setattr(shapes, "VGG19", ())
    right = dense_conv.dense_conv

    def wrong(*operands, **options):
        factor = 1.001 if options["formulation"] == "taps" else 1
        return factor * right(*operands, **options)

    monkeypatch.setattr(dense_conv, "dense_conv", wrong)
    with pytest.raises(AssertionError, match="dense taps NHWC: the output differs from dense NHWC"):
        kernels.main(TINY)


@pytest.mark.parametrize(
    ("benchmark", "config", "words"),
    [
        (kernels, kernels.KernelConfig(sparsities=(0.9, 1.5)), "sparsity: expected .* got 1.5"),
        (kernels, kernels.KernelConfig(group_size=7), "group_size: expected a divisor of the 64"),
        (kernels, kernels.KernelConfig(kept_taps=10), "kept_taps: expected 1 to 9, the taps of"),
        (training, training.BenchConfig(sparsities=(-0.5,)), "sparsities: expected .* got -0.5"),
        (tune, tune.Config(only="nosuchlayer"), "only: no name contains 'nosuchlayer'; e.g. 'vgg"),
    ],
)
def test_what_cannot_be_measured_is_refused_first(benchmark, config, words, monkeypatch):
    monkeypatch.setattr(benchmark, "steady_memory", lambda: pytest.fail("it began to measure"))
    with pytest.raises(ValueError, match=words):
        benchmark.main(config)


def test_dense_forms_have_the_geometry_of_the_spec():
    spec = shapes.layer_spec(shapes.RESNET32[0], sparsity=0.9, batch=2)
    spec = dataclasses.replace(spec, strides=(2, 1), dilation=(2, 3), padding=((1, 2), (0, 3)))
    kernel = jax.ShapeDtypeStruct(spec.kernel_shape, jnp.float32)
    for name, layout in dense_forms.DENSE.items():
        x_shape, y_shape = (
            tuple(shape[axis] for axis in dense_forms.axes("CHWN", layout))
            for shape in (spec.in_shape, spec.out_shape)
        )
        x = jax.ShapeDtypeStruct(x_shape, jnp.float32)
        y = jax.eval_shape(functools.partial(dense_forms.run_dense, spec, name), x, kernel)
        assert y.shape == y_shape, name


def test_a_python_without_torch_says_how_to_make_one(tmp_path):
    for python in (str(tmp_path / "nothing"), sys.executable):
        with pytest.raises(
            ValueError,
            match=r"torch: expected the path of a Python that has PyTorch.*pip install torch numpy",
        ):
            TorchProcess(python)


@needs_torch
@pytest.mark.parametrize(
    ("image", "kernel", "strides", "padding"),
    [((2, 2), (3, 3), (1, 1), ((1, 1), (1, 1))), ((6, 8), (3, 3), (2, 2), ((0, 1), (0, 1)))],
)
def test_torch_convolves_as_we_do(image, kernel, strides, padding):
    rng = np.random.default_rng(0)
    x, weights = (
        jnp.asarray(rng.integers(-3, 4, size), jnp.float32)
        for size in ((2, *image, 3), (*kernel, 3, 4))
    )
    y, pullback = jax.vjp(
        functools.partial(dense_conv.dense_conv, strides=strides, padding=padding), x, weights
    )
    with TorchProcess(TORCH) as process:
        calls = process.load(
            "convolution",
            {"x": np.asarray(x), "kernel": np.asarray(weights), "dy": y},
            strides=strides,
            padding=padding,
        )
        assert all(call() > 0 for call in calls.values())
        results = process.results("forward + gradients")
        for result, expected in zip(results, (y, *pullback(y)), strict=True):
            np.testing.assert_array_equal(result, expected)
        with pytest.raises(RuntimeError, match="KeyError"):
            process.results("backward")


@needs_torch
@pytest.mark.parametrize("model", ["vgg19", "resnet20"])
def test_torch_trains_as_we_do(model, monkeypatch):
    """The same losses step after step: forward, both gradients, momentum and weight decay."""
    train_config = training_steps._train_config

    def steady(problem, variant):
        """Small steps, so that rounding errors do not grow, and a weight decay that matters."""
        return dataclasses.replace(train_config(problem, variant), lr=0.01, weight_decay=0.5)

    monkeypatch.setattr(training_steps, "_train_config", steady)
    problem = training_steps.Problem(
        model, width=0.25, image_size=16, batch_size=16, precision="float32", implementation=None
    )
    with TorchProcess(TORCH) as process:
        [step] = training_steps.torch_steps(problem, {"active": process}).values()
        losses = [step.first_loss, *(float(process.results("step")[0]) for _ in range(3))]
    images, labels = map(jnp.asarray, problem.batch())
    trainer = training_steps.make_trainer(problem, Variant("dense", "NHWC"))
    step = stepper(trainer, trainer.init(), training_steps.STEP, images, labels)
    np.testing.assert_allclose(losses, [float(step()[1].loss) for _ in range(4)], rtol=1e-4)
    assert losses[3] < losses[0]


@pytest.fixture(name="training_report", scope="module")
def _training_report(tmp_path_factory):
    out = tmp_path_factory.mktemp("results") / "bench_training_cpu.json"
    config = training.BenchConfig(
        models=("cnn",), sparsities=(0.5,), image_size=8, batch_size=4, repetitions=2, out=str(out)
    )
    return training.main(config), out


def test_training_steps_are_timed_in_every_execution(training_report):
    report, out = training_report
    assert json.loads(out.read_text()) == json.loads(json.dumps(report))
    assert str(out.parent) not in out.read_text(), "no paths of this machine"
    rows = {(row["execution"], row["data_format"]): row for row in report["rows"]}
    assert set(rows) == {
        ("dense", "NHWC"),
        ("dense", "CHWN"),
        ("native", "CHWN"),
        ("masked", "CHWN"),
        ("sparse", "CHWN"),
        ("packed", "CHWN"),
    }
    packed = rows["packed", "CHWN"]
    assert packed["block_density"] == pytest.approx(2 / 3, abs=1e-4), "at least the density"
    dense_ms = min(row["step_ms_median"] for name, row in rows.items() if name[0] == "dense")
    for row in rows.values():
        assert row["repetitions"] == 2
        assert row["speed_up_over_dense"] == pytest.approx(
            dense_ms / row["step_ms_median"], abs=1e-3
        )
        assert "speed_up_over_torch" not in row
    assert "| cnn | 50% | " in tables.table("bench_training_cpu", out.parent)


@pytest.mark.parametrize(("sparsity", "taps"), [(0.0, 9), (0.5, 6), (0.7, 3), (0.95, 3)])
def test_a_group_keeps_a_third_of_the_taps_or_as_many_as_the_density_needs(sparsity, taps):
    assert round(9 * Variant("packed", "CHWN", sparsity).block_density) == taps


def test_executions_that_disagree_are_not_timed():
    losses = {
        Variant("dense", "NHWC"): 2.0,
        Variant("dense", "CHWN"): 2.0001,
        Variant("PyTorch dense", "channels_last", policy="active"): 2.1,
        Variant("packed", "CHWN", 0.9): 3.0,
    }
    with pytest.raises(AssertionError, match=r"at sparsity 0 disagree.*'PyTorch dense active': 2"):
        training_steps.check_losses(losses, "float32")
    losses.pop(Variant("PyTorch dense", "channels_last", policy="active"))
    training_steps.check_losses(losses, "float32")


def test_the_training_baseline_in_torch_has_few_networks():
    for change in ({"models": ("mobilenet_v1",)}, {"precision": "bfloat16"}):
        with pytest.raises(ValueError, match="torch: the baseline trains vgg19, resnet20"):
            training.main(training.BenchConfig(torch="python", **change))


@pytest.fixture(name="inference_report", scope="module")
def _inference_report(tmp_path_factory):
    out = tmp_path_factory.mktemp("results") / "bench_inference_cpu.json"
    config = inference.InferenceConfig(quick=True, out=str(out), torch=TORCH)
    return inference.main(config), out


def test_inference_is_timed_after_the_logits_agree(inference_report):
    report, out = inference_report
    assert json.loads(out.read_text()) == json.loads(json.dumps(report))
    rows = {row["execution"]: row for row in report["rows"]}
    assert {"XLA NHWC", "XLA NHWC, taps", "XLA CHWN", "packed"} <= set(rows)
    assert rows["packed"]["gflops"] < 0.65 * rows["XLA NHWC"]["gflops"]
    assert rows["packed"]["weights_mb"] < rows["XLA NHWC"]["weights_mb"]
    fastest = min(row["ms_median"] for name, row in rows.items() if name.startswith("XLA"))
    assert rows["packed"]["speed_up_over_xla"] == pytest.approx(
        fastest / rows["packed"]["ms_median"], rel=0.01
    )
    packed = Execution("packed", "1.03G", "1x16")
    with pytest.raises(
        AssertionError, match="nothing was timed: the logits of resnet18, packed 1x16, differ"
    ):
        check_logits("resnet18", packed, np.array([1.0, 2.01]), np.array([1.0, 2.0]))


@pytest.mark.parametrize("name", PATTERNS)
def test_the_patterns_have_the_papers_flops(name):
    model = inference_networks.create(name, 1, data_format="NHWC")
    size = (224, 224, 3)
    variables = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, *size)))
    positions = conv_positions(model, variables, size)
    for flops, sparsity in PATTERNS[name]:
        layouts = inference_networks.subp_layouts(variables["params"], 16, sparsity, name)
        pack = functools.partial(inference_networks.convert_sparse, bsj.pack)
        packed = jax.eval_shape(pack, variables["params"], layouts)
        assert inference_networks.gigaflops(packed, positions) == pytest.approx(
            float(flops.removesuffix("G")), rel=0.045
        )


def test_fewer_cores_are_for_a_while():
    before = os.sched_getaffinity(0)
    with inference.cores(1):
        assert os.sched_getaffinity(0) == {min(before)}
    assert os.sched_getaffinity(0) == before
    with pytest.raises(ValueError, match=f"threads: expected 1 to {len(before)}"):
        inference.main(inference.InferenceConfig(threads=(1, len(before) + 1)))
    with pytest.raises(ValueError, match="models: expected some of resnet18"):
        inference.main(inference.InferenceConfig(models=("vgg19",)))


def test_tables_come_from_the_reports(kernels_report, inference_report):
    text = tables.table("bench_kernels_cpu", kernels_report[1].parent)
    assert "| dense | 90% | forward | **" in text
    assert "| resnet32x2 64-128@16/2 | " in text
    assert ("PyTorch dense, ms" in text) is bool(TORCH)
    text = tables.table("bench_inference_cpu", inference_report[1].parent)
    assert "| resnet18 | dense, XLA | " in text
    assert "| resnet18 | SUBP 1x16 | " in text
    assert ("| resnet18 | dense, PyTorch | " in text) is bool(TORCH)


@pytest.mark.slow
def test_the_parts_are_timed_in_both_formats_and_tabulated(tmp_path, monkeypatch):
    out = tmp_path / "bench_parts_cpu.json"
    monkeypatch.setattr(
        parts,
        "SIZES",
        {"a": (4, 4, "max pool 2x2"), "b": (6, 2, "mean over the image")},
    )
    report = parts.main(parts.Config(batch=2, seconds=0.001, grouping=False, out=str(out)))
    assert json.loads(out.read_text()) == json.loads(json.dumps(report))
    timings = Counter((row["layer"], row["operation"]) for row in report["rows"])
    assert set(timings.values()) == {2}
    assert set(timings) == {
        (name, operation) for name in "ab" for operation in parts.EVERYWHERE
    } | {
        ("a", "max pool 2x2"),
        ("b", "mean over the image"),
    }
    for row in report["rows"]:
        ms = {data_format: times["median"] for data_format, times in row["ms"].items()}
        assert row["nhwc_over_chwn"] == pytest.approx(ms["NHWC"] / ms["CHWN"], abs=2e-3, rel=0.01)
        assert (parts.FUSED in ms) is (row["operation"] in parts.fused_operations())
        if parts.FUSED in ms:
            ratio = ms["CHWN"] / ms[parts.FUSED]
            assert row["chwn_over_norm_act"] == pytest.approx(ratio, abs=2e-3, rel=0.01)
    seconds = {"first_s": 3.0, "first_cpu_s": 2.5, "second_s": 0.5, "second_cpu_s": 0.25}
    report["grouping"] = [{"what": "a layer"} | seconds]
    out.write_text(json.dumps(report))
    text = tables.table("bench_parts_cpu", tmp_path)
    assert text.count("| batch norm, add, ReLU | ") == 2
    assert "| a layer | 0.50 | 0.25 | 3.00 | 2.50 |" in text


def test_a_plain_network_is_timed_dense_masked_and_with_layouts(tmp_path):
    """All executions compute one loss; moving transposes leaves fewer of them."""
    out = tmp_path / "bench_unchanged_cpu.json"
    report = unchanged.main(unchanged.Config(quick=True, out=str(out)))
    assert json.loads(out.read_text()) == json.loads(json.dumps(report))
    rows = {row["execution"]: row for row in report["rows"]}
    dense = rows["dense, NHWC"]
    for row in rows.values():
        ratio = dense["step_ms_median"] / row["step_ms_median"]
        assert row["speed_up_over_dense"] == pytest.approx(ratio, abs=2e-3)
    moved = rows["use_layouts and cancel_transposes, NHWC"]["transposes"]
    assert moved < rows["use_layouts, NHWC"]["transposes"] / 2
    assert "| masked, NHWC | " in tables.table("bench_unchanged_cpu", tmp_path)


@pytest.mark.parametrize("operation", parts.operations("CHWN"))
def test_the_parts_compute_the_same_in_both_formats(operation):
    x, shortcut = (jax.random.normal(jax.random.key(seed), (3, 4, 4, 5)) for seed in range(2))
    pools = {pool for _, _, pool in parts.SIZES.values()} - {None}
    assert pools | set(parts.EVERYWHERE) == set(parts.operations("CHWN"))
    chwn, nhwc = (parts.operations(data_format)[operation] for data_format in ("CHWN", "NHWC"))
    y = nhwc(x.transpose(3, 1, 2, 0), shortcut.transpose(3, 1, 2, 0))
    np.testing.assert_allclose(
        chwn(x, shortcut),
        y.T if y.ndim == 2 else y.transpose(3, 1, 2, 0),
        rtol=1e-5,
        atol=1e-5,
    )
    if operation in parts.fused_operations():
        fused = parts.fused_operations()[operation](x, shortcut)
        np.testing.assert_allclose(fused, chwn(x, shortcut), rtol=1e-5, atol=1e-5)
