"""Residual networks: ResNet-18, 34, 50 and 50 v1.5, and the CIFAR ResNets of depth 6n + 2.

A shortcut that changes the shape is a 1x1 convolution with batch norm (option B, as in GraSP's
networks and in torchvision). The last gamma of a block starts at 1, not 0: with 0, every gradient
score (SNIP, GraSP, SynFlow) of a residual branch would be 0 at initialisation.
"""

from collections.abc import Sequence
from typing import Any

from flax import linen as nn
from jaxtyping import Array, Float

from blocksparse_jax import activations
from experiments.models.layers import Parts, scaled
from experiments.models.pools import max_pool

Forked = tuple[Any, Any]
"""The same activations twice, which may be pending: their gradients meet in the operation that made
them."""


class Block(nn.Module):
    """One residual block, `relu(factor * branch(x) + shortcut(x))`.

    The branch is two 3x3 convolutions, or a bottleneck of a 1x1, a 3x3 and a 1x1 convolution. The
    factor is a scalar parameter where there is one (`spaces.with_branch_factors`), else 1. Where
    `parts.widths` says 0 for a convolution of the branch, the branch is gone.

    Attributes:
      features: channels of the 3x3 convolutions.
      strides: stride of the block in pixels.
      parts: settings that all layers share.
      bottleneck: whether the branch is a bottleneck, which has `4 * features` output channels.
      stride_in_3x3: whether the 3x3 convolution of a bottleneck is strided (v1.5) and not its first
        1x1 convolution (v1).
      downsample: whether the shortcut is a 1x1 convolution.
      fork: whether the result is returned twice, for the next block.

    Reference: He et al., "Deep residual learning", CVPR 2016; v1.5 as in torchvision.
    """

    features: int
    strides: int
    parts: Parts
    bottleneck: bool = False
    stride_in_3x3: bool = False
    downsample: bool = False
    fork: bool = False

    @nn.compact
    def __call__(self, inputs: Forked, train: bool = False) -> Any:
        """Applies the block to activations for the branch and for the shortcut."""
        parts = self.parts
        if self.bottleneck:
            convs = [
                (self.features, 1, 1 if self.stride_in_3x3 else self.strides),
                (self.features, 3, self.strides if self.stride_in_3x3 else 1),
                (4 * self.features, 1, 1),
            ]
        else:
            convs = [(self.features, 3, self.strides), (self.features, 3, 1)]
        factor = self.get_variable("params", "factor", None)
        if 0 in (parts.widths.get(f"conv{i}") for i in range(1, len(convs))):
            y = nn.relu(activations(self._shortcut(activations(inputs[1]), train)))
            return (y, y) if self.fork else y
        (features, size, strides), *inner = convs[:-1]
        y, shortcut = parts.first_conv_norm(
            inputs, features, size, strides, train=train, name="conv1", norm_name="norm1"
        )
        for i, (features, size, strides) in enumerate(inner, 2):
            y = parts.conv_norm(
                y, features, size, strides, train=train, name=f"conv{i}", norm_name=f"norm{i}"
            )
        features, size, strides = convs[-1]
        last = len(convs)
        return parts.conv_norm(
            y,
            features,
            size,
            strides,
            train=train,
            name=f"conv{last}",
            norm_name=f"norm{last}",
            residual=self._shortcut(shortcut, train),
            factor=factor,
            fork=self.fork,
        )

    def _shortcut(self, x: Float[Array, "a h w b"], train: bool) -> Any:
        if not self.downsample:
            return x
        features = 4 * self.features if self.bottleneck else self.features
        return self.parts.conv_norm(
            x, features, 1, self.strides, train=train, name="downsample", relu=False
        )


class ResNet(nn.Module):
    """A stem, stages of residual blocks, a mean pool and the classifier.

    Each stage but the first halves the image.

    Attributes:
      num_classes: number of outputs of the classifier.
      blocks: number of blocks in each stage.
      features: channels of the 3x3 convolutions in each stage, at width 1.
      width: factor on all channel counts.
      stem_kind: `"cifar"` (3x3, stride 1) or `"imagenet"` (7x7, stride 2, then a 3x3 max pool of
        stride 2).
      bottleneck: whether the blocks are bottlenecks.
      stride_in_3x3: as in `Block`.
      parts: settings that all layers share.

    Reference: He et al., "Deep residual learning", CVPR 2016.
    """

    num_classes: int
    blocks: Sequence[int]
    features: Sequence[int]
    width: float = 1
    stem_kind: str = "cifar"
    bottleneck: bool = False
    stride_in_3x3: bool = False
    parts: Parts = Parts()

    @nn.compact
    def __call__(
        self, images: Float[Array, "n h w c"], train: bool = False
    ) -> Float[Array, "n classes"]:
        """Returns the logits of NHWC images."""
        parts = self.parts
        size, strides = (7, 2) if self.stem_kind == "imagenet" else (3, 1)
        x = parts.conv_norm(
            parts.images(images),
            scaled(self.features[0], self.width),
            size,
            strides,
            train=train,
            name="stem",
            fork=self.stem_kind == "cifar",
        )
        if self.stem_kind == "imagenet":
            x = max_pool(x, 3, 2, padding=1)
            x = (x, x)
        channels = scaled(self.features[0], self.width)
        for stage, (count, published) in enumerate(zip(self.blocks, self.features), 1):
            features = scaled(published, self.width)
            out_channels = 4 * features if self.bottleneck else features
            for block in range(1, count + 1):
                strides = 2 if stage > 1 and block == 1 else 1
                name = f"stage{stage}_block{block}"
                residual = Block(
                    features,
                    strides,
                    parts.inside(name),
                    self.bottleneck,
                    self.stride_in_3x3,
                    strides != 1 or channels != out_channels,
                    fork=(stage, block) != (len(self.blocks), self.blocks[-1]),
                    name=name,
                )
                x, channels = residual(x, train), out_channels
        return parts.classifier(x, self.num_classes)


CIFAR_DEPTHS = {"resnet20": 3, "resnet32": 5, "resnet56": 9}
"""Blocks in each of the three stages of a CIFAR ResNet."""

IMAGENET_BLOCKS = {
    "resnet18": ((2, 2, 2, 2), {}),
    "resnet34": ((3, 4, 6, 3), {}),
    "resnet50": ((3, 4, 6, 3), {"bottleneck": True}),
    "resnet50_v1_5": ((3, 4, 6, 3), {"bottleneck": True, "stride_in_3x3": True}),
}
"""Blocks in each of the four stages of an ImageNet ResNet, and the options of the blocks."""
