"""The facts of each data set, and the one interface through which the trainer sees all of them."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

from jaxtyping import Array, Float, Int

from blocksparse_jax._checks import positive_int


@dataclasses.dataclass(frozen=True)
class Spec:
    """What holds for every copy of a data set.

    Args:
        image_shape: (h, w, c) of the images handed to the model, in pixels.
        num_classes: number of classes; labels are 0 .. num_classes - 1.
        mean: mean of each channel over the training images, in units of the full range 0..1.
        std: standard deviation of each channel, same units.
        sizes: official numbers of training and test examples.
        pad: training images are shifted by up to this many pixels each way (a random crop of the
          zero-padded image).
        flip: mirror half of the training images left to right. Never for digits, whose mirror
          images are other signs.
        test_split: name of the test split in the TFDS layout.
        source: what `prepare_data --source` takes, for messages.
        urls: official archives that need no registration.
    """

    image_shape: tuple[int, int, int]
    num_classes: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    sizes: tuple[int, int]
    pad: int = 0
    flip: bool = False
    test_split: str = "test"
    source: str = ""
    urls: tuple[str, ...] = ()


_MNIST = "https://storage.googleapis.com/cvdf-datasets/mnist/"
_CIFAR = "https://www.cs.toronto.edu/~kriz/"
NPZ = "an .npz of uint8 arrays x_train, x_test [n,h,w,c] and integer y_train, y_test [n]"

SPECS: dict[str, Spec] = {
    "digits": Spec((8, 8, 1), 10, (0.3053,), (0.3760,), (1438, 359), pad=1),
    "mnist": Spec(
        (28, 28, 1),
        10,
        (0.1307,),
        (0.3081,),
        (60_000, 10_000),
        pad=2,
        source="the folder of the four idx files (.gz or unpacked), or " + NPZ,
        urls=tuple(
            f"{_MNIST}{s}-{k}-ubyte.gz"
            for s in ("train", "t10k")
            for k in ("images-idx3", "labels-idx1")
        ),
    ),
    "cifar10": Spec(
        (32, 32, 3),
        10,
        (0.4914, 0.4822, 0.4465),
        (0.2470, 0.2435, 0.2616),
        (50_000, 10_000),
        pad=4,
        flip=True,
        source="cifar-10-python.tar.gz or its extracted folder, or " + NPZ,
        urls=(_CIFAR + "cifar-10-python.tar.gz",),
    ),
    "cifar100": Spec(
        (32, 32, 3),
        100,
        (0.5071, 0.4865, 0.4409),
        (0.2673, 0.2564, 0.2762),
        (50_000, 10_000),
        pad=4,
        flip=True,
        source="cifar-100-python.tar.gz or its extracted folder, or " + NPZ,
        urls=(_CIFAR + "cifar-100-python.tar.gz",),
    ),
    "tiny_imagenet": Spec(
        (64, 64, 3),
        200,
        (0.4802, 0.4481, 0.3975),
        (0.2770, 0.2691, 0.2821),
        (100_000, 10_000),
        pad=4,
        flip=True,
        test_split="validation",
        source="tiny-imagenet-200.zip or its extracted folder, or " + NPZ,
        urls=("http://cs231n.stanford.edu/tiny-imagenet-200.zip",),
    ),
    "imagenet2012": Spec(
        (224, 224, 3),
        1000,
        (0.485, 0.456, 0.406),
        (0.229, 0.224, 0.225),
        (1_281_167, 50_000),
        flip=True,
        test_split="validation",
        source="the folder that holds ILSVRC2012_img_train.tar and ILSVRC2012_img_val.tar",
    ),
}

TrainBatch = tuple[Float[Array, "n h w c"], Int[Array, " n"]]
TestBatch = tuple[Float[Array, "n h w c"], Int[Array, " n"], Float[Array, " n"]]


class Data(Protocol):
    """What the trainer knows of a data set, whether it sits on the device or streams from disk.

    With several processes (hosts) each yields rows p, p + P, ... of every global batch, to be
    joined by `jax.make_array_from_process_local_data`; one process yields the batch itself, and P
    processes together yield the same batches.
    """

    @property
    def name(self) -> str:
        """The name in `SPECS`."""
        ...

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(h, w, c) of one image."""
        ...

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        ...

    def steps_per_epoch(self, batch_size: int) -> int:
        """Number of full batches of `batch_size` examples (over all processes) in one pass over the
        training set.
        """
        ...

    def train_batches(
        self, epoch: int, batch_size: int, seed: int, start_step: int = 0
    ) -> Iterator[TrainBatch]:
        """Shuffled, augmented, normalised batches (images float32 NHWC, labels int32), a pure
        function of (seed, epoch, step).
        """
        ...

    def test_batches(self, batch_size: int) -> Iterator[TestBatch]:
        """Every test example once: (images, labels, weights); padding rows of the last batch have
        weight 0, all others 1.
        """
        ...


def count_steps(examples: int, batch_size: int, processes: int = 1) -> int:
    """Number of full batches in a training set.

    Args:
        examples: size of the training set.
        batch_size: examples per batch over all processes.
        processes: number of processes (hosts) that share a batch.

    Returns:
        examples // batch_size; the last partial batch is dropped.

    Raises:
        ValueError: the batch size is not positive, larger than the training set, or not a multiple
          of the processes.

    Example:
        >>> count_steps(50_000, 128)
        390
    """
    if positive_int("batch_size", batch_size) > examples:
        raise ValueError(
            f"batch_size: expected at most the {examples} training examples, got {batch_size}; "
            f"lower it"
        )
    return examples // local_size(batch_size, processes) // processes


def local_size(batch_size: int, processes: int) -> int:
    """Rows of a batch that one of `processes` processes holds; ValueError unless they divide it
    evenly.
    """
    if positive_int("batch_size", batch_size) % processes:
        raise ValueError(
            f"batch_size: expected a multiple of the {processes} processes that share a batch, got "
            f"{batch_size}"
        )
    return batch_size // processes


def step_range(start_step: int, steps: int) -> range:
    """The steps of an epoch from `start_step` on; ValueError unless 0 <= start_step <= steps."""
    if not 0 <= start_step <= steps:
        raise ValueError(
            f"start_step: expected 0 to the {steps} steps of an epoch, got {start_step}"
        )
    return range(start_step, steps)


def prepare_command(name: str, data_dir: str | Path) -> str:
    """The exact command that prepares a data set, and what goes into it; for error messages."""
    archive = "" if not SPECS[name].urls else " (leave --source out to download it)"
    return (
        f"python -m experiments.prepare_data --dataset {name} --source PATH --data-dir {data_dir}\n"
        f"where PATH is {SPECS[name].source}{archive}"
    )
