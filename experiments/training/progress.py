"""What a run says while it trains: a progress bar on a terminal, lines elsewhere."""

import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

_QUIET = 10.0  # seconds after which a run without a terminal says how far it is


class Progress:
    """Says how far a run is; use it as a context.

    Args:
      name: of the method.
      total: steps of the run.
      done: steps done before.
    """

    def __init__(self, name: str, total: int, done: int):
        self._name, self._total = name, total
        self._console = Console()
        self._bar = Bar(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[info]}"),
            console=self._console,
            transient=True,
            disable=not self._console.is_terminal,
        )
        self._task = self._bar.add_task(name, total=total, completed=done, info="")
        self._last = time.perf_counter()

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

    def step(self, step: int, loss: float) -> None:
        """A window of steps is over: moves the bar, or prints a line after a while of silence."""
        self._bar.update(self._task, completed=step)
        if time.perf_counter() - self._last > _QUIET:
            self._print(f"{self._name} step {step}/{self._total}: loss {loss:.3f}")

    def epoch(self, step: int, line: str) -> None:
        """An epoch is over."""
        self._bar.update(self._task, completed=step, info=line)
        self._print(f"{self._name} {line}")

    def stopping(self) -> None:
        """Ctrl-C was pressed: says on a terminal that the run saves a checkpoint first."""
        self._bar.update(self._task, info="stops after this step; again to stop at once")

    def _print(self, line: str) -> None:
        if not self._console.is_terminal:
            self._console.print(line, markup=False)
            self._last = time.perf_counter()
