"""The model zoo: Flax linen networks whose convolutions can be block-sparse.

Every network takes NHWC images and returns logits: `model.apply(variables, images, train=False)`.
Its parameters are the same in both data formats. The names are fixed: the first convolution is
`stem`, the last layer `classifier`, the 1x1 convolutions of shortcuts are `downsample`, and the
names of depthwise convolutions end in `_depthwise`.

Between stem and pool the activations are in CHWN, the native layout of the sparse convolution. On a
CPU dense convolutions run in the native kernels too; without them a network whose convolutions are
all dense is faster in NHWC: XLA's dense convolution works in NHWC and transposes CHWN activations.
On CPUs a stem runs as one matrix product in CHWN if its rows
(kernel area times 3) are at most twice its channels: a 3x3 stem of 14 channels or more. Narrower
stems, and the 7x7 stem of the ImageNet ResNets up to 73 channels, run as XLA's convolution, which
copies the stem's output. On other devices every stem does.
"""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from flax.core import FrozenDict

from blocksparse_jax._checks import choice
from experiments.models.cnn import CNN
from experiments.models.layers import Parts
from experiments.models.mobilenet import MobileNetV1
from experiments.models.resnet import CIFAR_DEPTHS, IMAGENET_BLOCKS, ResNet
from experiments.models.vgg import VGG19
from experiments.models.widths import widths_of

__all__ = ["create", "names", "widths_of"]


def names() -> tuple[str, ...]:
    """Lists the networks that `create` knows.

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
    widths: Mapping[str, int] | None = None,
    fused: bool = False,
) -> nn.Module:
    """Creates a network by name.

    Args:
      name: one of `names()`.
      num_classes: number of outputs of the classifier.
      width: factor on all channel counts; 2 gives GraSP's CIFAR ResNets (32-64-128).
      stem: `"cifar"` for images up to 64x64; `"imagenet"`, which is strided, for resnet18/34/50,
        resnet50_v1_5 and mobilenet_v1.
      data_format: layout of the activations between stem and pool, `"CHWN"` or `"NHWC"`.
      dtype: dtype of the computation; the parameters stay float32.
      implementation: backend of the block-sparse convolutions, as in `blocksparse_jax.conv`.
      kernel_gradient: `"masked"` or `"dense"`, as in `blocksparse_jax.conv`.
      widths: path of a convolution -> its output channels, as `widths_of(params)` reads them, where
        `blocksparse_jax.remove_channels` made a network smaller; None is the published network.
      fused: whether training runs in convolutions between batch norms
        (`blocksparse_jax.norm_act_conv`), with the same parameters and results.

    Returns:
      A linen module. Call `model.init(key, images)`, then `model.apply(variables, images,
      train=True, mutable=["batch_stats"])`.

    Raises:
      ValueError: the name, stem or data format is unknown; the message suggests the nearest.

    Example:
      >>> create("resnet32", num_classes=10, width=2).blocks
      (5, 5, 5)

    Reference: the networks of Ma et al., "HRBP", CPAL 2024 and Xiang et al., "SUBP", NeurIPS 2023.
    """
    choice("name", name, names())
    choice("stem", stem, ("cifar", "imagenet"))
    choice("data_format", data_format, ("CHWN", "NHWC"))
    if stem == "imagenet" and name not in (*IMAGENET_BLOCKS, "mobilenet_v1"):
        raise ValueError(
            f"stem: {name!r} has only the 'cifar' stem, got 'imagenet'; use resnet18/34/50, "
            f"resnet50_v1_5 or mobilenet_v1"
        )
    parts = Parts(
        data_format, dtype, implementation, kernel_gradient, FrozenDict(widths or {}), fused
    )
    if name == "cnn":
        return CNN(num_classes, width, parts)
    if name == "vgg19":
        return VGG19(num_classes, width, parts)
    if name == "mobilenet_v1":
        return MobileNetV1(num_classes, width, stem, parts)
    if name in CIFAR_DEPTHS:
        return ResNet(num_classes, (CIFAR_DEPTHS[name],) * 3, (16, 32, 64), width, parts=parts)
    blocks, block_options = IMAGENET_BLOCKS[name]
    features = (64, 128, 256, 512)
    return ResNet(num_classes, blocks, features, width, stem, parts=parts, **block_options)
