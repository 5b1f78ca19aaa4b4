"""ImageNet streamed from disk: decoded, cropped and batched on the host by Grain, normalised on the
device.
"""

import dataclasses
import functools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import cv2
import grain
import jax
import numpy as np
from absl import flags
from jaxtyping import Array, Float, UInt8

from experiments.data.augment import normalize
from experiments.data.specs import SPECS, TestBatch, TrainBatch, count_steps, local_size, step_range
from experiments.data.tfds_layout import Example, decode

cv2.setNumThreads(0)  # the threads and processes of Grain are the parallelism

Pixels = UInt8[np.ndarray, "h w c"]


def random_resized_crop(
    rng: np.random.Generator,
    image: Pixels,
    size: int,
    *,
    area: tuple[float, float] = (0.08, 1.0),
    aspect: float = 4 / 3,
) -> Pixels:
    """A random part of the image, resized to a square; half of the time mirrored.

    The part's share of the area is uniform over `area`, the logarithm of its width/height uniform
    over ±log(aspect). If none of ten draws fits into the image, the largest centred square.

    Args:
        rng: source of the draws.
        image: pixels [h, w, c].
        size: height and width of the result, in pixels.
        area: smallest and largest share of the image's area.
        aspect: largest ratio of width to height, or of height to width.

    Returns:
        Pixels [size, size, c].

    Example:
        >>> random_resized_crop(np.random.default_rng(0), np.zeros((30, 40, 3), np.uint8), 8).shape
        (8, 8, 3)

    Reference: Szegedy et al., Going Deeper with Convolutions, CVPR 2015, section 6.
    """
    h, w, _ = image.shape
    for _ in range(10):
        ratio = math.exp(rng.uniform(-math.log(aspect), math.log(aspect)))
        pixels = h * w * rng.uniform(*area)
        ch, cw = max(1, round(math.sqrt(pixels / ratio))), max(1, round(math.sqrt(pixels * ratio)))
        if ch <= h and cw <= w:
            top, left = rng.integers(h - ch + 1), rng.integers(w - cw + 1)
            break
    else:
        ch = cw = min(h, w)
        top, left = (h - ch) // 2, (w - cw) // 2
    part = resize(image[top : top + ch, left : left + cw], size, size)
    return part[:, ::-1] if rng.random() < 0.5 else part


def center_crop(image: Pixels, size: int, *, shorter: int) -> Pixels:
    """The image with its shorter side resized to `shorter` pixels, of that the central square of
    `size` pixels.

    Example:
        >>> center_crop(np.zeros((30, 40, 3), np.uint8), 8, shorter=10).shape
        (8, 8, 3)

    Reference: He et al., Deep Residual Learning for Image Recognition, CVPR 2016, section 3.4 (256,
    224).
    """
    h, w, _ = image.shape
    scale = shorter / min(h, w)
    image = resize(image, max(shorter, round(h * scale)), max(shorter, round(w * scale)))
    top, left = (image.shape[0] - size) // 2, (image.shape[1] - size) // 2
    return image[top : top + size, left : left + size]


def resize(image: Pixels, height: int, width: int) -> Pixels:
    """The image in another size, in pixels: the mean over areas where it shrinks, bilinear where it
    grows.
    """
    shrinks = height * width < image.shape[0] * image.shape[1]
    return cv2.resize(
        image, (width, height), interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR
    )


@dataclasses.dataclass(frozen=True, eq=False)
class ImageNet:
    """ImageNet 2012 as a stream of batches, each a function of (seed, epoch, step): an epoch
    resumes without reading what came before.

    Args:
        train: random access to the training examples, as `tfds_layout.open_split` gives it: dicts
          with "image" (bytes) and "label".
        test: the same of the test examples.
        process: (index, count) of the processes that share each batch; see `Data`.
        threads: threads that read and decode, in each worker; each works on one batch, so as many
          batches are held in memory.
        workers: processes beside this one that read and decode; 0 for none.
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
        """Number of full training batches in an epoch; ValueError if the batch is larger than the
        training set.
        """
        return count_steps(len(self.train), batch_size, self.process[1])

    def train_batches(
        self, epoch: int, batch_size: int, seed: int, start_step: int = 0
    ) -> Iterator[TrainBatch]:
        """Shuffled training batches of one epoch, each image through `random_resized_crop`;
        arguments as in `data.Dataset`.
        """
        steps = step_range(start_step, self.steps_per_epoch(batch_size))
        index, count = self.process
        stream = grain.MapDataset.source(self.train).seed(
            int(np.random.SeedSequence([seed, epoch]).generate_state(1)[0])
        )
        stream = stream.shuffle().random_map(_train_example)[
            index : steps.stop * batch_size : count
        ]
        return map(_to_device, self._read(stream.batch(local_size(batch_size, count))[start_step:]))

    def test_batches(self, batch_size: int) -> Iterator[TestBatch]:
        """Every test example once, its central part, the last batch padded; arguments as in
        `data.Dataset`.
        """
        index, count = self.process
        local = local_size(batch_size, count)
        padded = -(-len(self.test) // batch_size) * batch_size
        rows = grain.MapDataset.range(padded)[index::count]
        return map(
            _to_device,
            self._read(rows.map(functools.partial(_test_example, self.test)).batch(local)),
        )

    def _read(self, batches: grain.MapDataset) -> Iterator[tuple[np.ndarray, ...]]:
        stream = batches.to_iter_dataset(
            grain.ReadOptions(num_threads=self.threads, prefetch_buffer_size=self.threads)
        )
        if self.workers:
            if not flags.FLAGS.is_parsed():
                flags.FLAGS.mark_as_parsed()  # Grain's worker processes read absl flags
            stream = stream.mp_prefetch(grain.MultiprocessingOptions(num_workers=self.workers))
        return iter(stream)


def _train_example(example: Example, rng: np.random.Generator) -> tuple[Any, ...]:
    h, _, channels = ImageNet.image_shape
    return random_resized_crop(rng, decode(example["image"], channels), h), np.int32(
        example["label"]
    )


def _test_example(source: Sequence[Example], row: int) -> tuple[Any, ...]:
    h, _, channels = ImageNet.image_shape
    if row >= len(source):
        return np.zeros(ImageNet.image_shape, np.uint8), np.int32(0), np.float32(0)
    example = source[row]
    return (
        center_crop(decode(example["image"], channels), h, shorter=256),
        np.int32(example["label"]),
        np.float32(1),
    )


def _to_device(batch: tuple[np.ndarray, ...]) -> tuple[Any, ...]:
    images, *rest = jax.device_put(batch)
    return _normalize(images), *rest


@jax.jit
def _normalize(images: UInt8[Array, "n h w c"]) -> Float[Array, "n h w c"]:
    spec = SPECS["imagenet2012"]
    return normalize(images, spec.mean, spec.std)
