"""VGG-19 with batch norm and one classifier layer, as trained on CIFAR."""

from flax import linen as nn
from jaxtyping import Array, Float

from experiments.models.layers import Parts, scaled
from experiments.models.pools import max_pool

STAGES = ((64, 2), (128, 2), (256, 4), (512, 4), (512, 4))
"""`(channels, convolutions)` of each stage; a 2x2 max pool lies between stages."""


class VGG19(nn.Module):
    """Sixteen 3x3 convolutions with batch norm in five stages, a mean pool and the classifier.

    The first convolution is the stem.

    Attributes:
      num_classes: number of outputs of the classifier.
      width: factor on all channel counts.
      parts: settings that all layers share.

    Reference: Simonyan & Zisserman, "Very deep convolutional networks", ICLR 2015; the CIFAR form
    of Wang et al., "GraSP", ICLR 2020.
    """

    num_classes: int
    width: float = 1
    parts: Parts = Parts()

    @nn.compact
    def __call__(
        self, images: Float[Array, "n h w c"], train: bool = False
    ) -> Float[Array, "n classes"]:
        """Returns the logits of NHWC images."""
        parts = self.parts
        x = parts.images(images)
        for stage, (features, count) in enumerate(STAGES, 1):
            x = max_pool(x, 2, 2) if stage > 1 else x
            for i in range(1, count + 1):
                name = "stem" if (stage, i) == (1, 1) else f"stage{stage}_conv{i}"
                x = parts.conv_norm(x, scaled(features, self.width), 3, train=train, name=name)
        return parts.classifier(x, self.num_classes)
