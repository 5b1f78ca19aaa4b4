"""The sweeps: their tables and settings, and runs that are killed, moved, shared and cut."""

import contextlib
import dataclasses
import json
import math
import re
from pathlib import Path

import jax
import numpy as np
import pytest
from new_process import run_python
from tiny_runs import config as tiny

from experiments import sweep
from experiments.reporting import results, sweep_figure
from experiments.reporting.reports import sweep as sweep_report
from experiments.sweeps import folder as sweep_folder
from experiments.sweeps import jobs, tables
from experiments.sweeps.settings import SCALES, at_scale
from experiments.sweeps.table import Cell
from experiments.training.config import resolve
from experiments.training.execution import masks_of
from experiments.training.programs import Programs
from experiments.training.run import Run
from experiments.training.run_folder import RunFolder

SHORT = {"name": "hrbp-static", "scale": "smoke", "seeds": 1, "cells": "/rc/"}
TIMES = {"train_seconds", "step_ms_median", "step_ms_iqr", "topology_step_ms_median"}
TIMES |= {"original_step_ms_median", "commit"}


def short(tmp_path, **fields):
    return sweep.SweepConfig(**SHORT | {"out": str(tmp_path / "sweeps")} | fields)


def numbers(out):
    """What the cells of a folder have brought, without times."""
    found = {}
    for path in sorted((Path(out) / "cells").iterdir()):
        rows = [*RunFolder(path).metrics(), RunFolder(path).result()]
        found[path.name] = [{k: v for k, v in row.items() if k not in TIMES} for row in rows]
    return found


def size(path):
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


@pytest.mark.parametrize("name", tables.TABLES)
def test_a_table_is_well_formed(name):
    table = tables.table(name)
    names = [cell.name for cell in table.cells]
    assert len(set(names)) == len(names)
    assert re.search(r"\d{4}", table.source), "a source names its year"
    assert table.cells or table.measured
    for scale in SCALES:
        for cell in table.cells:
            config = resolve(at_scale(cell.config, scale))
            assert config.warmup_epochs < config.epochs
    for cell in table.cells:
        assert cell.paper is None or 40 < cell.paper < 100


def test_the_settings_are_those_of_the_papers():
    cells = {cell.name: cell.config for cell in tables.table("hrbp-static").cells}
    for model, decay, width in (("resnet32", 1e-4, 2), ("vgg19", 5e-4, 1)):
        config = cells[f"{model}-90/hrbp"]
        fields = (config.epochs, config.batch_size, config.lr, config.lr_schedule)
        assert fields == (160, 128, 0.1, "step")
        assert (config.weight_decay, config.width) == (decay, width)
    assert cells["vgg19-90/lth"].epochs == 160 * 12, "eleven rounds, and the dense pass"
    assert cells["resnet32-90/snip"].options.examples == 100
    many = {cell.name: cell.config for cell in tables.table("hrbp-static-cifar100").cells}
    grasp = [many[f"{model}-90/grasp"].options for model in ("resnet32", "vgg19")]
    assert [(o.examples_per_class, o.batches) for o in grasp] == [(5, 2), (10, 1)]
    campfire = tables.table("campfire-tiny-imagenet").cells[1].config
    fields = (campfire.optimizer, campfire.lr, campfire.lr_schedule, campfire.batch_size)
    assert fields == ("adam", 1e-3, "last-quarter", 64)


def test_a_killed_sweep_goes_on_in_a_new_process_and_ends_with_the_same_numbers(tmp_path):
    config = short(tmp_path)
    flags = [config.name, "--scale", "smoke", "--seeds", "1", "--cells", config.cells]
    killing = f"""
import os, signal
from experiments import sweep
from experiments.sweeps import jobs
from experiments.training.run import Run

jobs.CHECKPOINT_SECONDS, step = 0, Run._train_step

def dying(run, *batch):
    if run.step == 6:
        os.kill(os.getpid(), signal.SIGKILL)
    step(run, *batch)

Run._train_step = dying
sweep.cli({[*flags, "--out", config.out]!r})
"""
    assert run_python("-c", killing).returncode == -9
    [cell] = (Path(config.out) / "cells").iterdir()
    assert RunFolder(cell).checkpoints.steps() == [6]
    assert RunFolder(cell).result() is None
    done = run_python("-m", "experiments.sweep", *flags, "--out", config.out)
    assert done.returncode == 0, done.stderr
    assert "| RC |" in done.stdout
    whole = dataclasses.replace(config, out=str(tmp_path / "whole"))
    sweep.main(whole)
    assert numbers(config.out) == numbers(whole.out)
    assert {file.name for file in cell.iterdir()} <= sweep_folder._NUMBERS


def test_seeds_share_programs_and_finished_cells_do_not_run_again(tmp_path, monkeypatch, capsys):
    compiled, traced = [], []
    monkeypatch.setattr(sweep.SweepFolder, "use_cache", lambda self: None)

    def listen(event, seconds, **_):
        if event == "/jax/core/compile/backend_compile_duration":
            compiled.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    original = jobs.run

    def counted(job, *rest):
        before = len(compiled)
        ended = original(job, *rest)
        traced.append(len(compiled) - before)
        return ended

    monkeypatch.setattr(jobs, "run", counted)
    report = sweep.main(short(tmp_path, seeds=2, cells="/ru/"))
    [row] = report["rows"]
    assert row["seeds"] == 2
    assert row["test_accuracy_std"] is not None
    assert traced[1] == 0, f"{traced[1]} programs compiled for a second seed"
    first = (tmp_path / "sweeps/tables/hrbp-static-smoke.json").read_text()
    assert json.loads(first) == report
    monkeypatch.setattr(jobs, "run", None)
    assert sweep.main(short(tmp_path, seeds=2, cells="/ru/"))["rows"] == report["rows"]
    sweep.main(short(tmp_path, seeds=2, cells="/ru/", dry_run=True))
    assert capsys.readouterr().out.count("finished") == 2


@pytest.mark.parametrize("method", ["set", "subp"])
def test_shared_programs_draw_with_the_run_s_own_key(tmp_path, method):
    def masks(seed, programs):
        settings = tiny(tmp_path, method, seed=seed, epochs=1, out=str(tmp_path / f"{seed}"))
        run = Run(settings, resume=(tmp_path / f"{seed}").exists(), programs=programs)
        run.train()
        return jax.tree.leaves(masks_of(run.state))

    shared = Programs()
    masks(0, shared)
    together = masks(1, shared)
    (tmp_path / "1").rename(tmp_path / "moved")
    for a, b in zip(together, masks(1, Programs.__new__(Alone)), strict=True):
        np.testing.assert_array_equal(a, b)


class Alone(Programs):
    """Shares nothing."""

    def share(self, trainer):
        pass


def test_a_cell_of_other_settings_is_named(tmp_path, capsys):
    """A default that changed between two versions does not change the name of a cell's folder."""
    with contextlib.closing(sweep.SweepFolder(tmp_path / "sweeps", 1 << 20)) as folder:
        table = tables.table("hrbp-static")
        job = jobs.jobs(table, folder, "data", "smoke", 1, "/ru/")[0]
        assert jobs.outdated(job) is None, "nothing was run"
        job.path.mkdir()
        config = dataclasses.asdict(job.config)
        for budget, expected in ((config["options"]["budget"], None), ("er", "budget 'er' ->")):
            config["options"]["budget"] = budget
            (job.path / "config.json").write_text(json.dumps(config))
            said = jobs.outdated(job)
            assert said is None if expected is None else expected in said
        assert f"delete {job.path}" in said
        with pytest.raises(ValueError, match=r"ru.*budget 'er' -> .*delete"):
            jobs.run(job, folder, None, Programs())
        (job.path / "result.json").write_text("{}")
        sweep._run_all(folder, [job], math.inf)
        assert said in capsys.readouterr().err
        sweep._show_cells(folder, [job])
        assert "finished with other settings" in capsys.readouterr().out


def test_a_checkpoint_that_does_not_fit_stays_beside_the_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(sweep, "LIMIT", 1 << 20)
    monkeypatch.setattr(sweep_folder, "_SPARE", 1 << 20)  # so that there is no room
    monkeypatch.setattr(jobs, "CHECKPOINT_SECONDS", 0)
    config = short(tmp_path)
    here, sizes, step = Path(config.out + ".here"), [], Run._train_step

    def stopping(run, *batch):
        sizes.append((size(Path(config.out)), size(here)))
        if run.step == 4:
            raise KeyboardInterrupt
        step(run, *batch)

    with monkeypatch.context() as patch:
        patch.setattr(Run, "_train_step", stopping)
        with pytest.raises(KeyboardInterrupt):
            sweep.main(config)
    assert max(travels for travels, _ in sizes) < 20_000
    assert min(stays for _, stays in sizes) > 200_000
    resumed = []

    def going_on(run, *batch):
        resumed.append(run.step)
        step(run, *batch)

    monkeypatch.setattr(Run, "_train_step", going_on)
    sweep.main(config)
    assert resumed[0] == 4
    assert not list(here.iterdir())


def test_the_cache_is_cut_and_the_oldest_programs_go(tmp_path):
    folder = sweep_folder.SweepFolder(tmp_path / "s", limit=4000)
    cache = tmp_path / "s" / "cache"
    cache.mkdir()
    for name in "abc":
        (cache / name).write_bytes(bytes(400))
        jax.block_until_ready(0)
    (cache / "a").touch()
    folder.tidy()
    assert size(cache) <= 1000
    assert (cache / "a").exists()
    with pytest.raises(ValueError, match="in use by another run"):
        sweep_folder.SweepFolder(tmp_path / "s")


def test_time_limits_stop_between_steps(tmp_path):
    report = sweep.main(short(tmp_path, minutes=0))
    assert report["rows"][0]["seeds"] == 0
    assert not list((tmp_path / "sweeps/cells").iterdir())


def test_a_cell_that_diverges_does_not_stop_the_others_and_does_not_run_again(
    tmp_path, monkeypatch, capsys
):
    begun = []

    def diverging(job, *_):
        begun.append(job.name)
        raise FloatingPointError("the loss is nan at step 3")

    monkeypatch.setattr(jobs, "run", diverging)
    for _ in range(2):
        [row] = sweep.main(short(tmp_path, seeds=2))["rows"]
    assert row["failed"] == ["the loss is nan at step 3"] * 2
    assert begun == ["resnet32-90/rc/seed0", "resnet32-90/rc/seed1"]
    assert "| diverged |" in capsys.readouterr().out


def test_what_is_wrong_is_said_in_one_line(tmp_path, capsys):
    file = tmp_path / "file"
    file.touch()
    out = ["--out", str(tmp_path / "s"), "--scale", "smoke"]
    for arguments, words in (
        (["hrbp-statik"], r"name: expected one of 'hrbp-static', .*; did you mean 'hrbp-static'?"),
        (
            ["hrbp-static", *out, "--cells", "nothing"],
            r"no cell matches 'nothing'; .*vgg19-90/hrbp",
        ),
        (["hrbp-static", "--out", str(file / "s")], "Not a directory"),
        (["hrbp-static", *out, "--scale", "huge"], "scale: expected one of 'full', 'cpu', 'smoke'"),
    ):
        with pytest.raises(SystemExit) as stop:
            sweep.cli(arguments)
        assert stop.value.code == 2
        error = capsys.readouterr().err
        assert re.search(words, error), error
        assert "Traceback" not in error
    sweep.cli([])
    listed = capsys.readouterr().out
    assert all(name in listed for name in tables.TABLES)


def test_groups_shrink_with_the_width_at_the_scale_of_cpus():
    cells = {cell.name: cell.config for cell in tables.table("hrbp-static").cells}
    sizes = {
        model: at_scale(cells[f"{model}-90/hrbp"], "cpu").options.group_size
        for model in ("resnet32", "vgg19")
    }
    assert sizes == {"resnet32": 16, "vgg19": 8}, "of 32, at a half and a quarter of the width"
    ordered = {cell.name: cell.config for cell in tables.table("hrbp-ablation").cells}
    options = at_scale(ordered["vgg19-90/channel-block-64-ordered"], "cpu").options
    assert (options.group_size, options.channel_block) == (16, 16)


def test_patterns_select_cells_and_seeds(tmp_path):
    folder = sweep_folder.SweepFolder(tmp_path / "s")
    table = tables.table("hrbp-static")

    def names(pattern):
        return [job.name for job in jobs.jobs(table, folder, "data", "full", 2, pattern)]

    assert len(names("")) == 84
    assert names("vgg19-90/hrbp") == ["vgg19-90/hrbp/seed0", "vgg19-90/hrbp/seed1"]
    assert names("*-95/RC/seed1") == ["resnet32-95/rc/seed1", "vgg19-95/rc/seed1"]
    first, other = (name.rpartition("/")[2] for name in (names("")[0], names("")[42]))
    assert (first, other) == ("seed0", "seed1")


def test_the_time_of_a_cell_comes_from_what_was_timed_here():
    config = resolve(at_scale(tables.table("hrbp-static").cells[2].config, "smoke"))
    job = jobs.Job("x", Cell("HRBP", config), Path("x"))
    assert job.steps == 11
    same = ("method", "dataset", "model", "width", "sparsity", "batch_size", "execution")
    done = {name: getattr(config, name) for name in same}
    done |= {"device": jobs.device(), "steps": 11, "train_seconds": 7.5, "step_ms_median": 20.0}
    assert jobs.seconds_expected(job, [done]) == 7.5
    assert jobs.seconds_expected(job, [done | {"steps": 22}]) == pytest.approx(0.22)
    assert jobs.seconds_expected(job, [done | {"device": "another"}]) is None


def report_of(**fields):
    row = {
        "row": "HRBP",
        "network": "VGG-19, width 0.25",
        "paper_network": "VGG-19",
        "data": "CIFAR-10 (q75)",
        "sparsity": 0.9,
        "epochs": 160,
        "paper": 92.88,
        "seeds": 3,
        "failed": [],
        "test_accuracy_mean": 0.9,
        "test_accuracy_std": 0.004,
        "density": 0.1,
        "kept_flops_fraction": 0.12,
        "training_flops_fraction": 0.11,
        "train_seconds": 100.0,
    }
    dense = row | {"row": "dense", "sparsity": 0.0, "paper": 94.23, "test_accuracy_mean": 0.92}
    report = {"table": "t", "title": "T", "source": "S, 2024", "note": "", "scale": "cpu"}
    report |= {"columns": [], "curves": False, "command": "python -m x", "rows": [dense, row]}
    return report | fields


def test_a_table_stands_beside_the_paper_s():
    text = sweep_report.table(report_of())
    cells = next(line for line in text.splitlines() if "| HRBP" in line).split(" | ")
    assert cells[1:6] == ["CIFAR-10 (q75)", "90%", "HRBP", "90.00 ± 0.40", "92.88 (VGG-19)"]
    assert cells[6:8] == ["-2.00", "-1.35"]
    assert "Scale cpu: smaller networks" in text
    assert "`python -m x`; 10 minutes of training" in text
    assert "<svg" in sweep_figure.draw(report_of())


def test_speed_ups_come_from_the_benchmarks(tmp_path, capsys):
    report = sweep.main(short(tmp_path, name="hrbp-speed", cells=""))
    assert "Command: `python -m experiments.sweep hrbp-speed" in capsys.readouterr().out
    [row] = [
        row
        for row in report["rows"]
        if (row["network"], row["sparsity"]) == ("VGG-19", 0.95) and "cpu" in row["device"]
    ]
    assert row["paper"] == 1.9
    assert row["speed_up"] > 1
    committed = results.read("sweep_hrbp-speed")["rows"]
    assert committed == report["rows"], f"run again: {report['command']} --results ..."


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:sparsity. density", "ignore:block_density")  # narrow layers
@pytest.mark.parametrize("name", tables.TABLES)
def test_the_smoke_scale_runs_every_table(tmp_path, name):
    report = sweep.main(short(tmp_path, name=name, cells=""))
    assert report["rows"]
    assert all(row.get("seeds", 1) == 1 for row in report["rows"])
    assert size(tmp_path / "sweeps") < sweep_folder.LIMIT
