"""The GPU benchmarks without a GPU: what is timed, checks, reports and the tuner, in dry runs."""

import dataclasses
import functools
import json
import re

import jax
import jax.numpy as jnp
import pytest

from experiments import models
from experiments.bench import kernels as cpu_kernels
from experiments.bench import training as cpu_training
from experiments.bench.gpu import (
    clock,
    implementations,
    kernels,
    layers,
    prologue_times,
    shapes,
    tile_times,
    tiles,
    tune,
)
from experiments.bench.gpu.check import check, check_slices
from experiments.bench.gpu.check_cases import (
    ALL_PARTS,
    BASE,
    EPILOGUES,
    SMALL,
    CheckCase,
    check_cases,
)
from experiments.bench.gpu.float64 import KINDS
from experiments.bench.gpu.journal import Journal
from experiments.bench.gpu.kernels import GpuConfig
from experiments.bench.gpu.layer_rows import TOGETHER, rows
from experiments.bench.programs import PASS_NAMES, single_passes
from experiments.bench.shapes import convolve, layer_spec
from experiments.models.flops import conv_positions
from experiments.reporting import tables
from experiments.reporting.reports import gpu_kernels
from pallas_kernels.block_sparse_conv import (
    PASSES,
    apply_epilogue,
    mosaic_gpu,
    norm_passes,
    triton,
    tuned_tables,
    xla,
)
from pallas_kernels.block_sparse_conv.triton import calls, products
from pallas_kernels.block_sparse_conv.triton import tiles as triton_tiles
from pallas_kernels.devices import H200

TINY = dataclasses.replace(BASE, cin=16, height=4, width=3, batch=2, cout=16, kept=8, group_size=8)
WRONG = dataclasses.replace(
    xla.IMPLEMENTATION, weight_gradient=lambda *a: 1.01 * xla.IMPLEMENTATION.weight_gradient(*a)
)


@pytest.fixture
def short_programs(monkeypatch):
    """Timed programs of one set of operands and few launches: their times mean nothing here."""
    monkeypatch.setattr(clock, "DRY_RUN_MS", 0.01)
    monkeypatch.setattr(clock, "this_device", lambda: dataclasses.replace(H200, l2_bytes=1))


def test_the_layers_of_resnet50_are_those_of_the_zoo():
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
    specs = [layer_spec(layer, sparsity=0.9, batch=1) for layer in shapes.RESNET50]
    assert {
        (*spec.kernel, spec.cin, spec.cout, spec.out_height * spec.out_width) for spec in specs
    } == zoo


@pytest.mark.parametrize("sparsity", [0.8, 0.9, 0.95])
def test_no_layer_is_timed_at_much_less_work_than_its_sparsity_says(sparsity):
    cases = shapes.cases()
    assert len({case.name for case in cases}) == len(cases) == 45
    blocks = set()
    for case in cases:
        spec = shapes.case_spec(case, sparsity=sparsity)
        assert spec.kept % spec.channel_block == spec.cin % spec.channel_block == 0
        low, high = shapes.EMPTIEST, shapes.FULLEST
        if spec.channel_block > 1:
            assert low - 0.01 <= spec.density / (1 - sparsity) <= high + 0.01, case.name
        assert spec.density >= (low - 0.01) * (1 - sparsity), case.name
        blocks.add(spec.channel_block)
    assert 16 in blocks
    goals = [case.is_goal for case in cases]
    assert goals == sorted(goals, reverse=True), "the layers that the goals name come first"
    assert sum(goals) == 10
    with pytest.raises(ValueError, match="layers: no name contains 'resnet33'"):
        shapes.cases("resnet33")


def test_a_bound_that_is_met_exactly_is_met():
    (case,) = shapes.cases("resnet50 1x1 256-1024@14")
    spec = shapes.case_spec(case, sparsity=0.9)
    assert (spec.channel_block, spec.kept) == (16, 32), "1.25 * 25.6, though 1 - 0.9 is not 0.1"
    assert {
        shapes.case_spec(case, sparsity=0.9).channel_block
        for case in shapes.cases()
        if case.layer.cin >= 256
    } == {16}


@pytest.mark.parametrize("shape", ["3x3 stride 2", "1x1 stride 2", "3x3 valid, 40 images"])
def test_the_float64_reference_is_the_convolution_with_its_gradients(shape):
    spec = dataclasses.replace(SMALL[shape], batch=3)
    exact = dataclasses.replace(spec, precision="highest")
    errors = check(CheckCase(shape, exact, "fp32"), xla.IMPLEMENTATION)
    assert set(errors) == set(PASS_NAMES)
    assert max(errors.values()) < 1e-6
    with pytest.raises(
        AssertionError, match=r"the weight gradient differs from float64 by 1\.0e-02"
    ):
        check(CheckCase(shape, spec, "fp32"), WRONG)


@pytest.mark.parametrize("shape", [shape for shape, *_ in EPILOGUES])
def test_a_fused_epilogue_is_checked(shape):
    (case,) = (
        case
        for case in check_cases(False, "xla")
        if case.name.startswith(f"{shape} +") and case.kind == "fp32"
    )
    case = dataclasses.replace(case, spec=dataclasses.replace(case.spec, batch=3))
    assert max(check(case, xla.IMPLEMENTATION).values()) < 1e-6

    def without(part):
        """XLA's implementation with a fused epilogue that forgets a part."""

        def forward(spec, *operands):
            scale, bias, residual = (
                None if name == part else a for name, a in zip(ALL_PARTS, operands[5:])
            )
            spec = dataclasses.replace(spec, relu=spec.relu and part != "relu")
            return apply_epilogue(
                xla.IMPLEMENTATION.forward(spec, *operands[:5]), scale, bias, residual, spec.relu
            )

        return dataclasses.replace(xla.IMPLEMENTATION, forward=forward, fused=True)

    assert max(check(case, without("nothing")).values()) < 1e-6
    for part in (*case.epilogue, *["relu"] * case.spec.relu):
        with pytest.raises(AssertionError, match="the forward differs from float64"):
            check(case, without(part))


@pytest.mark.slow
def test_the_checks_force_every_method_of_the_triton_kernels(monkeypatch):
    launches = []

    def run(launch, *operands):
        launches.append(launch)
        return jnp.zeros(launch.out.shape, launch.out.dtype)

    monkeypatch.setattr(calls, "run", run)
    record = dataclasses.replace(triton.IMPLEMENTATION, supports=triton.limits)
    cases = list(check_cases(False, "triton"))
    assert {case.variant for case in cases} == {"", "transposed", "scatter", "wide"}
    assert len({(case.name, case.kind) for case in cases}) == len(cases)
    for case in cases:
        if case.variant and case.kind == "bf16":
            launches.clear()
            few_images = dataclasses.replace(case.spec, batch=8)
            with pytest.raises(AssertionError, match="differs from float64"):
                check(dataclasses.replace(case, spec=few_images), record)
            forward, *gradients = (dict(launch.constants) for launch in launches)
            assert {one["wide"] for one in (forward, *gradients)} == {case.variant == "wide"}
            methods = [
                "transposed" if one["table"] else "scatter"
                for one in gradients
                if one.get("backward")
            ]
            assert methods == [case.variant] or case.variant == "wide", case.name


def test_every_shape_that_is_checked_is_served_by_a_kernel():
    cases = list(check_cases(False, "triton"))
    assert {case.kind for case in cases} == set(KINDS)
    assert {case.spec.batch % 8 for case in cases} > {0}
    assert {case.spec.channel_block for case in cases} == {1, 8, 16, 32}
    assert (2, 2) in {case.spec.dilation for case in cases}
    for case in cases:
        assert triton.limits(case.spec) is None, case.name
        served = case.kind in ("bf16", "fp16") and case.spec.channel_block % 8 == 0
        assert (mosaic_gpu.limits(case.spec) is None) is served, case.name


def test_a_wrong_slice_is_noticed():
    spec = dataclasses.replace(TINY, batch=5)
    x, dy, values, *index = shapes.operands(spec)
    passes = single_passes(lambda x, values, *index: convolve(spec, "xla", x, values, *index))
    results = {name: run(x, dy, values, *index) for name, run in passes.items()}
    check_slices(spec, "fp32", (x, dy, values, *index), results)
    for name in PASS_NAMES:
        wrong = results | {name: 1.001 * results[name]}
        with pytest.raises(AssertionError, match=f"the {name} differs from float64"):
            check_slices(spec, "fp32", (x, dy, values, *index), wrong)


@pytest.fixture(scope="module")
def dry(tmp_path_factory):
    """A dry run that was stopped at once and then continued."""
    folder = tmp_path_factory.mktemp("gpu")
    config = GpuConfig(
        quick=True, journal=folder / "j.jsonl", out=folder / "bench_kernels_gpu.json"
    )
    stopped = kernels.main(dataclasses.replace(config, minutes=0.0))
    lines = config.journal.read_text().splitlines() if config.journal.exists() else []
    return config, stopped, len(lines), kernels.main(config)


@pytest.mark.slow
def test_a_dry_run_stops_continues_and_reports(dry):
    config, stopped, lines, report = dry
    assert not stopped["complete"]
    assert report["complete"]
    assert lines == 0, "no time, no unit"
    assert not report["failed"]
    assert {c["kind"] for c in report["checks"]} == set(KINDS)
    assert [c["name"] for c in report["ceilings"]][:3] == ["launch", "copy", "matmul"]
    assert all(c["rate"] > 0 for c in report["ceilings"])
    assert json.loads(config.out.read_text()) == json.loads(json.dumps(report))
    assert str(config.out.parent) not in config.out.read_text(), "no paths of this machine"
    before = config.journal.read_text()
    again = kernels.main(config)
    assert config.journal.read_text() == before, "nothing is measured twice"
    assert again["rows"] == report["rows"]


@pytest.mark.slow
def test_a_row_says_what_was_timed(dry):
    report = dry[-1]
    modes = [*PASS_NAMES, TOGETHER]
    assert [row["mode"] for row in report["rows"]] == modes * 2
    keys = {"shape", "density", "tile", "device", "versions", "commit", "regret", "picked", "l2"}
    for row in report["rows"]:
        assert keys <= set(row)
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
            for name, ms in zip(PASS_NAMES, medians)
        }

    dense = {
        "ms": {name: times(3.0, 3.0, 3.0) for name in ("dense NHWC", "dense NCHW", "masked dense")}
    }
    sparse = {
        "mosaic_gpu": {"ms": times(1.0, 2.0, 4.0)},
        "triton": {"ms": times(2.0, 1.0, 5.0)},
        "xla": {"refused": "not here"},
    }
    by_mode = {row["mode"]: row for row in rows({"layer": "a"}, dense, sparse)}
    assert {row["chosen"] for row in by_mode.values()} == {"mosaic_gpu"}
    assert {str(row["refused"]) for row in by_mode.values()} == {"{'xla': 'not here'}"}
    assert [by_mode[mode]["runs"] for mode in PASS_NAMES] == ["mosaic_gpu", "triton", "dense"]
    assert by_mode["forward"]["speed_up_over_dense"] == 3.0
    assert by_mode["weight gradient"]["speed_up_over_dense"] == 0.75, (
        "the speed of the chosen kernel, even where it loses"
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
        implementations,
        "implementations",
        lambda: {"mosaic_gpu": WRONG, "xla": xla.IMPLEMENTATION, "triton": "absent"},
    )
    monkeypatch.setattr(tiles, "chosen_tiles", lambda name, spec: {})
    config = GpuConfig(quick=True, journal=tmp_path / "j.jsonl", layers="small 64@4")
    assert kernels.run(config) == 1
    errors = capsys.readouterr().err
    assert "WRONG mosaic_gpu, 3x3 same, bf16" in errors
    assert re.search(
        "checks failed, nothing was timed.*mosaic_gpu, 3x3 same.*weight gradient differs", errors
    )
    config = dataclasses.replace(config, keep_going=True, stages=("check", "layers"))
    report = kernels.main(config)
    assert len(report["failed"]) == 8, "plain and fused, in four kinds of arithmetic"
    assert report["rows"]
    assert all("mosaic_gpu" not in row["ms"] for row in report["rows"])
    assert kernels.run(config) == 1


@pytest.mark.parametrize(
    "command",
    [
        lambda: cpu_kernels.cli(["--device", "gpu"]),
        lambda: cpu_training.cli(["--device=gpu"]),
    ],
)
def test_another_device_is_refused(command, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert command() == 2
    error = capsys.readouterr().err
    assert "device: expected an NVIDIA GPU, got 'cpu'" in error
    assert "pass --quick for a dry run" in error
    assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match="device: expected an NVIDIA GPU"):
        tune.main(tune.Config())
    with pytest.raises(ValueError, match="stages: expected some of gate"):
        kernels.main(GpuConfig(quick=True, stages=("chek",)))


@pytest.mark.usefixtures("short_programs")
def test_tuning_stops_continues_and_writes_the_best_tile(tmp_path):
    config = tune.Config(
        quick=True, layers="small 64@4", journal=tmp_path / "t.jsonl", folder=tmp_path
    )
    assert not tune.main(dataclasses.replace(config, minutes=0.0))
    assert not list(tmp_path.glob("tuned_*"))
    path = tmp_path / "tuned_none.json"
    path.write_text('{"tiles": {"xla": {"of another day": {"name": "rows"}}}}')
    assert tune.main(config)
    tiles_of_xla = json.loads(path.read_text())["tiles"]["xla"]
    assert "of another day" in tiles_of_xla
    assert len(tiles_of_xla) == 4
    results = [
        json.loads(line)["result"]
        for line in config.journal.read_text().splitlines()
        if '"done"' in line and '"tune ' in line
    ]
    for result in results:
        assert tiles_of_xla[result["key"]] == result["best"]
        median_ms = {t["tile"]["name"]: t["median"] for t in result["tiles"]}
        assert result["milliseconds"] == median_ms[result["best"]["name"]]
        assert result["milliseconds"] <= result["default_milliseconds"]
    before = config.journal.read_text()
    assert tune.main(config)
    assert config.journal.read_text() == before


@pytest.mark.usefixtures("short_programs")
def test_a_wrong_or_broken_tile_is_not_taken(tmp_path):
    def broken(*operands):
        raise ZeroDivisionError("no such tile")

    forward = {
        "wrong": lambda *a: 1.1 * xla.IMPLEMENTATION.forward(*a),
        "broken": broken,
        "right": xla.IMPLEMENTATION.forward,
    }
    which = dataclasses.replace(
        tiles.tunable("xla"),
        candidates=lambda *_: [tiles.Formulation(name) for name in forward],
        default=lambda *_: tiles.Formulation("right"),
        build=lambda _, tile: dataclasses.replace(xla.IMPLEMENTATION, forward=forward[tile.name]),
    )
    spec = dataclasses.replace(TINY, dtype="bfloat16")
    journal = Journal(tmp_path / "j.jsonl")
    measure = functools.partial(
        tile_times.measure_pass, which, spec, "forward", threads=2, repetitions=2
    )

    def first_run(tile, function):
        result = journal.run(tile, function)
        return journal.error(tile) or result

    result = measure(first_run=first_run)
    assert result["best"] == {"name": "right"}
    errors = {t["tile"]["name"]: t["error"] for t in result["tiles"] if "error" in t}
    assert errors["broken"] == "ZeroDivisionError: no such tile"
    assert errors["wrong"].startswith("differs from the default tile by 1.0e-01")

    def device_lost_by_wrong(tile, function):
        return "RuntimeError: CUDA_ERROR" if "wrong" in tile else function()

    result = measure(first_run=device_lost_by_wrong)
    assert result["best"] == {"name": "right"}
    assert {t["error"] for t in result["tiles"] if t["tile"]["name"] == "wrong"} == {
        "RuntimeError: CUDA_ERROR"
    }


@pytest.mark.parametrize("name", ["mosaic_gpu", "triton"])
def test_few_tiles_are_timed_and_every_method_is_among_them(name):
    which = tiles.tunable(name)
    for case in shapes.cases("n256"):
        spec = shapes.case_spec(case, sparsity=0.9)
        for pass_name in PASSES:
            timed = tiles.tiles_to_time(which, spec, pass_name)
            assert len(set(timed)) == len(timed) <= tiles.MOST
            assert timed[0] == which.default(spec, pass_name)
            if name == "triton":
                assert set(triton_tiles.frugal_tiles(spec, pass_name)) <= set(timed)
                if pass_name == "input_gradient":
                    assert {tile.method for tile in timed} == set(products.METHODS)


def normalising(error=1.0):
    """XLA's passes, which take a raw input too; the output is off by a factor."""
    plain = xla.IMPLEMENTATION

    def forward(spec, *operands):
        y, sums = norm_passes.forward_with_sums(plain.forward, spec, *operands)
        return (error if len(operands) > 5 else 1) * y, sums

    def weights(spec, *operands):
        return plain.weight_gradient(spec, *norm_passes.normalised(spec, *operands))

    return dataclasses.replace(plain, forward_with_sums=forward, weight_gradient=weights)


@pytest.mark.usefixtures("short_programs")
def test_a_norm_in_the_load_is_timed_beside_one_in_front(tmp_path, monkeypatch):
    measure = functools.partial(
        prologue_times.measure_prologue, spec=TINY, threads=2, repetitions=1
    )
    result = measure(normalising())
    assert result["key"] == tuned_tables.layer_key(TINY)
    assert min(result["with"], result["without"]) > 0
    with pytest.raises(RuntimeError, match=r"with a prologue the results differ by 1\.0e-01"):
        measure(normalising(1.1))

    for module in (tune, tuned_tables):
        monkeypatch.setattr(module, "this_gpu", lambda: "h200")
    monkeypatch.setattr(tuned_tables, "FOLDER", tmp_path)
    for times, is_faster in (([1.0, 2.0], True), ([2.0, 1.0], False)):
        timed = result | dict(zip(("with", "without"), times))
        tune.write_table(tiles.tunable("triton"), [], tune.Config(folder=tmp_path), [timed])
        tuned_tables.read.cache_clear()
        assert triton.IMPLEMENTATION.normalises(TINY) == is_faster
        assert not triton.IMPLEMENTATION.normalises(dataclasses.replace(TINY, batch=3))
    tuned_tables.read.cache_clear()


@pytest.mark.parametrize("name", ["mosaic_gpu", "triton"])
def test_the_kernels_read_the_tables_that_the_tuner_writes(name, tmp_path, monkeypatch):
    which = tiles.tunable(name)
    spec = shapes.case_spec(shapes.cases("vgg19 256@8 n128")[0], sparsity=0.9)
    measured = []
    for pass_name in PASSES:
        default = which.default(spec, pass_name)
        other = next(tile for tile in which.candidates(spec, pass_name) if tile != default)
        assert which.build(pass_name, other).name == name
        measured.append(
            {
                "key": which.key(spec, pass_name),
                "best": dataclasses.asdict(other),
                "milliseconds": 1.0,
                "default_milliseconds": 2.0,
            }
        )
    for module in (tune, tuned_tables):
        monkeypatch.setattr(module, "this_gpu", lambda: "h200")
    monkeypatch.setattr(tuned_tables, "FOLDER", tmp_path)
    path = tune.write_table(which, measured, tune.Config(folder=tmp_path))
    assert path == tmp_path / "tuned_h200.json"
    tuned_tables.read.cache_clear()
    try:
        for pass_name, result in zip(PASSES, measured):
            assert dataclasses.asdict(which.default(spec, pass_name)) == result["best"]
    finally:
        tuned_tables.read.cache_clear()


def test_an_implementation_is_named_by_its_sources_and_tiles(monkeypatch):
    from experiments.bench.gpu.fingerprint import implementation_key

    spec = shapes.case_spec(shapes.cases("vgg19 256@8 n128")[0], sparsity=0.9)
    assert implementation_key("triton") != implementation_key("mosaic_gpu")
    before = implementation_key("triton", spec)
    assert before.startswith(implementation_key("triton"))
    monkeypatch.setattr(tiles, "chosen_tiles", lambda name, spec: {"forward": {"rows": 1}})
    assert implementation_key("triton", spec) != before


@pytest.mark.usefixtures("short_programs")
def test_dense_and_masked_run_in_every_pass_and_layout():
    result = layers.measure_dense(TINY, repetitions=1)
    assert set(result["ms"]) == {"dense NHWC", "dense NCHW", "masked dense"}
    assert all(set(passes) == set(PASS_NAMES) for passes in result["ms"].values())
    assert clock.MOST_SETS >= result["sets"] >= 1
