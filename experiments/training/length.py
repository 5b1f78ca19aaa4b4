"""How long a run is, and how often it starts over."""

from typing import NamedTuple


class Length(NamedTuple):
    """How long a run is, in training steps."""

    steps_per_epoch: int
    total: int


class Passes(NamedTuple):
    """A run that goes back to an early step several times: lottery tickets.

    Every pass ends with the same step, and the passes but the first begin with the early one. The
    schedule of the learning rate is that of one pass.

    Attributes:
      early: the step that the run goes back to.
      end: the steps of the first pass, from 0; the length of the learning rate's schedule.
      count: passes.

    Example:
      >>> passes = Passes(early=2, end=6, count=3)
      >>> passes.ends, [passes.position(step) for step in (0, 5, 6, 9, 10, 13)]
      ([6, 10], [0, 5, 2, 5, 2, 5])
    """

    early: int
    end: int
    count: int

    @property
    def ends(self) -> list[int]:
        """The steps of the run at which a pass ends and another begins."""
        return [self.end + i * (self.end - self.early) for i in range(self.count - 1)]

    def position(self, step: int) -> int:
        """The step of its pass that a step of the run is; the last pass goes on to the end."""
        start = max((end for end in self.ends if end <= step), default=None)
        return step if start is None else self.early + step - start
