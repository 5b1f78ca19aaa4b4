"""Batches of another size than the run's, or with equally many examples of every class."""

from collections.abc import Iterable
from typing import Any

import numpy as np


def first_examples(batches: Iterable[tuple[Any, Any]], count: int) -> tuple[np.ndarray, np.ndarray]:
    """The first examples as one batch.

    Args:
      batches: (images, labels), read until there are enough.
      count: examples; all there are where these are fewer.

    Returns:
      Images and labels.

    Example:
      >>> images, labels = first_examples([(np.arange(3), np.arange(3))] * 2, 4)
      >>> labels.tolist()
      [0, 1, 2, 0]
    """
    found: list[tuple[Any, Any]] = []
    for batch in batches:
        found.append(batch)
        if sum(len(labels) for _, labels in found) >= count:
            break
    images, labels = (np.concatenate([np.asarray(part) for part in parts]) for parts in zip(*found))
    return images[:count], labels[:count]


def balanced(
    batches: Iterable[tuple[Any, Any]], classes: int, per_class: int, count: int
) -> tuple[np.ndarray, np.ndarray]:
    """The first examples of every class, in batches that are each ordered by class.

    Args:
      batches: (images, labels), read until there are enough.
      classes: labels are 0 to classes - 1.
      per_class: examples of each class in a batch.
      count: batches.

    Returns:
      Images and labels of the batches, one behind the other.

    Raises:
      ValueError: a class has too few examples.

    Example:
      >>> images, labels = balanced([(np.arange(5), np.array([1, 0, 1, 0, 1]))], 2, 1, 2)
      >>> images.tolist(), labels.tolist()
      ([1, 0, 3, 2], [0, 1, 0, 1])
    """
    found: list[list[Any]] = [[] for _ in range(classes)]
    needed = per_class * count
    for images, labels in batches:
        for image, label in zip(np.asarray(images), np.asarray(labels), strict=True):
            if len(found[label]) < needed:
                found[label].append(image)
        if all(len(examples) == needed for examples in found):
            break
    short = [label for label, examples in enumerate(found) if len(examples) < needed]
    if short:
        raise ValueError(
            f"examples_per_class: expected {needed} examples of every class, and class {short[0]} "
            f"has {len(found[short[0]])} in an epoch; ask for fewer"
        )
    order = [
        (found[label][batch * per_class + i], label)
        for batch in range(count)
        for label in range(classes)
        for i in range(per_class)
    ]
    images, labels = zip(*order, strict=True)
    return np.stack(images), np.array(labels, np.int32)
