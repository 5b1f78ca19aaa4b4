"""Residual networks: ResNet-18/34/50 and ResNet-50 v1.5 with ImageNet or CIFAR stems, and the CIFAR
ResNets of depth 6n + 2.

Shortcuts that change shape are a 1x1 conv with batch norm (option B, as in GraSP's networks and
torchvision). The last gamma of a block starts at 1, not 0: with 0 every gradient score (SNIP,
GraSP, SynFlow) of a residual branch would be 0 at initialisation.
"""

from collections.abc import Sequence

from flax import linen as nn
from jaxtyping import Array, Float

from experiments.models.layers import Parts, max_pool, scaled


class Block(nn.Module):
    """One residual block: `relu(branch(x) + shortcut(x))`, two 3x3 convs or a 1x1-3x3-1x1
    bottleneck.

    Attributes:
      features: channels of the 3x3 convs.
      strides: of the block in pixels.
      parts: the network's settings.
      bottleneck: 1x1, 3x3, 1x1 to `4 * features` channels.
      stride_in_3x3: a bottleneck's stride sits in its 3x3 conv (v1.5) and not in its first 1x1
        (v1).

    Reference: He et al., "Deep residual learning", CVPR 2016; v1.5 as in torchvision.
    """

    features: int
    strides: int
    parts: Parts
    bottleneck: bool = False
    stride_in_3x3: bool = False

    @nn.compact
    def __call__(
        self, x: Float[Array, "a h w b"], train: bool = False
    ) -> Float[Array, "a ho wo b"]:
        """Activations in the network's format."""
        parts = self.parts
        if self.bottleneck:
            first, second = (1, self.strides) if self.stride_in_3x3 else (self.strides, 1)
            convs = [
                (self.features, 1, first),
                (self.features, 3, second),
                (4 * self.features, 1, 1),
            ]
        else:
            convs = [(self.features, 3, self.strides), (self.features, 3, 1)]
        y = x
        for i, (features, size, strides) in enumerate(convs[:-1], 1):
            y = parts.conv_norm(
                y, features, size, strides, train=train, name=f"conv{i}", norm_name=f"norm{i}"
            )
        features, size, strides = convs[-1]
        if self.strides != 1 or x.shape[parts.channel_axis] != features:
            x = parts.conv_norm(
                x, features, 1, self.strides, train=train, name="downsample", relu=False
            )
        last = len(convs)
        return parts.conv_norm(
            y,
            features,
            size,
            strides,
            train=train,
            name=f"conv{last}",
            norm_name=f"norm{last}",
            residual=x,
        )


class ResNet(nn.Module):
    """Stem, stages of residual blocks (each stage but the first halves the image), global pool,
    classifier.

    Attributes:
      num_classes: of the classifier.
      blocks: per stage.
      features: per stage, channels of the 3x3 convs at width 1.
      width: factor on all channels.
      stem_kind: `"cifar"` (3x3, stride 1) or `"imagenet"` (7x7, stride 2, then a 3x3 max pool of
        stride 2).
      bottleneck: the stages use bottleneck blocks.
      stride_in_3x3: as in `Block`.
      parts: the network's settings.

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
        """Logits of NHWC images."""
        parts = self.parts
        size, strides = (7, 2) if self.stem_kind == "imagenet" else (3, 1)
        x = parts.conv_norm(
            parts.images(images),
            scaled(self.features[0], self.width),
            size,
            strides,
            train=train,
            name="stem",
        )
        if self.stem_kind == "imagenet":
            x = max_pool(x, 3, 2, padding=1)
        for stage, (count, features) in enumerate(zip(self.blocks, self.features), 1):
            for block in range(1, count + 1):
                strides = 2 if stage > 1 and block == 1 else 1
                make = Block(
                    scaled(features, self.width),
                    strides,
                    parts,
                    self.bottleneck,
                    self.stride_in_3x3,
                    name=f"stage{stage}_block{block}",
                )
                x = make(x, train)
        return parts.classifier(x, self.num_classes)


CIFAR_DEPTHS = {"resnet20": 3, "resnet32": 5, "resnet56": 9}
IMAGENET_BLOCKS = {
    "resnet18": ((2, 2, 2, 2), {}),
    "resnet34": ((3, 4, 6, 3), {}),
    "resnet50": ((3, 4, 6, 3), {"bottleneck": True}),
    "resnet50_v1_5": ((3, 4, 6, 3), {"bottleneck": True, "stride_in_3x3": True}),
}
