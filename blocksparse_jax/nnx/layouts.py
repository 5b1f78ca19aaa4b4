"""The variable type of layouts in nnx modules."""

from flax import nnx


class Layouts(nnx.Variable):
    """The variable type that holds a layer's layout.

    `nnx.state(model, Layouts)` has the index arrays, `nnx.state(model, nnx.Param)` has none of
    them.

    Example:
      >>> import blocksparse_jax as bsj
      >>> layer = bsj.nnx.BlockSparseConv(4, 8, 3, rngs=nnx.Rngs(0))
      >>> isinstance(layer.layout, Layouts)
      True
    """
