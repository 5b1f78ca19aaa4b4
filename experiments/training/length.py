"""How long a run is."""

from typing import NamedTuple


class Length(NamedTuple):
    """How long a run is, in training steps."""

    steps_per_epoch: int
    total: int
