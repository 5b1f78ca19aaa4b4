"""ImageNet streamed from disk.

Grain decodes, crops and batches on the host; the device normalises.
"""

import dataclasses
import functools
import math
from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

import cv2
import grain
import jax
import numpy as np
from absl import flags
from jaxtyping import Array, Float, UInt8

from experiments.data.augment import normalize
from experiments.data.batches import TestBatch, TrainBatch, count_steps, local_size, step_range
from experiments.data.integrity import decode_example
from experiments.data.specs import SPECS
from experiments.data.tfds_layout import Example

cv2.setNumThreads(0)  # Grain's threads and processes already use all cores

Batch = TypeVar("Batch")
Pixels = UInt8[np.ndarray, "h w c"]

_LONGEST = 8
"""Sides of an image in the ratio up to which the whole image is resized for its central square."""


def random_resized_crop(
    rng: np.random.Generator,
    image: Pixels,
    size: int,
    *,
    area: tuple[float, float] = (0.08, 1.0),
    aspect: float = 4 / 3,
) -> Pixels:
    """Cuts a random rectangle out of the image and resizes it to a square, mirrored half the time.

    The rectangle's fraction of the area is uniform over `area`, the logarithm of its width/height
    uniform over ±log(aspect). If none of ten draws fits into the image, it is the largest centred
    square.

    Args:
      rng: source of the draws.
      image: pixels `[h, w, c]`.
      size: height and width of the result, in pixels.
      area: smallest and largest fraction of the image's area.
      aspect: largest ratio of width to height, or of height to width.

    Returns:
      Pixels `[size, size, c]`.

    Example:
      >>> random_resized_crop(np.random.default_rng(0), np.zeros((30, 40, 3), np.uint8), 8).shape
      (8, 8, 3)

    Reference: Szegedy et al., Going Deeper with Convolutions, CVPR 2015, section 6.
    """
    h, w, _ = image.shape
    for _ in range(10):
        ratio = math.exp(rng.uniform(-math.log(aspect), math.log(aspect)))
        pixels = h * w * rng.uniform(*area)
        height = max(1, round(math.sqrt(pixels / ratio)))
        width = max(1, round(math.sqrt(pixels * ratio)))
        if height <= h and width <= w:
            top = rng.integers(h - height + 1)
            left = rng.integers(w - width + 1)
            break
    else:
        height = width = min(h, w)
        top = (h - height) // 2
        left = (w - width) // 2
    crop = resize(image[top : top + height, left : left + width], size, size)
    return crop[:, ::-1] if rng.random() < 0.5 else crop


def center_crop(image: Pixels, size: int, *, shorter: int) -> Pixels:
    """Resizes the image so that its shorter side has `shorter` pixels; returns the central square.

    The square has `size` x `size` pixels. Only the centre of a long strip is resized: whole, an
    image of 1 x 20,000 pixels would become gigabytes.

    Example:
      >>> center_crop(np.zeros((30, 40, 3), np.uint8), 8, shorter=10).shape
      (8, 8, 3)

    Reference: He et al., Deep Residual Learning for Image Recognition, CVPR 2016, section 3.4 (256,
    224).
    """
    h, w, _ = image.shape
    longest = _LONGEST * min(h, w)
    if max(h, w) > longest:
        top = max(0, h - longest) // 2
        left = max(0, w - longest) // 2
        image = image[top : h - top, left : w - left]
        h, w, _ = image.shape
    scale = shorter / min(h, w)
    image = resize(image, max(shorter, round(h * scale)), max(shorter, round(w * scale)))
    top = (image.shape[0] - size) // 2
    left = (image.shape[1] - size) // 2
    return image[top : top + size, left : left + size]


def resize(image: Pixels, height: int, width: int) -> Pixels:
    """Resizes an image: averages over areas where it shrinks, interpolates where it grows."""
    shrinks = height * width < image.shape[0] * image.shape[1]
    return cv2.resize(
        image, (width, height), interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR
    )


@dataclasses.dataclass(frozen=True, eq=False)
class ImageNet:
    """ImageNet 2012 as a stream of batches.

    A batch depends only on (seed, epoch, step), so that an epoch can resume without reading the
    batches before.

    Attributes:
      train: the training examples as `tfds_layout.open_split` gives them: random access to dicts
        with "image" (bytes) and "label".
      test: the test examples in the same form.
      process: `(index, count)` of the processes that share each batch; see `batches.Data`.
      threads: number of threads that read and decode, in each worker. Each works on one batch, so
        as many batches are in memory.
      workers: number of additional processes that read and decode; 0 for none.
    """

    train: Sequence[Example]
    test: Sequence[Example]
    process: tuple[int, int] = (0, 1)
    threads: int = 16
    workers: int = 0

    name = "imagenet2012"
    image_shape = SPECS["imagenet2012"].image_shape
    num_classes = SPECS["imagenet2012"].num_classes

    def steps_per_epoch(self, batch_size: int) -> int:
        """Number of full training batches in an epoch; ValueError if not even one is full."""
        return count_steps(len(self.train), batch_size, self.process[1])

    def train_batches(
        self, epoch: int, batch_size: int, seed: int, start_step: int = 0
    ) -> Iterator[TrainBatch]:
        """Gives the shuffled training batches of one epoch, as `resident.Dataset` does.

        Every image goes through `random_resized_crop`.
        """
        steps = step_range(start_step, self.steps_per_epoch(batch_size))
        index, count = self.process
        grain_seed = int(np.random.SeedSequence([seed, epoch]).generate_state(1)[0])
        examples = grain.MapDataset.source(self.train).seed(grain_seed).shuffle()
        examples = examples.random_map(train_example)
        rows = examples[index : steps.stop * batch_size : count]
        batches = rows.batch(local_size(batch_size, count))[start_step:]
        return _ahead(map(_to_device, self._read(batches)))

    def test_batches(self, batch_size: int) -> Iterator[TestBatch]:
        """Gives the central square of every test example once, as `resident.Dataset` does."""
        index, count = self.process
        local = local_size(batch_size, count)
        padded = math.ceil(len(self.test) / batch_size) * batch_size
        rows = grain.MapDataset.range(padded)[index::count]
        batches = rows.map(functools.partial(_test_example, self.test)).batch(local)
        return _ahead(map(_to_device, self._read(batches)))

    def _read(self, batches: grain.MapDataset) -> Iterator[tuple[np.ndarray, ...]]:
        """Reads the batches in order, in threads and, with workers, in other processes."""
        stream = batches.to_iter_dataset(
            grain.ReadOptions(num_threads=self.threads, prefetch_buffer_size=self.threads)
        )
        if self.workers:
            if not flags.FLAGS.is_parsed():
                flags.FLAGS.mark_as_parsed()  # else Grain's worker processes refuse to start
            stream = stream.mp_prefetch(grain.MultiprocessingOptions(num_workers=self.workers))
        return iter(stream)


def train_example(example: Example, rng: np.random.Generator) -> tuple[Pixels, np.int32]:
    """The cropped image and the label of a training example.

    Args:
      example: with "image" (bytes), "label" and "file_name".
      rng: source of the crop.

    Returns:
      Pixels of the network's size, and the class.
    """
    image, label = decoded(example)
    return random_resized_crop(rng, image, ImageNet.image_shape[0]), label


def _test_example(source: Sequence[Example], row: int) -> tuple[Any, ...]:
    """The image, the label and the weight of a test example; rows past the end are padding."""
    if row >= len(source):
        return np.zeros(ImageNet.image_shape, np.uint8), np.int32(0), np.float32(0)
    image, label = decoded(source[row])
    return center_crop(image, ImageNet.image_shape[0], shorter=256), label, np.float32(1)


def decoded(example: Example) -> tuple[Pixels, np.int32]:
    """The pixels and the label of an example, as `train_example` takes it."""
    return decode_example(ImageNet.name, example, example["file_name"].decode(errors="replace"))


def _ahead(batches: Iterator[Batch]) -> Iterator[Batch]:
    """The same batches, each one's copy to the device begun before the one before it is used."""
    waiting: list[Batch] = []
    for batch in batches:
        waiting.append(batch)
        if len(waiting) > 1:
            yield waiting.pop(0)
    yield from waiting


def _to_device(batch: tuple[np.ndarray, ...]) -> tuple[Any, ...]:
    """Copies a batch to the device and normalises its images there."""
    images, *rest = jax.device_put(batch)
    return _normalize(images), *rest


@jax.jit
def _normalize(images: UInt8[Array, "n h w c"]) -> Float[Array, "n h w c"]:
    spec = SPECS["imagenet2012"]
    return normalize(images, spec.mean, spec.std)
