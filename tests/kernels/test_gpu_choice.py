"""What `implementation=None` picks on a GPU: by the committed tables, else by a rule."""

import dataclasses
import json

import pytest

from experiments.bench.gpu import layer_table, shapes
from experiments.reporting import results
from pallas_kernels.block_sparse_conv import choice, choose_implementation, gpu_times, tuned_tables

REPORT = results.RESULTS / "bench_kernels_gpu.json"
CASES = {case.name: case for case in shapes.cases()}


def spec_of(name, sparsity=0.9, **changes):
    return dataclasses.replace(shapes.case_spec(CASES[name], sparsity=sparsity), **changes)


@pytest.fixture
def on_h200(monkeypatch):
    """An H200 whose kernels can run everything."""
    for module in (tuned_tables, gpu_times):
        monkeypatch.setattr(module, "this_gpu", lambda: "h200")
    for name in choice.GPU_KERNELS:
        record = dataclasses.replace(choice.IMPLEMENTATIONS[name], supports=lambda spec: None)
        monkeypatch.setitem(choice.IMPLEMENTATIONS, name, record)
    tuned_tables.read.cache_clear()
    yield
    tuned_tables.read.cache_clear()


def test_no_measured_layer_runs_slower_than_dense(on_h200):
    layers = tuned_tables.read("h200")["layers"]
    by_key = {tuned_tables.layer_key(spec_of(name)): spec_of(name) for name in CASES}
    assert layers
    assert layers.keys() <= by_key.keys()
    picks = set()
    for key, layer in layers.items():
        assert {"commit", "device", "versions"} <= layer.keys()
        for gradients in (False, True):
            picked = choose_implementation(dataclasses.replace(by_key[key], gradients=gradients))
            passes = list(layer["milliseconds"].values())[: 3 if gradients else 1]
            took, dense = (
                sum(times[name] for times in passes) for name in (picked.implementation, "dense")
            )
            assert took <= dense, layer["name"]
            assert f"{1e3 * took:.0f} us" in picked.reason
            assert f"'dense' {1e3 * dense:.0f} us" in picked.reason
            picks.add(picked.implementation)
    assert picks == {"triton", "dense"}


def test_a_layer_that_was_slower_runs_dense_and_the_reason_says_so(on_h200):
    picked = choose_implementation(spec_of("vgg19 256@8 n128", gradients=True))
    assert picked.implementation == "dense"
    expected = "measured on this GPU (h200): 'mosaic_gpu' 66 us, 'dense' 63 us"
    assert picked.reason == expected
    assert picked.details == {"forward": "dense", "forward + gradients": "dense"}


def test_other_shapes_are_picked_by_rule(on_h200):
    sparse = spec_of("vgg19 512@4 n1024")
    whole = dataclasses.replace(sparse, kept=sparse.cin, kept_taps=9)
    for spec, expected in ((sparse, "triton"), (whole, "dense")):
        picked = choose_implementation(spec)
        assert picked.implementation == expected
        assert "not measured on this GPU" in picked.reason


def test_the_rule_agrees_with_what_was_measured():
    """Kernels in whole steps, without the lists that a step made then."""
    profiles = json.loads((results.RESULTS / "bench_profile_gpu.json").read_text())["rows"]
    (profile,) = (
        row for row in profiles if (row["model"], row["implementation"]) == ("vgg19", "best")
    )
    layers = {"64@32": 1, "64-128@16": 1, "128@16": 1, "128-256@8": 1}
    layers |= {"256@8": 3, "256-512@4": 1, "512@4": 3, "512@2": 4}
    kernels = {"forward": "gather_product", "weight_gradient": "weight_gradient"}
    for pass_name, kernel in kernels.items():
        total = sum(
            count * gpu_times.kernel_ms(spec_of(f"vgg19 {name} n128"), pass_name)
            for name, count in layers.items()
        )
        assert 1e3 * total == pytest.approx(profile["kernels"][kernel][1], rel=0.1)
    table = json.loads(tuned_tables.path("h200").read_text())["layers"]
    for layer in table.values():
        spec = spec_of(layer["name"].removesuffix(" 90%"))
        dense_ms = layer["milliseconds"]["forward"]["dense"]
        assert gpu_times.dense_ms(spec) == pytest.approx(dense_ms, rel=0.1)


def test_the_committed_layers_are_those_of_the_report(tmp_path):
    file = layer_table.write_layers(REPORT, tmp_path)
    assert file.name == "tuned_h200.json"
    committed = json.loads(tuned_tables.path("h200").read_text())
    assert json.loads(file.read_text())["layers"] == committed["layers"]
    tuned_tables.write_tiles(file, "triton", {"a key": {"rows": 64}}, {"a key": [1.0, 2.0]}, {})
    tuned_tables.write_tiles(file, "mosaic_gpu", {"a key": {"rows": 32}}, {}, {"threads": 2})
    table = json.loads(file.read_text())
    assert table["layers"] == committed["layers"]
    assert table["tiles"]["triton"] == {"a key": {"rows": 64}}
    assert table["tiles"]["mosaic_gpu"] == {"a key": {"rows": 32}}
    assert table["environment"] == {"threads": 2}


def test_a_row_of_other_blocks_is_refused(tmp_path):
    report = json.loads(REPORT.read_text())
    report["rows"][0]["tile"]["kept"] += 16
    path = tmp_path / "report.json"
    path.write_text(json.dumps(report))
    with pytest.raises(ValueError, match="rows: resnet50 256@14 n256 is now in blocks"):
        layer_table.write_layers(path, tmp_path)
