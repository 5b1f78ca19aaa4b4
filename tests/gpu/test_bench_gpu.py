"""The GPU benchmarks without a GPU: what is timed, the clock's program, the journal, the gates, the
reports, in tiny dry runs.
"""

import dataclasses
import json
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from experiments.bench import kernels as bench_kernels
from experiments.bench import shapes
from experiments.bench import training as bench_training
from experiments.bench.gpu import check as gpu_check
from experiments.bench.gpu import clock as gpu_clock
from experiments.bench.gpu import kernels as bench_gpu
from experiments.bench.gpu import layers as gpu_layers
from experiments.bench.gpu import shapes as gpu_shapes
from experiments.bench.gpu import tiles as gpu_tiles
from experiments.bench.gpu import tune as tune_gpu
from experiments.bench.gpu.journal import Journal
from experiments.bench.gpu.kernels import GpuConfig
from experiments.bench.programs import single_passes
from experiments.reporting import tables
from experiments.reporting.reports import gpu_kernels
from pallas_kernels.block_sparse_conv import apply_epilogue
from pallas_kernels.block_sparse_conv import devices as gpu_name
from pallas_kernels.block_sparse_conv.mosaic_gpu import tiles as mosaic_gpu_tiles
from pallas_kernels.block_sparse_conv.triton import tiles as triton_tiles
from pallas_kernels.block_sparse_conv.xla import kernels as xla

ROOT = Path(__file__).resolve().parents[2]
WRONG = dataclasses.replace(
    xla.IMPLEMENTATION, weight_gradient=lambda *a: 1.01 * xla.IMPLEMENTATION.weight_gradient(*a)
)


def test_the_layers_of_resnet50_are_those_of_the_zoo():
    from experiments import models
    from experiments.models.flops import conv_positions

    model = models.create("resnet50", num_classes=10, stem="imagenet", data_format="NHWC")
    variables = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 224, 224, 3)))
    positions = conv_positions(model, variables, (224, 224, 3))
    leaves = jax.tree_util.tree_leaves_with_path(variables["params"])
    sizes = {
        tuple(str(k.key) for k in path): leaf.shape
        for path, leaf in leaves
        if leaf.ndim == 4 and "stem" not in str(path)
    }
    zoo = {(*shape, positions["/".join(path)]) for path, shape in sizes.items()}
    specs = [shapes.layer_spec(layer, sparsity=0.9, batch=1) for layer in gpu_shapes.RESNET50]
    assert {
        (*spec.kernel, spec.cin, spec.cout, spec.out_height * spec.out_width) for spec in specs
    } == zoo


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
    goals = [case.is_goal for case in cases]
    assert goals == sorted(goals, reverse=True), "the layers that the goals name come first"
    assert sum(goals) == 10
    with pytest.raises(ValueError, match="layers: no name contains 'resnet33'"):
        gpu_shapes.cases("resnet33")


def test_a_bound_that_is_met_exactly_is_met():
    (case,) = gpu_shapes.cases("resnet50 1x1 256-1024@14")
    spec = gpu_shapes.case_spec(case, sparsity=0.9)
    assert (spec.channel_block, spec.kept) == (16, 32), "1.25 * 25.6, though 1 - 0.9 is not 0.1"
    assert {
        gpu_shapes.case_spec(case, sparsity=0.9).channel_block
        for case in gpu_shapes.cases()
        if case.layer.cin >= 256
    } == {16}


@pytest.mark.parametrize("shape", ["3x3 stride 2", "1x1 stride 2", "3x3 valid, 40 images"])
def test_the_float64_reference_is_the_convolution_with_its_gradients(shape):
    spec = dataclasses.replace(gpu_check.SMALL[shape], batch=3)
    found = gpu_check.check(
        gpu_check.Unit(shape, dataclasses.replace(spec, precision="highest"), "fp32"),
        xla.IMPLEMENTATION,
    )
    assert set(found) == set(gpu_check.PASSES)
    assert max(found.values()) < 1e-6
    with pytest.raises(
        AssertionError, match=r"the weight gradient differs from float64 by 1\.0e-02"
    ):
        gpu_check.check(gpu_check.Unit(shape, spec, "fp32"), WRONG)


@pytest.mark.parametrize("shape", [shape for shape, *_ in gpu_check.EPILOGUES])
def test_a_fused_epilogue_is_checked(shape):
    (unit,) = (
        one
        for one in gpu_check.units(False, "xla")
        if one.name.startswith(f"{shape} +") and one.kind == "fp32"
    )
    unit = dataclasses.replace(unit, spec=dataclasses.replace(unit.spec, batch=3))
    assert max(gpu_check.check(unit, xla.IMPLEMENTATION).values()) < 1e-6

    def without(part):
        def forward(spec, *operands):
            scale, bias, residual = (
                None if name == part else a for name, a in zip(gpu_check.EVERYTHING, operands[5:])
            )
            spec = dataclasses.replace(spec, relu=spec.relu and part != "relu")
            return apply_epilogue(
                xla.IMPLEMENTATION.forward(spec, *operands[:5]), scale, bias, residual, spec.relu
            )

        return dataclasses.replace(xla.IMPLEMENTATION, forward=forward, fused=True)

    assert max(gpu_check.check(unit, without("nothing")).values()) < 1e-6
    for part in (*unit.epilogue, *["relu"] * unit.spec.relu):
        with pytest.raises(AssertionError, match="the forward differs from float64"):
            gpu_check.check(unit, without(part))


@pytest.mark.slow
def test_the_checks_force_every_own_way_of_the_triton_kernels(monkeypatch):
    launches = []

    def run(launch, *operands):
        launches.append(launch)
        return jnp.zeros(launch.out.shape, launch.out.dtype)

    monkeypatch.setattr(calls, "run", run)
    record = dataclasses.replace(triton.IMPLEMENTATION, supports=triton.limits)
    every = list(gpu_check.units(False, "triton"))
    assert {unit.variant for unit in every} == {"", "transposed", "scatter", "wide"}
    assert len({(unit.name, unit.kind) for unit in every}) == len(every)
    for unit in every:
        if unit.variant and unit.kind == "bf16":
            launches.clear()
            with pytest.raises(AssertionError, match="differs from float64"):
                gpu_check.check(
                    dataclasses.replace(unit, spec=dataclasses.replace(unit.spec, batch=8)), record
                )
            forward, *gradients = (dict(launch.constants) for launch in launches)
            assert {one["wide"] for one in (forward, *gradients)} == {unit.variant == "wide"}
            ways = [
                "transposed" if one["table"] else "scatter"
                for one in gradients
                if one.get("backward")
            ]
            assert ways == [unit.variant] or unit.variant == "wide", unit.name


def test_every_shape_that_is_checked_is_served_by_a_kernel():
    every = list(gpu_check.units(False, "triton"))
    assert {unit.kind for unit in every} == set(gpu_check.KINDS)
    assert {unit.spec.batch % 8 for unit in every} > {0}
    assert {unit.spec.channel_block for unit in every} == {1, 8, 16, 32}
    assert (2, 2) in {unit.spec.dilation for unit in every}
    for unit in every:
        assert triton.limits(unit.spec) is None, unit.name
        served = unit.kind in ("bf16", "fp16") and unit.spec.channel_block % 8 == 0
        assert (mosaic_gpu.limits(unit.spec) is None) is served, unit.name


def test_a_wrong_slice_is_found():
    spec = dataclasses.replace(gpu_check.BASE, batch=5)
    x, dy, values, *index = gpu_shapes.operands(spec)
    right = {
        name: f(x, dy, values, *index)
        for name, f in single_passes(
            lambda x, v, *index: shapes.convolve(spec, "xla", x, v, *index)
        ).items()
    }
    gpu_layers.check_slices(spec, "fp32", (x, dy, values, *index), right)
    for name in gpu_layers.PASSES:
        with pytest.raises(AssertionError, match=f"the {name} differs from float64"):
            gpu_layers.check_slices(
                spec, "fp32", (x, dy, values, *index), right | {name: 1.001 * right[name]}
            )


@pytest.fixture(scope="module")
def dry(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gpu")
    config = GpuConfig(
        quick=True, journal=folder / "j.jsonl", out=folder / "bench_kernels_gpu.json"
    )
    stopped = bench_gpu.main(dataclasses.replace(config, minutes=0.0))
    lines = (
        len((folder / "j.jsonl").read_text().splitlines()) if (folder / "j.jsonl").exists() else 0
    )
    return config, stopped, lines, bench_gpu.main(config)


@pytest.mark.slow
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


@pytest.mark.slow
def test_a_row_tells_what_was_timed(dry):
    report = dry[-1]
    modes = [*gpu_layers.PASSES, gpu_layers.TOGETHER]
    assert [row["mode"] for row in report["rows"]] == modes * 2
    for row in report["rows"]:
        assert {
            "shape",
            "density",
            "tile",
            "device",
            "versions",
            "commit",
            "regret",
            "picked",
            "l2",
        } <= set(row)
        ms = {name: times["median"] for name, times in row["ms"].items()}
        assert {"dense NHWC", "dense NCHW", "masked dense", "chosen"} < set(ms)
        assert row["runs"] == (row["best"] if ms[row["best"]] < ms[row["best_dense"]] else "dense")
        assert ms[row["best_dense"]] == min(ms["dense NHWC"], ms["dense NCHW"])
        assert row["speed_up_over_dense"] == pytest.approx(
            ms[row["best_dense"]] / ms["chosen"], abs=2e-3
        )
    *parts, total = report["rows"][:4]
    assert total["ms"]["chosen"]["median"] == pytest.approx(
        sum(part["ms"]["chosen"]["median"] for part in parts), abs=1e-5
    )


def test_the_chosen_kernel_is_the_fastest_one_and_a_pass_may_run_dense():
    def times(*medians):
        return {
            name: {"median": ms, "iqr": 0.0, "repetitions": 2}
            for name, ms in zip(gpu_layers.PASSES, medians)
        }

    dense = {
        "ms": {name: times(3.0, 3.0, 3.0) for name in ("dense NHWC", "dense NCHW", "masked dense")}
    }
    sparse = {
        "mosaic_gpu": {"ms": times(1.0, 2.0, 4.0)},
        "triton": {"ms": times(2.0, 1.0, 5.0)},
        "xla": {"refused": "not here"},
    }
    found = {row["mode"]: row for row in gpu_layers.rows({"layer": "a"}, dense, sparse)}
    assert {row["chosen"] for row in found.values()} == {"mosaic_gpu"}
    assert [found[mode]["runs"] for mode in gpu_layers.PASSES] == ["mosaic_gpu", "triton", "dense"]
    assert found["forward"]["speed_up_over_dense"] == 3.0
    assert found["weight gradient"]["speed_up_over_dense"] == 0.75, (
        "as the chosen kernel does, not hidden"
    )


@pytest.mark.slow
def test_the_reports_make_tables(dry):
    config, *_, report = dry
    assert "| 90% | forward | **" in tables.table("bench_kernels_gpu", config.out.parent)
    text = gpu_kernels.table(report)
    assert text.count("| small 64@4 n4 | ") == 2, "the times, and dense or kernel"
    assert "| matmul | " in text
    assert "Failed: x: boom" in gpu_kernels.table(report | {"failed": {"x": "boom\nmore"}})


@pytest.mark.slow
def test_a_wrong_kernel_stops_everything_or_is_left_out(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(
        gpu_check,
        "implementations",
        lambda: {"mosaic_gpu": WRONG, "xla": xla.IMPLEMENTATION, "triton": "absent"},
    )
    monkeypatch.setattr(gpu_layers, "tiles", lambda name, spec: {})
    config = GpuConfig(quick=True, journal=tmp_path / "j.jsonl", layers="small 64@4")
    assert bench_gpu.run(config) == 1
    said = capsys.readouterr().err
    assert "WRONG mosaic_gpu, 3x3 same, bf16" in said
    assert re.search(
        "checks failed, nothing was timed.*mosaic_gpu, 3x3 same.*weight gradient differs", said
    )
    report = bench_gpu.main(
        dataclasses.replace(config, keep_going=True, stages=("check", "layers"))
    )
    assert len(report["failed"]) == 8, "plain and fused, in four kinds of arithmetic"
    assert report["rows"]
    assert all("mosaic_gpu" not in row["ms"] for row in report["rows"])
    assert (
        bench_gpu.run(dataclasses.replace(config, keep_going=True, stages=("check", "layers"))) == 1
    )


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
    with pytest.raises(ValueError, match="stages: expected some of gate"):
        bench_gpu.main(GpuConfig(quick=True, stages=("chek",)))


def test_tuning_stops_goes_on_and_writes_the_best_tile(tmp_path):
    config = tune_gpu.Config(
        quick=True, layers="small 64@4", journal=tmp_path / "t.jsonl", folder=tmp_path
    )
    assert not tune_gpu.main(dataclasses.replace(config, minutes=0.0))
    assert not list(tmp_path.glob("tuned_*"))
    (tmp_path / "tuned_xla_none.json").write_text('{"tiles": {"of another day": {"name": "rows"}}}')
    assert tune_gpu.main(config)
    table = json.loads((tmp_path / "tuned_xla_none.json").read_text())
    assert "of another day" in table["tiles"]
    assert len(table["tiles"]) == 4
    done = [
        json.loads(line)["result"]
        for line in (tmp_path / "t.jsonl").read_text().splitlines()
        if '"done"' in line and '"tune ' in line
    ]
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

    records = {
        "wrong": lambda *a: 1.1 * xla.IMPLEMENTATION.forward(*a),
        "broken": broken,
        "right": xla.IMPLEMENTATION.forward,
    }
    which = dataclasses.replace(
        gpu_tiles.tunable("xla"),
        candidates=lambda *_: [gpu_tiles.Formulation(name) for name in records],
        default=lambda *_: gpu_tiles.Formulation("right"),
        build=lambda _, tile: dataclasses.replace(xla.IMPLEMENTATION, forward=records[tile.name]),
    )
    spec = dataclasses.replace(gpu_check.BASE, batch=2, dtype="bfloat16")
    journal = Journal(tmp_path / "j.jsonl")

    def first_run(tile, function):
        result = journal.run(tile, function)
        return journal.error(tile) or result

    config = tune_gpu.Config(repetitions=2, threads=2)
    found = tune_gpu.measure_pass(which, spec, "forward", config, first_run)
    assert found["best"] == {"name": "right"}
    errors = {t["tile"]["name"]: t["error"] for t in found["tiles"] if "error" in t}
    assert errors["broken"] == "ZeroDivisionError: no such tile"
    assert errors["wrong"].startswith("differs from the default tile by 1.0e-01")

    def lost(tile, function):
        return "RuntimeError: CUDA_ERROR" if "wrong" in tile else function()

    found = tune_gpu.measure_pass(which, spec, "forward", config, lost)
    assert found["best"] == {"name": "right"}
    assert {t["error"] for t in found["tiles"] if t["tile"]["name"] == "wrong"} == {
        "RuntimeError: CUDA_ERROR"
    }


@pytest.mark.parametrize("name", ["mosaic_gpu", "triton"])
def test_few_tiles_are_timed_and_all_ways_are_among_them(name):
    which = gpu_tiles.tunable(name)
    for case in gpu_shapes.cases("n256"):
        spec = gpu_shapes.case_spec(case, sparsity=0.9)
        for pass_name in gpu_tiles.PASSES:
            tiles = gpu_tiles.few(which, spec, pass_name)
            assert len(set(tiles)) == len(tiles) <= gpu_tiles.MOST
            assert tiles[0] == which.default(spec, pass_name)
            if name == "triton" and pass_name == "input_gradient":
                assert {tile.method for tile in tiles} == set(products.methods(spec))


@pytest.mark.parametrize("name", ["mosaic_gpu", "triton"])
def test_the_kernels_read_the_tables_that_the_tuner_writes(name, tmp_path, monkeypatch):
    which = gpu_tiles.tunable(name)
    spec = gpu_shapes.case_spec(gpu_shapes.cases("vgg19 256@8 n128")[0], sparsity=0.9)
    found = []
    for pass_name in gpu_tiles.PASSES:
        default = which.default(spec, pass_name)
        other = next(tile for tile in which.candidates(spec, pass_name) if tile != default)
        assert which.build(pass_name, other).name == name
        best = dataclasses.asdict(other)
        found.append(
            {
                "key": which.key(spec, pass_name),
                "best": best,
                "milliseconds": 1.0,
                "default_milliseconds": 2.0,
            }
        )
    for module in (gpu_clock, tuned_tables):
        monkeypatch.setattr(module, "this_gpu", lambda: "h200")
    monkeypatch.setattr(tuned_tables, "FOLDER", tmp_path)
    path = tune_gpu.write_table(which, found, tune_gpu.Config(folder=tmp_path))
    assert path == tmp_path / f"tuned_{name}_h200.json"
    tuned_tables.read.cache_clear()
    try:
        for pass_name, result in zip(gpu_tiles.PASSES, found):
            assert dataclasses.asdict(which.default(spec, pass_name)) == result["best"]
    finally:
        tuned_tables.read.cache_clear()
