"""Data sets that fit into memory as arrays: an `.npz`, or what another converter has read."""

from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Int, UInt8

from experiments.data.images import png
from experiments.data.sources.source import Examples, Source
from experiments.data.specs import NPZ, SPECS
from experiments.data.tfds_layout import Example

COARSE_CLASSES = 20
"""Number of CIFAR-100's coarse classes."""


def from_arrays(
    name: str,
    arrays: Mapping[str, np.ndarray],
    class_names: Mapping[str, Sequence[str]] | None = None,
) -> Source:
    """Checks the arrays of a data set and turns their rows into examples.

    Args:
      name: a name in `SPECS`.
      arrays: `x_train`, `x_test` uint8 `[n, h, w, c]` and `y_train`, `y_test` int `[n]`; for
        cifar100 optionally `coarse_train`, `coarse_test` int `[n]`, the coarse labels.
      class_names: label feature -> names of its classes, where they are known.

    Returns:
      The examples, images as PNG.

    Raises:
      ValueError: an array is missing, or its shape, dtype or values are not those of the data set.
    """
    spec = SPECS[name]
    if missing := [key for key in ("x_train", "y_train", "x_test", "y_test") if key not in arrays]:
        raise ValueError(
            f"source: expected {NPZ}, got the keys {sorted(arrays)}; missing: {', '.join(missing)}"
        )
    splits = {}
    for key, split in (("train", "train"), ("test", spec.test_split)):
        images = _checked_images(f"x_{key}", arrays[f"x_{key}"], spec.image_shape)
        n = len(images)
        labels = _checked_labels(f"y_{key}", arrays[f"y_{key}"], n, spec.num_classes)
        if f"coarse_{key}" in arrays:
            coarse = _checked_labels(f"coarse_{key}", arrays[f"coarse_{key}"], n, COARSE_CLASSES)
        else:
            coarse = np.full(n, -1)  # unknown
        splits[split] = (images, labels, coarse)

    def examples() -> Examples:
        for split, (images, labels, coarse) in splits.items():
            for i, image in enumerate(images):
                example: Example = {"image": png(image), "label": int(labels[i])}
                if name != "mnist":
                    example["id"] = f"{split}_{i:05d}"
                if name == "cifar100":
                    example["coarse_label"] = int(coarse[i])
                yield split, example

    total = sum(len(images) for images, _, _ in splits.values())
    return Source(examples(), class_names or {}, total)


def _checked_images(
    key: str, x: np.ndarray, shape: tuple[int, int, int]
) -> UInt8[np.ndarray, "n h w c"]:
    """The array with a channel axis; ValueError unless it holds uint8 images of the shape."""
    if x.shape[1:] == shape[:2] and shape[2] == 1:
        x = x[..., None]
    if x.dtype != np.uint8 or x.shape[1:] != shape or not len(x):
        expected = f"uint8 [n, {', '.join(map(str, shape))}], 0..255"
        raise ValueError(
            f"source: {key}: expected {expected}, got {x.dtype} {list(x.shape)}; convert it"
        )
    return x


def _checked_labels(
    key: str, y: np.ndarray, examples: int, classes: int
) -> Int[np.ndarray, " examples"]:
    """The labels with one axis; ValueError unless they are integers in 0 .. classes - 1."""
    if y.shape == (examples, 1):
        y = y[:, 0]
    if not np.issubdtype(y.dtype, np.integer) or y.shape != (examples,):
        raise ValueError(
            f"source: {key}: expected {examples} integers, one for each image, got {y.dtype} "
            f"{list(y.shape)}; convert it"
        )
    if y.min() < 0 or y.max() >= classes:
        raise ValueError(
            f"source: {key}: expected labels 0 to {classes - 1}, got {y.min()} to {y.max()}; is it "
            f"another data set?"
        )
    return y
