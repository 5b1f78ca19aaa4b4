"""VGG-19 with batch norm and one classifier layer, as trained on CIFAR."""

from flax import linen as nn
from jaxtyping import Array, Float

from experiments.models.layers import Parts, max_pool, scaled

STAGES = (
    (64, 2),
    (128, 2),
    (256, 4),
    (512, 4),
    (512, 4),
)  # (channels, convs); a 2x2 max pool between stages


class VGG19(nn.Module):
    """16 convs of 3x3 with batch norm in five stages, global mean pool, classifier; the first conv
    is the stem.

    Attributes:
      num_classes: of the classifier.
      width: factor on all channels.
      parts: the network's settings.

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
        """Logits of NHWC images."""
        parts, x = self.parts, self.parts.images(images)
        for stage, (features, count) in enumerate(STAGES, 1):
            x = max_pool(x, 2, 2) if stage > 1 else x
            for i in range(1, count + 1):
                name = "stem" if (stage, i) == (1, 1) else f"stage{stage}_conv{i}"
                x = parts.conv_norm(x, scaled(features, self.width), 3, train=train, name=name)
        return parts.classifier(x, self.num_classes)
