"""The rooms of experiments/ import one way: a file imports from rooms on its left alone."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2] / "experiments"
COMMANDS = "commands"  # the files at the top, which no room imports
# Left to right; rooms on one line do not import each other.
ORDER = [
    ("measuring", "data", "models"),
    ("training",),
    ("reporting",),
    ("sweeps",),
    ("bench",),
    (COMMANDS,),
]
RANK = {room: rank for rank, rooms in enumerate(ORDER) for room in rooms}


def room_of(module):
    """The room of a dotted name such as experiments.data.load; None outside of experiments/."""
    package, _, rest = module.partition(".")
    first = rest.partition(".")[0]
    if package != "experiments" or not first:
        return None
    return first if (ROOT / first).is_dir() else COMMANDS


def imported_rooms(code):
    """The rooms that a file imports, inside of functions too."""
    names = set()
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "a relative import: write the full name"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {room_of(name) for name in names} - {None}


@pytest.mark.parametrize("room", RANK)
def test_a_room_imports_from_its_left(room):
    files = ROOT.glob("*.py") if room == COMMANDS else (ROOT / room).rglob("*.py")
    for path in files:
        for other in imported_rooms(path.read_text()) - {room}:
            assert RANK[other] < RANK[room], f"{path.relative_to(ROOT)} imports {other}"


def test_every_room_has_its_place():
    folders = {path.parent for path in ROOT.rglob("*.py")} - {ROOT}
    assert {folder.relative_to(ROOT).parts[0] for folder in folders} == RANK.keys() - {COMMANDS}


def test_imports_are_seen_wherever_they_stand():
    code = (
        "import jax\nimport experiments.bench.shapes\nfrom experiments.data import load\n"
        "def late():\n    from experiments import models\n    from experiments import train"
    )
    assert imported_rooms(code) == {"bench", "data", "models", COMMANDS}
