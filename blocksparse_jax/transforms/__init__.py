"""Sparse methods as optax transformations, one file a method, and the frame that they share.

To write a method of your own, give `drop_and_grow` or `one_shot` a pattern and scores; where that
does not say it, build a transformation from its parts with `sparse_transformation`.
"""

from blocksparse_jax.masks import draw
from blocksparse_jax.patterns import Kept
from blocksparse_jax.transforms._base import sparse_transformation
from blocksparse_jax.transforms.leaves import Leaf, Step

__all__ = ["Kept", "Leaf", "Step", "draw", "sparse_transformation"]
