"""The README is true: its example runs, its commands exist, its tables are those of the committed results."""

import re
import tomllib
from pathlib import Path

import pytest

import blocksparse_jax as bsj
from experiments import tables
from experiments.methods import METHODS
from experiments.models import names

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()


def test_the_example_runs(capsys):
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    exec(compile(code, "README.md", "exec"), {})
    assert "hrbp: sparse layers keep" in capsys.readouterr().out


def test_every_command_names_a_module_and_a_target_that_exist():
    modules = set(re.findall(r"python -m ([\w.]+)", README))
    assert {"experiments.train", "experiments.prepare_data", "experiments.bench_kernels"} <= modules
    for module in modules:
        assert (ROOT / Path(*module.split("."))).with_suffix(".py").exists(), module
    makefile = (ROOT / "Makefile").read_text()
    targets = {first or second for first, second in re.findall(r"^make (\w+)|`make (\w+)`", README, re.MULTILINE)}
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
