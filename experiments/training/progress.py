"""What a run says while it trains: a progress bar on a terminal, lines elsewhere."""

import time
from collections.abc import Callable, Iterable
from types import TracebackType

from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar
from rich.text import Text

_QUIET = 10.0  # seconds after which a run without a terminal says how far it is


class _Bar(Bar):
    """A bar with a line of numbers below it."""

    numbers = ""

    def get_renderables(self) -> Iterable[RenderableType]:
        """The bar and the line, as rich draws them."""
        yield from super().get_renderables()
        yield Text(self.numbers, overflow="ellipsis", no_wrap=True)


class Progress:
    """Says how far a run is; use it as a context.

    Args:
      name: of the method.
      total: steps of the run.
      done: steps done before.
      batch_size: images of a step.
    """

    def __init__(self, name: str, total: int, done: int, batch_size: int):
        self._name, self._total, self._batch_size = name, total, batch_size
        self._console = Console()
        self._bar = _Bar(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("left"),
            console=self._console,
            transient=True,
            disable=not self._console.is_terminal,
        )
        self._task = self._bar.add_task(name, total=total, completed=done)
        self._numbers: dict[str, str] = {}
        self._last = time.perf_counter()
        self._counted = done, time.perf_counter()  # from where the images are counted

    def __enter__(self) -> "Progress":
        self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._bar.stop()

    def step(self, step: int, loss: float, accuracy: float, density: Callable[[], float]) -> None:
        """A window of steps is over: moves the bar, or prints a line after a while of silence.

        Args:
          step: steps done.
          loss: the mean of the window.
          accuracy: on its training images.
          density: gives the kept fraction of the sparse layers' weights, for a terminal.
        """
        (before, since), now = self._counted, time.perf_counter()
        self._counted = step, now
        if self._console.is_terminal:
            speed = (step - before) * self._batch_size / (now - since)
            self._show(
                step,
                loss=f"loss {loss:.3f}",
                train=f"train {accuracy:.1%}",
                density=f"density {density():.4f}",
                speed=f"{speed:,.0f} images/s",
            )
        elif now - self._last > _QUIET:
            self._print(f"{self._name} step {step}/{self._total}: loss {loss:.3f}")

    def epoch(self, step: int, line: str, accuracy: float) -> None:
        """An epoch is over, and the network was tested.

        Args:
          step: steps done.
          line: what is said where there is no terminal.
          accuracy: on the test images.
        """
        self._show(step, test=f"test {accuracy:.2%}")
        self._print(f"{self._name} {line}")
        self._counted = step, time.perf_counter()  # the test was no training

    def stopping(self) -> None:
        """Ctrl-C was pressed: says on a terminal that the run saves a checkpoint first."""
        self._bar.numbers = "stops after this step; again to stop at once"

    def _show(self, step: int, **numbers: str) -> None:
        self._numbers |= numbers
        order = ("loss", "train", "test", "density", "speed")
        self._bar.numbers = ", ".join(self._numbers[n] for n in order if n in self._numbers)
        self._bar.update(self._task, completed=step)

    def _print(self, line: str) -> None:
        if not self._console.is_terminal:
            self._console.print(line, markup=False)
            self._last = time.perf_counter()
