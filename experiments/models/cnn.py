"""A small CNN for images of 8x8 (digits) to 32x32 pixels, wide enough that blocks of 16 or 32
filters pay.
"""

from flax import linen as nn
from jaxtyping import Array, Float

from experiments.models.layers import Parts, max_pool, scaled


class CNN(nn.Module):
    """Four 3x3 convs (64, 128, 128, 256 channels) with batch norm; max pools until the last two see
    at most 8x8; mean pool; classifier.

    A digit (8x8) is pooled once, after conv1; larger images (28x28, 32x32) also after the stem.

    Attributes:
      num_classes: of the classifier.
      width: factor on all channels.
      parts: the network's settings.
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
        for name, features in (("stem", 64), ("conv1", 128), ("conv2", 128), ("conv3", 256)):
            x = parts.conv_norm(x, scaled(features, self.width), 3, train=train, name=name)
            if name == "conv1" or (name == "stem" and images.shape[1] > 16):
                x = max_pool(x, 2, 2)
        return parts.classifier(x, self.num_classes)
