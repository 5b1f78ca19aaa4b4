"""The channels that each convolution of a network has, read from its parameters."""

from typing import Any

import jax

from blocksparse_jax import tree


def widths_of(params: Any) -> dict[str, int]:
    """The output channels of each convolution.

    Args:
      params: of a network that `experiments.models.create` made, also with channels removed; values
        or shapes.

    Returns:
      Path of the convolution -> channels, as `create(widths=...)` takes it.

    Example:
      >>> import numpy as np
      >>> widths_of({"stage1_block1": {"conv1": {"kernel": np.ones((3, 3, 16, 12))}}})
      {'stage1_block1/conv1': 12}
    """
    return {
        tree.path_name(path).removesuffix("/kernel"): int(leaf.shape[-1])
        for path, leaf in jax.tree.leaves_with_path(params)
        if len(leaf.shape) == 4
    }
