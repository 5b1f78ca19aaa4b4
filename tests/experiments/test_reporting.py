"""Tables and figures come from the reports, stale ones are found, and drawing is repeatable."""

import dataclasses
import json
import xml.etree.ElementTree

import pytest

from experiments import report
from experiments.reporting import decision_figure, figures, markdown, results, tables
from experiments.reporting.reports import training
from experiments.training.registry import METHODS

STEPS = {  # execution -> data formats
    "dense": ("NHWC", "CHWN"),
    "PyTorch dense": ("channels_last",),
    "masked": ("NHWC",),
    "sparse": ("CHWN",),
    "packed": ("CHWN",),
}


def training_report(with_torch=True):
    """Two networks: dense steps of 100 and 130 ms, PyTorch's of 60, packed ones of 10 to 40."""
    rows = []
    for model in ("vgg19", "resnet32"):
        for execution, formats in STEPS.items():
            if execution == "PyTorch dense" and not with_torch:
                continue
            sparse = execution in ("masked", "sparse", "packed")
            for sparsity in (0.5, 0.9, 0.95) if sparse else (0.0,):
                for data_format in formats:
                    ms = {"dense": 100.0, "PyTorch dense": 60.0}.get(execution, 80 * (1 - sparsity))
                    ms = ms + 30 * (data_format == "CHWN" and not sparse)
                    rows.append(
                        {
                            "model": model,
                            "width": 2 if model == "resnet32" else 1,
                            "sparsity": sparsity,
                            "execution": execution,
                            "data_format": data_format,
                            "step_ms_median": ms,
                            "speed_up_over_dense": round(100 / ms, 3),
                        }
                    )
    versions = {"python": "3.11", "jax": "0.10"} | ({"torch": "2.13"} if with_torch else {})
    return {"rows": rows, "device": "a cpu", "versions": versions, "commit": "abc"}


@pytest.fixture(name="site")
def _site(tmp_path):
    """A README and a page of docs with marked tables, and the report that they show."""
    (tmp_path / "docs").mkdir()
    (tmp_path / "README.md").write_text(
        "before\n<!-- table:training_summary -->\n<!-- /table -->\nafter\n"
    )
    (tmp_path / "docs" / "benchmarks.md").write_text(
        "<!-- table:bench_training_cpu -->\nold\n<!-- /table -->\n"
    )
    (tmp_path / "bench_training_cpu.json").write_text(json.dumps(training_report()))
    return tables.TablesConfig(root=tmp_path, results=tmp_path)


def test_marked_tables_of_all_pages_and_the_figures_are_made(site):
    with pytest.raises(ValueError, match=r"README.md: training_summary, benchmarks.md: bench_tr.*"):
        tables.main(dataclasses.replace(site, check=True))
    assert (site.root / "docs" / "benchmarks.md").read_text().count("old") == 1, "only checked"
    tables.main(site)
    readme = (site.root / "README.md").read_text()
    assert readme.startswith("before\n<!-- table:training_summary -->\n| network | ")
    assert readme.endswith("<!-- /table -->\nafter\n")
    assert "a cpu; Python 3.11, jax 0.10, PyTorch 2.13; commit abc\n" in readme
    page = (site.root / "docs" / "benchmarks.md").read_text()
    assert "| VGG-19 | 90% | 100 / 130 | 60 | 8 (12.50x) | 8 (12.50x) | 8 (12.50x) |" in page
    assert (site.root / "docs" / "figures" / "training_step.svg").exists()
    tables.main(dataclasses.replace(site, check=True))


@pytest.mark.parametrize("stale", ["README.md", "docs/figures/training_step.svg"])
def test_the_check_finds_what_is_stale(site, stale):
    tables.main(site)
    path = site.root / stale
    path.write_text(path.read_text().replace("100", "101"))
    with pytest.raises(ValueError, match=rf"stale tables or figures: {path.name}[^,]*; run python"):
        tables.main(dataclasses.replace(site, check=True))
    assert "101" in path.read_text(), "a check writes nothing"


def test_the_command_ends_with_1_where_something_is_stale(site, capsys):
    paths = ["--root", str(site.root), "--results", str(site.results)]
    with pytest.raises(SystemExit) as stop:
        report.cli(["--check", *paths])
    assert stop.value.code == 1
    assert "error: stale tables or figures: README.md" in capsys.readouterr().err
    report.cli(paths)
    report.cli(["--check", *paths])


def test_an_unknown_table_says_what_there_is(site):
    (site.root / "README.md").write_text("<!-- table:nothing -->\n<!-- /table -->\n")
    with pytest.raises(ValueError, match=r"got 'nothing'; there: bench_training_cpu"):
        tables.main(site)
    with pytest.raises(ValueError, match=r"got 'bench_parts_cpu'; there: bench_training_cpu"):
        tables.table("bench_parts_cpu", site.results)


@pytest.mark.parametrize("with_torch", [True, False])
def test_the_summary_compares_the_packed_step_with_the_fastest_dense_ones(with_torch):
    lines = training.summary(training_report(with_torch)).splitlines()
    torch = ("60", "**7.5x**") if with_torch else ("—", "—")
    assert lines[2] == f"| VGG-19 | 90% | 100 | {torch[0]} | 8 | **12.5x** | {torch[1]} |"
    assert [line.split(" | ")[0] for line in lines[2:]] == ["| VGG-19"] * 2 + [
        "| ResNet-32, width 2"
    ] * 2
    assert ("PyTorch" in training.table(training_report(with_torch))) is with_torch


def test_a_figure_is_the_same_text_each_time_and_holds_every_number():
    report = training_report()
    svg = figures.training_step(report)
    assert svg == figures.training_step(report)
    texts = "".join(xml.etree.ElementTree.fromstring(svg).itertext())
    for text in ("VGG-19", "ResNet-32, width 2", "dense, XLA: 100", "dense, PyTorch: 60"):
        assert text in texts
    assert "block-sparse: 40" in texts
    assert "PyTorch" not in figures.training_step(training_report(with_torch=False))
    report["rows"][-1]["step_ms_median"] = 5.0
    assert svg != figures.training_step(report)


def test_reports_hold_no_paths_and_are_read_again(tmp_path):
    @dataclasses.dataclass
    class Config:
        batch: int = 2
        out: str = str(tmp_path)
        torch: str = str(tmp_path)
        journal: str = str(tmp_path)

    assert results.settings(Config()) == {"batch": 2}
    results.write({"a": 1.5}, tmp_path / "new" / "report.json")
    assert results.read("report", tmp_path / "new") == {"a": 1.5}
    assert results.names(tmp_path / "new") == ["report"]


def test_markdown_is_printed_as_it_is_into_a_pipe(capsys):
    markdown.show(markdown.table(["a", "b"], [["x", "1"]]))
    assert capsys.readouterr().out.startswith("| a | b |\n|---|---:|\n| x | 1 |\n")


def test_the_decision_figure_names_every_method_once():
    answers = [a for by_answer in decision_figure.ANSWERS.values() for a in by_answer.values()]
    names = [name for methods in answers for name in methods]
    assert sorted(names) == sorted(set(METHODS) - {"dense"})
    svg = decision_figure.draw()
    assert all(name in svg for name in names)
    assert svg == decision_figure.draw()
