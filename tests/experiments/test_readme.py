"""The README is true: its example runs, its commands exist, its tables are those of the committed
results.
"""

import re
import tomllib
from pathlib import Path

import pytest

import blocksparse_jax as bsj
from experiments.models import names
from experiments.reporting import tables
from experiments.training.registry import METHODS

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text()


SNIPPETS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def test_the_examples_run_one_after_the_other(capsys):
    """The first screen, the loop for every method, channel orders, linen, nnx."""
    names, printed = {}, []
    for code in SNIPPETS:
        exec(compile(code, "README.md", "exec"), names)
        printed.append(capsys.readouterr().out)
    assert len(printed) == 5
    assert "hrbp: sparse layers keep" in printed[0]
    for out in (printed[1], printed[4]):
        assert "hrbp-dynamic: sparse layers keep" in out
        assert "could grow nothing" not in out
    assert sorted(names["orders"]["hidden"]) == list(range(64))
    assert names["logits"].shape == (8, 10)


@pytest.mark.parametrize(
    "method",
    [
        "bsj.hrbp_prune(0.9)",
        "bsj.subp(0.75, start=0, end=3)",
        "bsj.sr_ste(2, 4)",
        "bsj.rigl(0.9, until=100, update_every=2)",
        "bsj.gradual_magnitude(0.9, start=0, end=3, update_every=1)",
    ],
)
def test_the_loop_serves_every_method(method, capsys):
    """Another method in its place, from the first example's untrained parameters."""
    names = {}
    exec(
        compile(
            SNIPPETS[0].split("tx = ")[0]
            + "x = jax.random.normal(jax.random.key(1), (8, 16, 16, 64))",
            "README.md",
            "exec",
        ),
        names,
    )
    dynamic = "bsj.hrbp_prune(0.9, update=bsj.periodic(2, until=100))"
    assert dynamic in SNIPPETS[1]
    exec(compile(SNIPPETS[1].replace(dynamic, method), "README.md", "exec"), names)
    assert "could grow nothing" not in capsys.readouterr().out
    density = bsj.summarize(names["params"], names["state"]).density
    assert density == pytest.approx(
        {"subp": 0.25, "sr_ste": 0.5}.get(re.findall(r"\.(\w+)\(", method)[0], 0.1), abs=0.005
    )


def test_every_command_names_a_module_and_a_target_that_exist():
    modules = set(re.findall(r"python -m ([\w.]+)", README))
    assert {"experiments.train", "experiments.prepare_data", "experiments.bench.kernels"} <= modules
    for module in modules:
        assert (ROOT / Path(*module.split("."))).with_suffix(".py").exists(), module
    makefile = (ROOT / "Makefile").read_text()
    targets = {
        first or second
        for first, second in re.findall(r"^make (\w+)|`make (\w+)`", README, re.MULTILINE)
    }
    assert {"train", "test"} <= targets
    for target in targets:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def test_methods_and_models_are_those_of_the_registries():
    listed = re.search(r"`--method` ([^;]+);", README)[1]
    assert set(re.split(r",\s*", listed.replace("\n", " "))) == set(METHODS)
    for name in names():
        assert name.removesuffix("_v1_5").rstrip("0123456789") in README
    for name in re.findall(r"bsj\.(\w+)", README):
        assert hasattr(bsj, name), name


def test_tables_are_generated():
    tables.main(tables.TablesConfig(check=True))


def test_a_table_without_its_file_says_what_there_is(tmp_path):
    with pytest.raises(ValueError, match="expected the name of a file"):
        tables.table("nothing", tmp_path)


def test_extras_and_name():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["name"] == "blocksparse-jax"
    assert {"experiments", "test", "gpu", "notebooks"} <= set(project["optional-dependencies"])
    assert bsj.__version__ in (ROOT / "blocksparse_jax" / "__init__.py").read_text()
