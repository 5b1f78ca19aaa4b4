"""MobileNet v1. Its pointwise convolutions may be block-sparse, its depthwise ones stay dense."""

from flax import linen as nn
from jaxtyping import Array, Float

from experiments.models.layers import DepthwiseConv, Parts, scaled

BLOCKS = (
    (64, 1),
    (128, 2),
    (128, 1),
    (256, 2),
    (256, 1),
    (512, 2),
    *((512, 1),) * 5,
    (1024, 2),
    (1024, 1),
)
"""`(channels, stride)` of each block."""


class MobileNetV1(nn.Module):
    """A 3x3 stem, 13 blocks of a depthwise 3x3 and a pointwise convolution, pool and classifier.

    Attributes:
      num_classes: number of outputs of the classifier.
      width: factor on all channel counts.
      stem_kind: `"cifar"` (stride 1) or `"imagenet"` (stride 2).
      parts: settings that all layers share.

    Reference: Howard et al., "MobileNets", 2017, table 1.
    """

    num_classes: int
    width: float = 1
    stem_kind: str = "cifar"
    parts: Parts = Parts()

    @nn.compact
    def __call__(
        self, images: Float[Array, "n h w c"], train: bool = False
    ) -> Float[Array, "n classes"]:
        """Returns the logits of NHWC images."""
        parts = self.parts
        strides = 2 if self.stem_kind == "imagenet" else 1
        x = parts.conv_norm(
            parts.images(images), scaled(32, self.width), 3, strides, train=train, name="stem"
        )
        for i, (features, strides) in enumerate(BLOCKS, 1):
            x = DepthwiseConv(3, strides, parts, name=f"block{i}_depthwise")(x)
            x = parts.norm(train, name=f"block{i}_depthwise_norm")(x)
            x = parts.conv_norm(
                x, scaled(features, self.width), 1, train=train, name=f"block{i}_pointwise"
            )
        return parts.classifier(x, self.num_classes)
