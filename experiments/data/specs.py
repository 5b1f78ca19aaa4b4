"""The facts of each data set: shapes, statistics, augmentation, and where its files come from."""

import dataclasses
from pathlib import Path


@dataclasses.dataclass(frozen=True)
class Spec:
    """The facts that hold for every copy of a data set.

    Attributes:
      image_shape: `(h, w, c)` of the images that the model sees, in pixels.
      num_classes: number of classes; labels are 0 .. num_classes - 1.
      mean: mean of each channel over the training images, where 1 is the brightest pixel.
      std: standard deviation of each channel, in the same units.
      sizes: official numbers of training and test examples.
      pad: training images shift by up to this many pixels each way, which is a random crop of the
        zero-padded image.
      flip: whether half of the training images are mirrored left to right. Never for digits: their
        mirror images mean something else.
      varying_sizes: whether the files hold images of any size, of which the model sees crops.
      test_split: name of the test split in the TFDS layout.
      source: the file or folder that `prepare_data --source` takes, in words, for messages.
      urls: official archives that need no registration.
      title: what tables call it.
    """

    image_shape: tuple[int, int, int]
    num_classes: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    sizes: tuple[int, int]
    pad: int = 0
    flip: bool = False
    varying_sizes: bool = False
    test_split: str = "test"
    source: str = ""
    urls: tuple[str, ...] = ()
    title: str = ""


_MNIST = "https://storage.googleapis.com/cvdf-datasets/mnist/"
_CIFAR = "https://www.cs.toronto.edu/~kriz/"
NPZ = "an .npz of uint8 arrays x_train, x_test [n,h,w,c] and integer y_train, y_test [n]"

SPECS: dict[str, Spec] = {
    "digits": Spec((8, 8, 1), 10, (0.3053,), (0.3760,), (1438, 359), pad=1, title="digits"),
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
        title="MNIST",
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
        title="CIFAR-10",
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
        title="CIFAR-100",
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
        title="Tiny ImageNet",
    ),
    "imagenet2012": Spec(
        (224, 224, 3),
        1000,
        (0.485, 0.456, 0.406),
        (0.229, 0.224, 0.225),
        (1_281_167, 50_000),
        flip=True,
        varying_sizes=True,
        test_split="validation",
        source="the folder that holds ILSVRC2012_img_train.tar and ILSVRC2012_img_val.tar",
        title="ImageNet",
    ),
}


def prepare_command(name: str, data_dir: str | Path) -> str:
    """The command that prepares a data set and the files that it needs, for error messages."""
    download = " (leave --source out to download it)" if SPECS[name].urls else ""
    return (
        f"python -m experiments.prepare_data --dataset {name} --source PATH --data-dir {data_dir}\n"
        f"where PATH is {SPECS[name].source}{download}"
    )
