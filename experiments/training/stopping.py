"""What Ctrl-C and SIGTERM do to a run: it saves a checkpoint and says how to go on."""

import os
import signal
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any

BEFORE_TRAINING = "stopped before training began"
# SIGHUP comes when the terminal of a run closes.
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Signalled(KeyboardInterrupt):
    """A signal came.

    Attributes:
      number: of the signal.
    """

    def __init__(self, message: str, number: int):
        super().__init__(message)
        self.number = number


class Stopped(Signalled):
    """A signal stopped a run; the message says how to go on."""


def number_of(interrupt: KeyboardInterrupt) -> int:
    """The number of the signal that raised an interrupt."""
    return interrupt.number if isinstance(interrupt, Signalled) else signal.SIGINT


class _Handler:
    """Handles the signals while it is used as a context, in the main thread only.

    A signal that the process ignores, as under nohup, stays ignored.
    """

    def __init__(self) -> None:
        self._before: dict[int, Any] = {}

    def handle(self, number: int, frame: FrameType | None) -> None:
        raise NotImplementedError

    def __enter__(self) -> "_Handler":
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                before = signal.getsignal(number)
                if before not in (signal.SIG_IGN, None):
                    self._before[number] = signal.signal(number, self.handle)
        return self

    def __exit__(self, *_: object) -> None:
        while self._before:
            signal.signal(*self._before.popitem())


class RaiseSignalled(_Handler):
    """A context in which each of the signals raises `Signalled`."""

    def handle(self, number: int, frame: FrameType | None) -> None:
        """Ends what runs now."""
        raise Signalled(signal.Signals(number).name, number)


def end_at_once(line: str = "stopped") -> None:
    """From now on each of the signals ends the process with one line and no traceback.

    Outside of the contexts of this module, that is, while a command imports what it needs.

    Args:
      line: what is printed.
    """

    def end(number: int, frame: FrameType | None) -> None:
        os.write(2, f"{line}\n".encode())
        os._exit(128 + number)

    for number in SIGNALS:
        if signal.getsignal(number) not in (signal.SIG_IGN, None):
            signal.signal(number, end)


class StopRequest(_Handler):
    """A context in which the first of the signals only asks to stop.

    So no step and no save is cut. The second signal acts as outside.

    Attributes:
      number: of the signal that came; None before.
    """

    def __init__(self, notify: Callable[[], None] = lambda: None) -> None:
        """Begins with no request.

        Args:
          notify: called when the signal comes.
        """
        super().__init__()
        self.number: int | None = None
        self._notify = notify

    def handle(self, number: int, frame: FrameType | None) -> None:
        """Notes the signal, and leaves the next one to the handlers outside."""
        self.number = number
        self.__exit__()
        self._notify()
