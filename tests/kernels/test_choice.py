"""What `implementation=None` picks and how that is measured: the tuned table and its tuner."""

import dataclasses
import functools
import json

import jax
import pytest
from conv_cases import BASE, specs
from hypothesis import given, settings
from hypothesis import strategies as st
from requirements import needs

from experiments.bench import kernels, layer_times, shapes, tune
from pallas_kernels.block_sparse_conv import choice, choose_implementation, cpu, cpu_times, xla
from pallas_kernels.block_sparse_conv.xla import tiles


def test_the_choice_loses_at_most_a_tenth_at_the_tuned_shapes_and_names_the_formulation():
    cases, entries = tune.cases(), json.loads(cpu_times.TABLE.read_text())["entries"]
    assert {entry["name"] for entry in entries} == set(cases)
    for entry in entries:
        spec, times = cases[entry["name"]], entry["milliseconds"]
        assert entry["features"] == cpu_times.features(spec)
        for mode, gradients in cpu_times.MODES.items():
            chosen = tiles.choose(dataclasses.replace(spec, gradients=gradients), "cpu")
            formulations = {
                name: ms for name, ms in times[mode].items() if name != cpu_times.NATIVE
            }
            assert times[mode][chosen] <= 1.1 * min(formulations.values()), (entry["name"], mode)
    half = dataclasses.replace(BASE, dtype="float16")  # not among the native kernels' dtypes
    picked = choose_implementation(half)
    assert picked.implementation == "xla"
    assert picked.details["forward"] == tiles.choose(half)
    assert picked.details["forward + gradients"] == tiles.choose(
        dataclasses.replace(half, gradients=True)
    )


@needs(cpu.unavailable())
@pytest.mark.parametrize("wins", ["forward", "forward + gradients"])
def test_each_mode_runs_what_was_faster_there(monkeypatch, wins):
    monkeypatch.setattr(
        choice, "native_gain", lambda spec: 2.0 if spec.gradients == cpu_times.MODES[wins] else 0.5
    )
    loses = next(mode for mode in cpu_times.MODES if mode != wins)
    x, dy, values, *index = shapes.random_operands(BASE)
    run = functools.partial(shapes.convolve, BASE, None)
    programs = {
        "forward": lambda: run(x, values, *index),
        "forward + gradients": lambda: jax.vjp(lambda x: run(x, values, *index), x)[1](dy),
    }
    native = {
        mode: "ffi_call" in str(jax.make_jaxpr(program)()) for mode, program in programs.items()
    }
    assert native == {wins: True, loses: False}
    for mode, gradients in cpu_times.MODES.items():
        picked = choose_implementation(dataclasses.replace(BASE, gradients=gradients))
        assert picked.implementation == ("cpu" if mode == wins else "xla")
        assert (picked.details[wins], picked.details[loses]) == (
            cpu.instructions(BASE),
            tiles.choose(dataclasses.replace(BASE, gradients=cpu_times.MODES[loses])),
        )


@settings(max_examples=200, deadline=None)
@given(specs(), st.sampled_from(["cpu", "gpu", "tpu"]))
def test_something_supported_is_chosen_for_any_shape(spec, backend):
    many = dataclasses.replace(spec, groups=spec.groups * 16, cout=spec.cout * 16)
    for any_spec in (spec, many):
        assert xla.FORMULATIONS[tiles.choose(any_spec, backend)].supports(any_spec) is None


def test_tuning_rewrites_one_entry_and_keeps_the_others(tmp_path):
    table = tmp_path / "table.json"
    table.write_text(cpu_times.TABLE.read_text())
    tune.main(tune.Config(seconds=0.0, only="digits 16-32@8 80%", table=table))
    before, after = (json.loads(path.read_text()) for path in (cpu_times.TABLE, table))
    changed = [
        a["name"] for a, b in zip(after["entries"], before["entries"], strict=True) if a != b
    ]
    assert len(changed) == 1
    assert after["environment"]["jax"] == jax.__version__


@pytest.mark.slow
def test_the_benchmark_checks_times_and_writes(tmp_path, capsys):
    out = tmp_path / "bench.json"
    config = kernels.KernelConfig(quick=True, layers="resnet32x2 128@8", out=str(out))
    report = kernels.main(config)
    assert json.loads(out.read_text()) == json.loads(json.dumps(report))
    assert [row["mode"] for row in report["rows"]] == list(cpu_times.MODES)
    keys = {"shape", "density", "tile", "device", "versions", "commit", "regret", "ms"}
    assert all(keys <= set(row) for row in report["rows"])
    assert "resnet32x2 128@8" in capsys.readouterr().out
    with pytest.raises(ValueError, match="layers: no layer"):
        kernels.main(dataclasses.replace(config, layers="resnet33"))


def test_the_benchmark_fails_loudly_on_a_wrong_kernel(monkeypatch):
    rows = xla.FORMULATIONS["rows"]
    wrong = dataclasses.replace(
        rows, weight_gradient=lambda *operands: 1.001 * rows.weight_gradient(*operands)
    )
    monkeypatch.setitem(xla.FORMULATIONS, "rows", wrong)
    # The forward pass, which is right, is timed before the gradients are checked.
    monkeypatch.setattr(
        layer_times, "time_in_turn", lambda calls, **_: {name: [1.0] for name in calls}
    )
    with pytest.raises(AssertionError, match="xla:rows: the weight gradient differs"):
        kernels.main(kernels.KernelConfig(quick=True, layers="resnet32x2 128@8"))
