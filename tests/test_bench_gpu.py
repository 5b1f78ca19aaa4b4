"""The GPU benchmarks without a GPU: what is timed, the clock's program, the journal, the gates, the reports, in tiny dry runs."""

import dataclasses
import json
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import bench_gpu, bench_kernels, bench_training, gpu_check, gpu_layers, gpu_tables, gpu_training, tables
from experiments.bench_gpu import GpuConfig
from pallas_kernels import gpu_clock, gpu_shapes, shapes, tune_gpu
from pallas_kernels.block_sparse_conv import mosaic_gpu_tiles, triton_tiles, xla
from pallas_kernels.gpu_journal import FATAL, LOST, STOPPED, DeviceLost, Journal, TimeUp, fingerprint

ROOT = Path(__file__).resolve().parents[1]
WRONG = dataclasses.replace(xla.IMPLEMENTATION, weight_gradient=lambda *a: 1.01 * xla.IMPLEMENTATION.weight_gradient(*a))


def states(path):
    return [json.loads(line)["state"] for line in path.read_text().splitlines()]


def test_the_layers_of_resnet50_are_those_of_the_zoo():
    from experiments import models
    from experiments.flops import conv_positions

    model = models.create("resnet50", num_classes=10, stem="imagenet", data_format="NHWC")
    variables = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 224, 224, 3)))
    positions = conv_positions(model, variables, (224, 224, 3))
    leaves = jax.tree_util.tree_leaves_with_path(variables["params"])
    sizes = {tuple(str(k.key) for k in path): leaf.shape for path, leaf in leaves if leaf.ndim == 4 and "stem" not in str(path)}
    zoo = {(*shape, positions["/".join(path)]) for path, shape in sizes.items()}
    specs = [shapes.layer_spec(layer, sparsity=0.9, batch=1) for layer in gpu_shapes.RESNET50]
    assert {(*spec.kernel, spec.cin, spec.cout, spec.out_height * spec.out_width) for spec in specs} == zoo


@pytest.mark.parametrize("sparsity", [0.8, 0.9, 0.95])
def test_no_layer_is_timed_at_much_less_work_than_its_sparsity_says(sparsity):
    cases = gpu_shapes.cases()
    assert len({case.name for case in cases}) == len(cases) == 45
    blocks = set()
    for case in cases:
        spec = gpu_shapes.case_spec(case, sparsity=sparsity)
        assert spec.kept % spec.channel_block == spec.cin % spec.channel_block == 0
        low, high = gpu_shapes.EMPTIEST, gpu_shapes.FULLEST
        if spec.channel_block > 1:
            assert low - 0.01 <= spec.density / (1 - sparsity) <= high + 0.01, case.name
        assert spec.density >= (low - 0.01) * (1 - sparsity), case.name
        blocks.add(spec.channel_block)
    assert 16 in blocks
    with pytest.raises(ValueError, match="layers: no name contains 'resnet33'"):
        gpu_shapes.cases("resnet33")


def test_the_clock_calls_once_for_each_set_and_round():
    log = []

    def function(a):
        y = 2 * a
        jax.debug.callback(lambda value: log.append(float(value)), y[0], ordered=False)
        return y

    sets = gpu_clock.Sets(tuple((jnp.full(2, float(i)),) for i in range(3)), 24)
    program = gpu_clock.Program(function, sets, 4)
    assert program() > 0
    jax.effects_barrier()
    assert sorted(log) == sorted([0.0, 2.0, 4.0] * 4)
    np.testing.assert_array_equal(program.output(), [0.0, 0.0])
    body = gpu_clock.chained(lambda a: a @ a, 5).lower(*[(jnp.ones((8, 8)),)] * 2).as_text()
    assert body.count("dot_general") == 2
    assert body.count("optimization_barrier") == 2, "nothing leaves the loop and nothing merges"


def test_sets_outgrow_the_cache_or_say_that_they_do_not(monkeypatch):
    monkeypatch.setattr(gpu_clock, "L2", 1000)
    assert gpu_clock.rotate(lambda seed: (jnp.zeros(200),)).about == {"sets": 3, "megabytes": 0.0, "l2": "cold"}
    assert gpu_clock.rotate(lambda seed: (jnp.zeros(50),)).about["l2"] == "warm"
    assert len(gpu_clock.rotate(lambda seed: (jnp.zeros(5000),)).operands) == 1


def test_a_journal_goes_on_after_a_kill(tmp_path):
    path = tmp_path / "j.jsonl"
    code = """
import os, sys
from pallas_kernels.gpu_journal import Journal
journal = Journal(sys.argv[1])
journal.run("a", lambda: {"ms": 1.5})
journal.run("b", lambda: os._exit(9))
"""
    for _ in range(2):
        assert subprocess.run([sys.executable, "-c", code, str(path)], cwd=ROOT).returncode == 9
    assert states(path) == ["begun", "done", "begun", "begun"], "a finished unit is not measured again"
    with path.open("a") as file:
        file.write('{"key": "c", "sta')  # cut off
    journal = Journal(path)
    assert journal.result("a") == {"ms": 1.5}
    assert journal.run("b", lambda: 1) is None
    assert "cut off twice" in journal.error("b")
    assert journal.run("c", lambda: 3) == 3
    assert Journal(path).records.keys() == {"a", "b", "c"}
    path.write_text("nonsense\n" + path.read_text())
    with pytest.raises(ValueError, match="line 1 of"):
        Journal(path)


def test_a_journal_stops_in_time_and_books_failures(tmp_path, capsys):
    journal = Journal(tmp_path / "j.jsonl", minutes=0.3 / 60)
    assert journal.run("slow", lambda: time.sleep(0.2) or 1) == 1
    with pytest.raises(TimeUp):
        journal.run("next", lambda: 2)
    journal = Journal(tmp_path / "j.jsonl")
    assert journal.run("slow", lambda: pytest.fail("measured again")) == 1
    assert journal.run("bad", lambda: [][0]) is None
    assert "IndexError" in journal.error("bad")
    assert "FAILED bad" in capsys.readouterr().err

    def spoiled():
        raise RuntimeError(f"{FATAL[0]}_ILLEGAL_ADDRESS")

    with pytest.raises(DeviceLost):
        journal.run("spoiled", spoiled)
    assert Journal(tmp_path / "j.jsonl").run("spoiled", lambda: 1) is None, "the next process leaves it out"


def test_a_unit_that_hangs_ends_the_process(tmp_path):
    code = """
import sys, time
from pallas_kernels.gpu_journal import Journal
Journal(sys.argv[1], unit_seconds=0.2).run("h", lambda: time.sleep(60))
"""
    assert subprocess.run([sys.executable, "-c", code, str(tmp_path / "j")], cwd=ROOT, timeout=50).returncode == LOST
    assert "no result after 0.2 seconds" in Journal(tmp_path / "j").error("h")


def test_a_fingerprint_follows_the_contents(tmp_path):
    file = tmp_path / "a.py"
    file.write_text("1")
    first = fingerprint([file])
    file.write_text("2")
    assert len({first, fingerprint([file]), fingerprint([tmp_path / "none"])}) == 3


@pytest.mark.parametrize("shape", ["3x3 stride 2", "1x1 stride 2", "3x3 valid, 40 images"])
def test_the_float64_reference_is_the_convolution_with_its_gradients(shape):
    spec = dataclasses.replace(gpu_check.SMALL[shape], batch=3)
    found = gpu_check.check(dataclasses.replace(spec, precision="highest"), "fp32", xla.IMPLEMENTATION)
    assert set(found) == set(gpu_check.PASSES)
    assert max(found.values()) < 1e-6
    with pytest.raises(AssertionError, match=r"the weight gradient differs from float64 by 1\.0e-02"):
        gpu_check.check(spec, "fp32", WRONG)


def test_every_shape_that_is_checked_is_served_by_a_kernel():
    from pallas_kernels.block_sparse_conv import mosaic_gpu, triton

    kinds = {kind for _, _, kind in gpu_check.units(False)}
    assert kinds == set(gpu_check.KINDS)
    for name, spec, kind in gpu_check.units(False):
        assert triton._unfit(spec) is None, name
        assert (mosaic_gpu.limits(spec) is None) is (kind in ("bf16", "fp16") and spec.channel_block % 8 == 0), name


def test_a_wrong_slice_is_found():
    spec = dataclasses.replace(gpu_check.BASE, batch=5)
    x, dy, values, *index = gpu_shapes.operands(spec)
    right = {
        name: f(x, dy, values, *index)
        for name, f in gpu_layers.passes(lambda x, v, *index: shapes.convolve(spec, "xla", x, v, *index)).items()
    }
    gpu_layers.check_slices(spec, "fp32", (x, dy, values, *index), right)
    for name in gpu_layers.PASSES:
        with pytest.raises(AssertionError, match=f"the {name} differs from float64"):
            gpu_layers.check_slices(spec, "fp32", (x, dy, values, *index), right | {name: 1.001 * right[name]})


@pytest.fixture(scope="module")
def dry(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gpu")
    config = GpuConfig(quick=True, journal=folder / "j.jsonl", out=folder / "bench_kernels_gpu.json")
    stopped = bench_gpu.main(dataclasses.replace(config, minutes=0.0))
    lines = len((folder / "j.jsonl").read_text().splitlines()) if (folder / "j.jsonl").exists() else 0
    return config, stopped, lines, bench_gpu.main(config)


def test_a_dry_run_stops_goes_on_and_reports(dry):
    config, stopped, lines, report = dry
    assert not stopped["complete"]
    assert report["complete"]
    assert lines == 0, "no time, no unit"
    assert not report["failed"]
    assert {c["kind"] for c in report["checks"]} == set(gpu_check.KINDS)
    assert [c["name"] for c in report["ceilings"]][:3] == ["launch", "copy", "matmul"]
    assert all(c["rate"] > 0 for c in report["ceilings"])
    assert json.loads(config.out.read_text()) == json.loads(json.dumps(report))
    assert str(config.out.parent) not in config.out.read_text(), "no machine's paths"
    before = config.journal.read_text()
    again = bench_gpu.main(config)
    assert config.journal.read_text() == before, "nothing is measured twice"
    assert again["rows"] == report["rows"]


def test_a_row_tells_what_was_timed(dry):
    report = dry[-1]
    modes = [*gpu_layers.PASSES, gpu_layers.TOGETHER]
    assert [row["mode"] for row in report["rows"]] == modes * 2
    for row in report["rows"]:
        assert {"shape", "density", "tile", "device", "versions", "commit", "regret", "picked", "l2"} <= set(row)
        ms = {name: times["median"] for name, times in row["ms"].items()}
        assert {"dense NHWC", "dense NCHW", "masked dense", "chosen"} < set(ms)
        assert ms[row["best_dense"]] == min(ms["dense NHWC"], ms["dense NCHW"])
        assert row["speed_up_over_dense"] == pytest.approx(ms[row["best_dense"]] / ms["chosen"], abs=2e-3)
    *parts, total = report["rows"][:4]
    assert total["ms"]["chosen"]["median"] == pytest.approx(sum(part["ms"]["chosen"]["median"] for part in parts), abs=1e-5)


def test_the_reports_make_tables(dry):
    config, *_, report = dry
    assert "| 90% | forward | **" in tables.table("bench_kernels_gpu", config.out.parent)
    text = gpu_tables.kernels(report)
    assert "| small 64@4 n4 | " in text
    assert "| matmul | " in text
    assert "Failed: x: boom" in gpu_tables.kernels(report | {"failed": {"x": "boom\nmore"}})


def test_a_wrong_kernel_stops_everything_or_is_left_out(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gpu_check, "implementations", lambda: {"mosaic_gpu": WRONG, "xla": xla.IMPLEMENTATION, "triton": "absent"})
    monkeypatch.setattr(gpu_layers, "tiles", lambda name, spec: {})
    config = GpuConfig(quick=True, journal=tmp_path / "j.jsonl", layers="small 64@4")
    with pytest.raises(AssertionError, match=r"checks failed, nothing was timed.*mosaic_gpu, small.*weight gradient differs"):
        bench_gpu.main(config)
    assert "WRONG mosaic_gpu, small, bf16" in capsys.readouterr().err
    assert bench_gpu.run(config) == 1
    report = bench_gpu.main(dataclasses.replace(config, keep_going=True, stages=("check", "layers")))
    assert len(report["failed"]) == 4
    assert report["rows"]
    assert all("mosaic_gpu" not in row["ms"] for row in report["rows"])
    assert bench_gpu.run(dataclasses.replace(config, keep_going=True, stages=("check", "layers"))) == 1


@pytest.mark.parametrize(
    "command",
    [
        lambda: bench_kernels.cli(["--device", "gpu"]),
        lambda: bench_training.cli(["--device=gpu"]),
    ],
)
def test_another_device_is_refused(command, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert command() == 2
    assert "device: expected an NVIDIA GPU, got 'cpu'" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match="take --quick for a dry run"):
        bench_kernels.main(bench_kernels.KernelConfig(device="gpu"))
    with pytest.raises(ValueError, match="device: expected an NVIDIA GPU"):
        tune_gpu.main(tune_gpu.Config())
    with pytest.raises(ValueError, match="stages: expected some of check"):
        bench_gpu.main(GpuConfig(quick=True, stages=("chek",)))


def test_tuning_stops_goes_on_and_writes_the_best_tile(tmp_path):
    config = tune_gpu.Config(quick=True, layers="small 64@4", journal=tmp_path / "t.jsonl", folder=tmp_path)
    assert tune_gpu.exit_status(tune_gpu.main(dataclasses.replace(config, minutes=0.0))) == STOPPED
    assert not list(tmp_path.glob("tuned_*"))
    (tmp_path / "tuned_xla_none.json").write_text('{"tiles": {"of another day": {"name": "rows"}}}')
    assert tune_gpu.main(config)
    table = json.loads((tmp_path / "tuned_xla_none.json").read_text())
    assert "of another day" in table["tiles"]
    assert len(table["tiles"]) == 4
    done = [json.loads(line)["result"] for line in (tmp_path / "t.jsonl").read_text().splitlines() if '"done"' in line]
    for result in done:
        assert table["tiles"][result["key"]] == result["best"]
        timed = {t["tile"]["name"]: t["median"] for t in result["tiles"]}
        assert result["milliseconds"] == timed[result["best"]["name"]]
        assert result["milliseconds"] <= result["default_milliseconds"]
    before = (tmp_path / "t.jsonl").read_text()
    assert tune_gpu.main(config)
    assert (tmp_path / "t.jsonl").read_text() == before


def test_a_wrong_or_broken_tile_is_not_taken(tmp_path):
    def broken(*operands):
        raise ZeroDivisionError("no such tile")

    records = {"wrong": lambda *a: 1.1 * xla.IMPLEMENTATION.forward(*a), "broken": broken, "right": xla.IMPLEMENTATION.forward}
    which = dataclasses.replace(
        tune_gpu.tunable("xla"),
        candidates=lambda *_: [tune_gpu.Formulation(name) for name in records],
        default=lambda *_: tune_gpu.Formulation("right"),
        build=lambda _, tile: dataclasses.replace(xla.IMPLEMENTATION, forward=records[tile.name]),
    )
    spec = dataclasses.replace(gpu_check.BASE, batch=2, dtype="bfloat16")
    found = tune_gpu.measure_pass(which, spec, "forward", tune_gpu.Config(repetitions=2, threads=2))
    assert found["best"] == {"name": "right"}
    errors = {t["tile"]["name"]: t["error"] for t in found["tiles"] if "error" in t}
    assert errors["broken"] == "ZeroDivisionError: no such tile"
    assert errors["wrong"].startswith("differs from the default tile by 1.0e-01")


@pytest.mark.parametrize("name", ["mosaic_gpu", "triton"])
def test_the_kernels_read_the_tables_that_the_tuner_writes(name, tmp_path, monkeypatch):
    which, own = tune_gpu.tunable(name), {"mosaic_gpu": mosaic_gpu_tiles, "triton": triton_tiles}[name]
    spec = gpu_shapes.case_spec(gpu_shapes.cases("vgg19 256@8 n128")[0], sparsity=0.9)
    found = []
    for pass_name in tune_gpu.PASSES:
        default = which.default(spec, pass_name)
        other = next(tile for tile in which.candidates(spec, pass_name) if tile != default)
        assert which.build(pass_name, other).name == name
        best = dataclasses.asdict(other)
        found.append({"key": which.key(spec, pass_name), "best": best, "milliseconds": 1.0, "default_milliseconds": 2.0})
    monkeypatch.setattr(gpu_clock, "gpu", lambda: "h200")
    path = tune_gpu.write_table(which, found, tune_gpu.Config(folder=tmp_path))
    assert path.name == f"tuned_{name}_h200.json"
    if name == "mosaic_gpu":
        monkeypatch.setattr(own, "TABLE", path)
        own._tuned.cache_clear()
    else:
        monkeypatch.setattr(own, "_gpu", lambda: "h200")
        monkeypatch.setattr(own, "__file__", str(tmp_path / "triton_tiles.py"))
        own._table.cache_clear()
    try:
        for pass_name, result in zip(tune_gpu.PASSES, found):
            assert dataclasses.asdict(which.default(spec, pass_name)) == result["best"]
    finally:
        (own._tuned if name == "mosaic_gpu" else own._table).cache_clear()


def test_training_steps_stop_go_on_and_must_agree(tmp_path, capsys):
    config = gpu_training.GpuTrainingConfig(quick=True, journal=tmp_path / "s.jsonl", out=tmp_path / "bench_training_gpu.json")
    assert gpu_training.run(dataclasses.replace(config, minutes=0.0)) == STOPPED
    assert gpu_training.run(config) == 0
    report = json.loads(config.out.read_text())
    assert [row["execution"] for row in report["rows"]] == ["dense", "masked", "sparse", "packed"]
    assert "| cnn | 4 | 90% | " in capsys.readouterr().out
    before = config.journal.read_text()
    assert gpu_training.run(config) == 0
    assert config.journal.read_text() == before
    with pytest.raises(AssertionError, match="packed: the first step's loss is nan, that of the masked"):
        gpu_training.agree("packed", float("nan"), 2.3, "bfloat16")


def test_the_script_is_sound():
    script = (ROOT / "experiments" / "gpu.sh").read_text()
    assert subprocess.run(["bash", "-n", str(ROOT / "experiments" / "gpu.sh")]).returncode == 0
    for module in ("experiments.bench_kernels", "pallas_kernels.tune", "experiments.bench_training"):
        assert module in script
