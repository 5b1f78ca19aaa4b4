"""What a terminal shows of a run: loss, accuracies, density, images a second and the time left."""

import io
import itertools
import re
from types import SimpleNamespace

import pytest
from rich.console import Console

from experiments.training import progress


@pytest.fixture(name="terminal")
def _terminal(monkeypatch):
    """What is written to a terminal of 80 columns; a call of the clock takes half a second."""
    written = io.StringIO()
    console = Console(file=written, force_terminal=True, width=80, color_system=None)
    clock = SimpleNamespace(perf_counter=itertools.count(step=0.5).__next__)
    monkeypatch.setattr(progress, "Console", lambda: console)
    monkeypatch.setattr(progress, "time", clock)
    return written


def lines(terminal):
    """The lines that the last drawing left on the terminal."""
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", terminal.getvalue())
    return [line.rstrip() for line in re.split(r"[\r\n]+", text) if line.strip()][-2:]


def test_a_terminal_shows_the_numbers_below_the_bar(terminal):
    with progress.Progress("hrbp", total=40, done=0, batch_size=128) as bar:
        bar.step(10, 1.25, 0.5, lambda: 0.1)
        bar.epoch(20, "epoch 1/2", 0.8125)
        bar.step(30, 0.75, 0.625, lambda: 0.0996)
        bar._bar.refresh()
        first, second = lines(terminal)
    assert re.fullmatch(r"hrbp ━.* 30/40 .*:.* left", first)
    speed = 10 * 128 / 0.5
    assert second == (
        f"loss 0.750, train 62.5%, test 81.25%, density 0.0996, {speed:,.0f} images/s"
    )


def test_a_terminal_says_that_the_run_stops(terminal):
    with progress.Progress("hrbp", total=40, done=0, batch_size=128) as bar:
        bar.step(10, 1.25, 0.5, lambda: 0.1)
        bar.stopping()
        bar._bar.refresh()
        assert lines(terminal)[-1] == "stops after this step; again to stop at once"
