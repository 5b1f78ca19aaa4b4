"""The form in which every converter returns a data set."""

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from experiments.data.tfds_layout import Example

Examples = Iterator[tuple[str, Example]]


class Source(NamedTuple):
    """The contents of a data set's original files.

    Attributes:
      examples: pairs `(split, example)`, read one by one.
      class_names: label feature -> names of its classes, where the files give them.
      total: number of examples.
    """

    examples: Examples
    class_names: Mapping[str, Sequence[str]]
    total: int
