"""Patterns: which sets of weights of a kernel are kept or pruned together.

    masks = masks_from_scores(scores, 0.9, pattern=patterns.one_by_n(16))

A pattern is a small frozen object; every method takes one as its `pattern=`. Those with a layout
run in the block-sparse convolution, the others masked-dense.
"""

from blocksparse_jax.patterns._base import Kept, Pattern
from blocksparse_jax.patterns.block import block
from blocksparse_jax.patterns.channel import channel
from blocksparse_jax.patterns.channel_tap import channel_tap
from blocksparse_jax.patterns.fan_in import fan_in
from blocksparse_jax.patterns.kernel import kernel
from blocksparse_jax.patterns.n_of_m import n_of_m
from blocksparse_jax.patterns.one_by_n import one_by_n
from blocksparse_jax.patterns.unstructured import unstructured
from blocksparse_jax.patterns.vector import vector
from blocksparse_jax.patterns.window import window

__all__ = [
    "Kept",
    "Pattern",
    "block",
    "channel",
    "channel_tap",
    "fan_in",
    "kernel",
    "n_of_m",
    "one_by_n",
    "unstructured",
    "vector",
    "window",
]
