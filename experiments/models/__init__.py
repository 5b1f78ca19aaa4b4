"""The model zoo: Flax linen networks whose convs are `BlockSparseConv`, in CHWN between stem and
pool.

Every network takes NHWC images and gives logits: `model.apply(variables, images, train=False)`.
Params are the same in both data formats. Names: the first conv is `stem`, the last layer
`classifier`, 1x1 shortcut convs `downsample`, depthwise convs end in `_depthwise`.

The networks keep CHWN to serve the sparse convolution. A network whose convs are all dense runs
faster in NHWC on a CPU: XLA's dense convolution is an NHWC one and would transpose its activations.
A stem runs as one matrix product in CHWN where it has at most twice as many rows (kernel area times
3) as channels: a 3x3 stem of 14 channels or more. Narrower ones, and the 7x7 stem of the ImageNet
ResNets up to 73 channels, run as XLA's convolution, which copies the stem's output.
"""

from typing import Any

import jax.numpy as jnp
from flax import linen as nn

from blocksparse_jax import _checks
from experiments.models.cnn import CNN
from experiments.models.layers import Parts
from experiments.models.mobilenet import MobileNetV1
from experiments.models.resnet import CIFAR_DEPTHS, IMAGENET_BLOCKS, ResNet
from experiments.models.vgg import VGG19

__all__ = ["create", "names"]


def names() -> tuple[str, ...]:
    """The networks that `create` makes.

    Returns:
      Their names.

    Example:
      >>> "vgg19" in names()
      True
    """
    return ("cnn", *CIFAR_DEPTHS, "vgg19", *IMAGENET_BLOCKS, "mobilenet_v1")


def create(
    name: str,
    *,
    num_classes: int,
    width: float = 1,
    stem: str = "cifar",
    data_format: str = "CHWN",
    dtype: Any = jnp.float32,
    implementation: str | None = None,
    kernel_gradient: str = "masked",
) -> nn.Module:
    """A network by name.

    Args:
      name: one of `names()`.
      num_classes: outputs of the classifier.
      width: factor on all channels; 2 gives GraSP's CIFAR ResNets (32-64-128).
      stem: `"cifar"` for images up to 64x64, `"imagenet"` (strided) for resnet18/34/50,
        resnet50_v1_5 and mobilenet_v1.
      data_format: activation layout between stem and pool, `"CHWN"` or `"NHWC"`.
      dtype: of the computation; params stay float32.
      implementation: of the block-sparse convs, as in `blocksparse_jax.conv`.
      kernel_gradient: `"masked"` or `"dense"`, as in `blocksparse_jax.conv`.

    Returns:
      A linen module: `model.init(key, images)`, `model.apply(variables, images, train=True,
      mutable=["batch_stats"])`.

    Raises:
      ValueError: an unknown name, stem or data format; the message names the nearest.

    Example:
      >>> create("resnet32", num_classes=10, width=2).blocks
      (5, 5, 5)

    Reference: the networks of Ma et al., "HRBP", CPAL 2024 and Xiang et al., "SUBP", NeurIPS 2023.
    """
    _checks.choice("name", name, names())
    _checks.choice("stem", stem, ("cifar", "imagenet"))
    _checks.choice("data_format", data_format, ("CHWN", "NHWC"))
    if stem == "imagenet" and name not in (*IMAGENET_BLOCKS, "mobilenet_v1"):
        raise ValueError(
            f"stem: {name!r} has only the 'cifar' stem, got 'imagenet'; use resnet18/34/50, "
            f"resnet50_v1_5 or mobilenet_v1"
        )
    parts = Parts(data_format, dtype, implementation, kernel_gradient)
    if name == "cnn":
        return CNN(num_classes, width, parts)
    if name == "vgg19":
        return VGG19(num_classes, width, parts)
    if name == "mobilenet_v1":
        return MobileNetV1(num_classes, width, stem, parts)
    if name in CIFAR_DEPTHS:
        return ResNet(num_classes, (CIFAR_DEPTHS[name],) * 3, (16, 32, 64), width, parts=parts)
    blocks, kind = IMAGENET_BLOCKS[name]
    return ResNet(num_classes, blocks, (64, 128, 256, 512), width, stem, parts=parts, **kind)
