"""Docstrings: every public name is documented, and every example uses its name and runs."""

import ast
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
import experiments
import pallas_kernels

ROOT = Path(__file__).resolve().parents[2]
PUBLIC = {
    name: value
    for name in blocksparse_jax.__all__
    if not inspect.ismodule(value := getattr(blocksparse_jax, name))
}


def module_names():
    """All modules with Python sources, but those that run in a Python that has PyTorch; compiled
    libraries are left out.
    """
    for package in (blocksparse_jax, pallas_kernels, experiments):
        yield package.__name__
        for info in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
            source = ROOT / Path(*info.name.split(".")).with_suffix(".py")
            if (info.ispkg or source.exists()) and "torch_baseline" not in info.name:
                yield info.name


@pytest.mark.parametrize("name", list(module_names()))
def test_doctests(name):
    module = importlib.import_module(name)
    assert module.__doc__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = doctest.testmod(module)
    assert result.failed == 0


@pytest.mark.parametrize("name", list(PUBLIC))
def test_public_names_are_documented(name):
    doc = inspect.getdoc(PUBLIC[name]) or ""
    first = doc.split("\n")[0]
    assert first.endswith((".", ":")) or "." in doc.split("\n\n")[0], f"first line: {first!r}"
    if inspect.isfunction(PUBLIC[name]):
        for argument in inspect.signature(PUBLIC[name]).parameters:
            assert f"{argument}:" in doc, f"argument {argument} is not documented"
        assert "Returns:" in doc, "no section Returns"


def names_in(code):
    """Names and attributes that the code uses, and those of them that it calls, in statements that
    run: the bodies of functions do not count.
    """
    used, called = set(), set()
    nodes = list(ast.parse(code).body)
    while nodes:
        node = nodes.pop()
        if isinstance(node, ast.FunctionDef | ast.Lambda):
            continue
        for place in [node, node.func] if isinstance(node, ast.Call) else [node]:
            name = getattr(place, "id", getattr(place, "attr", None))
            (called if place is not node else used).add(name)
        nodes += ast.iter_child_nodes(node)
    return used, called


@pytest.mark.parametrize("name", list(PUBLIC))
def test_the_example_of_a_public_name_runs_it(name):
    """The example calls the function, or uses the class; `test_doctests` runs it."""
    source = doctest.script_from_examples(inspect.getdoc(PUBLIC[name]))
    used, called = names_in(source)
    assert name in (called if inspect.isfunction(PUBLIC[name]) else used)


def test_a_name_in_a_function_that_nobody_calls_is_not_run():
    used, called = names_in("def unused():\n    bsj.conv(x)\nbsj.pack(w, layout)")
    assert "pack" in used & called
    assert "conv" not in used | called


def test_a_reference_names_a_source():
    """`Reference:` stands only where a paper or a code base defines something."""
    for package in ("blocksparse_jax", "pallas_kernels", "experiments"):
        for path in (ROOT / package).rglob("*.py"):
            assert "Reference: ours" not in path.read_text(), path.relative_to(ROOT)


def test_the_notebooks_extra_brings_the_program_that_the_notebook_names():
    cells = json.loads((ROOT / "notebooks" / "01_quickstart.ipynb").read_text())["cells"]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extra = project["optional-dependencies"]["notebooks"]
    assert 'pip install -e ".[notebooks]"\n    jupyter lab ' in "".join(cells[0]["source"])
    assert any(requirement.startswith("jupyterlab") for requirement in extra)
