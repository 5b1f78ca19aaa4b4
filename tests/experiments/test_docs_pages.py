"""The README and the pages of docs/ are true: their examples run, their commands, names and links
exist, and their tables and figures are those of the committed results.
"""

import re
import tomllib
from pathlib import Path

import pytest
from sparse_methods import slow_unless

import blocksparse_jax as bsj
from experiments.models import names
from experiments.reporting import block_figure, tables
from experiments.training.registry import METHODS

ROOT = Path(__file__).resolve().parents[2]
PAGES = {path.name: path.read_text() for path in sorted((ROOT / "docs").glob("*.md"))}
README = (ROOT / "README.md").read_text()
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text()
TEXTS = PAGES | {"README.md": README, "CONTRIBUTING.md": CONTRIBUTING}


def python_blocks(text):
    return re.findall(r"```python\n(.*?)```", text, re.DOTALL)


def run(blocks, page):
    """Runs blocks one after the other in one namespace, and returns the namespace."""
    namespace = {"__name__": page}
    for block in blocks:
        exec(compile(block, page, "exec"), namespace)
    return namespace


PRINTS = {  # page -> what its examples print
    "README.md": "hrbp: sparse layers keep 0.0990",
    "index.md": "(2, 19, 3, 32)",
    "choosing_a_method.md": "hrbp-dynamic: sparse layers keep",
    "how_sparsity_becomes_speed.md": "(1.0, 1.0)",
    "gpu.md": "(32, 8, 8, 4) (2, 32)",
    "layers_and_formats.md": "hrbp-dynamic: sparse layers keep",
    "experiments_and_data.md": "(64, 8, 8, 1) (64,)",
    "channel_orders.md": "",
    "write_your_own_method.md": "sensitivity: sparse layers keep",
}


def test_the_pages_with_examples_are_known():
    assert {page for page, text in TEXTS.items() if python_blocks(text)} == set(PRINTS)


@pytest.mark.parametrize("page", PRINTS)
def test_the_examples_of_a_page_run_from_top_to_bottom(page, capsys):
    run(python_blocks(TEXTS[page]), page)
    output = capsys.readouterr().out
    assert PRINTS[page] in output
    assert "could grow nothing" not in output


@pytest.mark.parametrize(
    ("page", "call"),
    [
        ("README.md", "step(params, state, x)"),
        ("choosing_a_method.md", "step(params, state, bsj.get_layouts(state), x, x)"),
    ],
)
def test_the_loops_may_donate_params_and_state(page, call, capsys):
    """With the same losses as without."""
    loop = python_blocks(TEXTS[page])[0]
    again = f"losses = []\nfor _ in range(3):\n    params, state, loss = {call}\n"
    again += "    losses.append(float(loss))\n"
    donating = loop.replace("@jax.jit", "@functools.partial(jax.jit, donate_argnums=(0, 1))")
    assert donating != loop
    expected, actual = (
        run(["import functools\n", text + again], page) for text in (loop, donating)
    )
    assert actual["losses"] == expected["losses"]
    assert bsj.nonzero_pruned(actual["params"], actual["state"]) == 0


@pytest.mark.parametrize(
    ("method", "density"),
    [
        ("bsj.hrbp_prune(0.9)", 0.1),
        ("bsj.subp(0.75, schedule=bsj.between(0, 3))", 0.25),
        ("bsj.sr_ste(2, 4)", 0.5),
        ("bsj.rigl(0.9, schedule=bsj.every(2, until=100))", 0.1),
        slow_unless(False, "bsj.set_(0.9, schedule=bsj.every(2))", 0.1),
        slow_unless(False, "bsj.snfs(0.9, schedule=bsj.every(2))", 0.1),
        ("bsj.gradual(0.9, schedule=bsj.between(0, 3))", 0.1),
        slow_unless(False, "bsj.magnitude(0.9)", 0.1),
    ],
)
def test_the_loop_serves_every_method(method, density, capsys):
    """The loop of choosing_a_method.md, with another method in the place of dynamic HRBP."""
    blocks = python_blocks(PAGES["choosing_a_method.md"])
    loop, changed = re.subn(r"^method = .*$", f"method = {method}", blocks[0], flags=re.MULTILINE)
    assert changed == 1
    namespace = run([loop], "choosing_a_method.md")
    assert "could grow nothing" not in capsys.readouterr().out
    summary = bsj.summarize(namespace["params"], namespace["state"])
    assert summary.density == pytest.approx(density, abs=0.005)


def test_every_command_names_a_module_that_exists():
    modules = set(re.findall(r"python -m ([\w.]+)", "\n".join(TEXTS.values())))
    assert {"experiments.train", "experiments.prepare_data", "experiments.bench.kernels"} <= modules
    for module in modules:
        path = ROOT / Path(*module.split("."))
        assert path.with_suffix(".py").exists() or (path / "__main__.py").exists(), module


def test_every_make_target_exists():
    targets = set()
    for text in TEXTS.values():
        for commands in re.findall(r"(?:^|`)make ([a-z -]+)", text, re.MULTILINE):
            targets |= set(commands.split())
    assert {"train", "test", "docs", "gpu-compilers"} <= targets
    makefile = (ROOT / "Makefile").read_text()
    for target in targets:
        assert re.search(rf"^{target}( \w+)*:", makefile, re.MULTILINE), target


def test_named_files_and_linked_files_exist():
    """Paths in `code` and relative links, outside of code blocks."""
    for page, text in TEXTS.items():
        folder = ROOT / "docs" if page in PAGES else ROOT
        prose = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
        links = re.findall(r"\]\(([^)#:]+)\)", prose)
        assert all((folder / link).exists() for link in links), (page, links)
        top = "blocksparse_jax|pallas_kernels|cpu_kernels|experiments|tests|notebooks|docs"
        for path in re.findall(rf"`((?:{top})/[\w/.-]*)`", prose):
            assert path == "docs/_build/index.html" or (ROOT / path).exists(), (page, path)


def test_names_of_the_library_exist():
    for page, text in TEXTS.items():
        for name in re.findall(r"bsj\.(\w+)", text):
            assert hasattr(bsj, name), (page, name)


def test_methods_and_models_are_those_of_the_registries():
    page = PAGES["experiments_and_data.md"]

    def listed(option):
        items = re.search(rf"`--{option}`: ([^.;]+)[.;]", page)[1]
        return set(re.split(r",\s+", items))

    assert listed("method") == set(METHODS)
    assert listed("model") == set(names())
    for name in METHODS.keys() - {"dense"}:
        assert f"`{name}`" in PAGES["choosing_a_method.md"], name


def test_the_methods_with_a_pattern_are_named():
    listed = re.search(r"`--rigl.pattern\s+one_by_n:16`: ([^.]+)\.", PAGES["choosing_a_method.md"])[
        1
    ]
    chosen = {name for name, entry in METHODS.items() if hasattr(entry.options, "pattern")}
    assert set(re.findall(r"`([\w-]+)`", listed)) == chosen


def test_the_reference_lists_every_public_name_once():
    page = PAGES["api.md"]
    listed = re.findall(r"auto(?:function|class):: (\w+)(?:\(\))?$", page, re.MULTILINE)
    listed += re.findall(r"automodule:: blocksparse_jax\.(\w+)", page)
    assert sorted(listed) == sorted(bsj.__all__)


def test_tables_are_generated():
    tables.main(tables.TablesConfig(check=True))


def test_the_block_figure_shows_measured_fill():
    block_figure.main(block_figure.BlockFigureConfig(check=True))
    fills = [bsj.block_fill(pattern.blocks) for pattern in block_figure.patterns()]
    rounded = [(round(forward, 2), round(backward, 2)) for forward, backward in fills]
    assert rounded == [(1.0, 0.14), (1.0, 1.0), (1.0, 1.0)]
    assert "fill 0.14 of their rectangles" in PAGES["how_sparsity_becomes_speed.md"]


def test_a_stale_block_figure_is_found(tmp_path):
    path = tmp_path / "figures" / "block_fill.svg"
    block_figure.main(block_figure.BlockFigureConfig(path=path))
    assert path.read_text() == block_figure.FIGURE.read_text()
    path.write_text(path.read_text().replace("0.14", "1.00"))
    with pytest.raises(ValueError, match=r"block_fill.svg: stale"):
        block_figure.main(block_figure.BlockFigureConfig(check=True, path=path))


def test_the_readme_and_the_example_of_a_method_are_short():
    assert len(README.splitlines()) <= 150
    page = PAGES["write_your_own_method.md"]
    example = re.search(r"<!-- example:method -->\n```python\n(.*?)```", page, re.DOTALL)[1]
    assert len(example.splitlines()) <= 33, "30 lines of code and blank lines between"


def test_extras_and_name():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["name"] == "blocksparse-jax"
    listed = re.search(r"The extras are ([^.]+)\.", README.replace("\n", " "))[1]
    extras = set(project["optional-dependencies"])
    assert set(re.findall(r"`(\w+)`", listed)) == extras
    assert extras == {"experiments", "test", "docs", "gpu", "notebooks", "compression"}
    assert bsj.__version__ in (ROOT / "blocksparse_jax" / "__init__.py").read_text()
