"""`nnx.Optimizer` for transformations whose state holds layouts."""

from typing import Any

import jax
import optax
from flax import nnx

from blocksparse_jax.state import LAYOUTS_STAY_WHOLE
from blocksparse_jax.tree import GROUPED


class Optimizer(nnx.Optimizer):
    """`nnx.Optimizer` for transformations whose state holds layouts.

    `nnx.Optimizer` writes its state back leaf by leaf, and leaves a dict where a `BlockLayout` was.
    This class keeps each layout whole: `get_layouts(optimizer.opt_state)` works after any number of
    updates, and the first update does not change the state's structure.

    It also knows which kernels are those of grouped and depthwise convolutions, which their shapes
    do not tell: methods without a `where` leave them dense.

    Example:
      >>> import blocksparse_jax as bsj
      >>> model = nnx.List([bsj.nnx.BlockSparseConv(16, 32, 3, rngs=nnx.Rngs(0))])
      >>> method = bsj.hrbp_prune(0.5, group_size=16, block_density=1)
      >>> tx = bsj.sparse(method, optax.sgd(0.1))
      >>> optimizer = bsj.nnx.Optimizer(model, tx, wrt=nnx.Param)
      >>> bsj.nnx.set_layouts(model, bsj.get_layouts(optimizer.opt_state))
      >>> model[0].layout.get_value().packed_shape
      (2, 8, 9, 16)
    """

    def __init__(self, model: Any, tx: Any, **options: Any):
        token = GROUPED.set(_grouped_kernels(model))
        try:
            super().__init__(model, tx, **options)
        finally:
            GROUPED.reset(token)

    def update(self, model: Any, grads: Any, /, **kwargs: Any) -> Any:
        """Updates the model's parameters and the optimizer's state in place.

        Args:
          model: the module whose parameters are trained.
          grads: gradients of `nnx.grad`.
          **kwargs: extra arguments of the transformation.

        Returns:
          The updates, with the structure of the parameters.
        """
        params = nnx.as_pure(nnx.state(model, self.wrt))
        gradients = nnx.as_pure(nnx.state(grads, self.wrt))
        state = nnx.as_pure(self.opt_state)
        token = LAYOUTS_STAY_WHOLE.set(True)
        try:
            updates, new_state = self.tx.update(gradients, state, params, **nnx.as_pure(kwargs))
        finally:
            LAYOUTS_STAY_WHOLE.reset(token)
        nnx.update(model, optax.apply_updates(params, updates))
        jax.tree.map(
            lambda variable, value: variable.set_value(value),
            self.opt_state,
            new_state,
            is_leaf=lambda node: isinstance(node, nnx.Variable),
        )
        self.step[...] += 1
        return updates


def _grouped_kernels(model: Any) -> frozenset[str]:
    """The names of the kernels of grouped convolutions."""
    grouped = {
        id(module.kernel)
        for _, module in nnx.iter_modules(model)
        if isinstance(module, nnx.Conv) and module.feature_group_count > 1
    }
    return frozenset(
        "/".join(map(str, path)) for path, node in nnx.iter_graph(model) if id(node) in grouped
    )
