"""Every public name is documented, every example runs, and no file grows past what can be read."""

import doctest
import importlib
import inspect
import json
import pkgutil
import tomllib
import warnings
from pathlib import Path

import pytest

import blocksparse_jax
import pallas_kernels

ROOT = Path(__file__).resolve().parents[2]
PUBLIC = {
    name: value
    for name in blocksparse_jax.__all__
    if not inspect.ismodule(value := getattr(blocksparse_jax, name))
}


def _modules():
    for package in (blocksparse_jax, pallas_kernels):
        yield package.__name__
        for info in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
            if (
                ROOT / Path(*info.name.split(".")).with_suffix(".py")
            ).exists() or info.ispkg:  # no compiled libraries
                yield info.name


@pytest.mark.parametrize("name", list(_modules()))
def test_doctests(name):
    module = importlib.import_module(name)
    assert module.__doc__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = doctest.testmod(module)
    assert result.failed == 0


@pytest.mark.parametrize("name", list(PUBLIC))
def test_public_names_say_what_where_from_and_how(name):
    value, doc = PUBLIC[name], inspect.getdoc(PUBLIC[name]) or ""
    first = doc.split("\n")[0]
    assert first.endswith((".", ":")) or "." in doc.split("\n\n")[0], (
        f"{name}: the first line is no sentence"
    )
    assert "Example:" in doc or ">>>" in doc, f"{name}: no example"
    if inspect.isfunction(value):
        for argument in inspect.signature(value).parameters:
            assert f"{argument}:" in doc, f"{name}: argument {argument} is not documented"
        assert "Returns:" in doc, f"{name}: says not what it returns"


def test_a_reference_names_a_source():
    """`Reference:` stands only where there is one."""
    for package in ("blocksparse_jax", "pallas_kernels", "experiments"):
        for path in (ROOT / package).rglob("*.py"):
            assert "Reference: ours" not in path.read_text(), path.relative_to(ROOT)


def test_every_public_name_is_exercised_by_a_test():
    text = "\n".join(path.read_text() for path in (ROOT / "tests").rglob("*.py"))
    missing = [name for name in PUBLIC if name not in text]
    assert not missing


def test_the_notebooks_extra_brings_the_program_that_the_notebook_names():
    cells = json.loads((ROOT / "notebooks" / "01_quickstart.ipynb").read_text())["cells"]
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"][
        "optional-dependencies"
    ]
    assert 'pip install -e ".[notebooks]"\n    jupyter lab ' in "".join(cells[0]["source"])
    assert any(requirement.startswith("jupyterlab") for requirement in extras["notebooks"])
