"""A small CNN for images of 8x8 (digits) to 32x32 pixels.

Its layers are wide enough that blocks of 16 or 32 filters make them faster.
"""

from flax import linen as nn
from jaxtyping import Array, Float

from experiments.models.layers import Parts, scaled
from experiments.models.pools import max_pool


class CNN(nn.Module):
    """Four 3x3 convolutions with batch norm, a mean pool and the classifier.

    The convolutions have 64, 128, 128 and 256 channels. A max pool follows conv1 and, for images
    larger than 16x16, the stem, so that the last two convolutions see at most 8x8 pixels.

    Attributes:
      num_classes: number of outputs of the classifier.
      width: factor on all channel counts.
      parts: settings that all layers share.
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
        for name, features in (("stem", 64), ("conv1", 128), ("conv2", 128), ("conv3", 256)):
            x = parts.conv_norm(x, scaled(features, self.width), 3, train=train, name=name)
            if name == "conv1" or (name == "stem" and images.shape[1] > 16):
                x = max_pool(x, 2, 2)
        return parts.classifier(x, self.num_classes)
