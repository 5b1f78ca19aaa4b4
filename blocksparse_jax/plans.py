"""Plans: the lists that GPU kernels read, made when the masks change, beside the layouts."""

import dataclasses
from typing import TypeVar

import jax

from blocksparse_jax.layout import BlockLayout
from blocksparse_jax.layout_nodes import Layout, is_layout
from pallas_kernels.block_sparse_conv import Index, Plan, make_plan, why_no_plan

Layouts = TypeVar("Layouts")


def with_plans(layouts: Layouts) -> Layouts:
    """Gives layouts the lists that GPU kernels read, so that no training step makes them.

    The Triton kernels read lists of rows, which depend on the masks alone. Call this when the masks
    have changed, next to `get_layouts`; new masks do not compile it again. `conv`, `linear` and the
    Flax layers then use the lists; other implementations leave them unread.

    A plan belongs to the arrays of its layout: where you change these by hand, call `with_plans`
    again. States and checkpoints never hold plans.

    Args:
      layouts: a layout, or a tree of them, such as `get_layouts(state)`; may be traced.

    Returns:
      The same tree, in which each `BlockLayout` has its `plan`. Other nodes stay as they are, and
      so do layouts of kernels of more than 16 pixels on a side, which the kernels do not take.

    Example:
      >>> import jax.numpy as jnp
      >>> import blocksparse_jax as bsj
      >>> layout = with_plans(bsj.mask_to_layout(jnp.ones((3, 3, 16, 32), bool)))
      >>> layout.plan.rows.shape
      (1, 128)
    """
    return _with_plans(layouts)


def without_plans(layouts: Layouts) -> Layouts:
    """Layouts as `get_layouts` gives them: the inverse of `with_plans`.

    Args:
      layouts: a layout, or a tree of them.

    Returns:
      The same tree without plans.

    Example:
      >>> import jax.numpy as jnp
      >>> import blocksparse_jax as bsj
      >>> layout = bsj.mask_to_layout(jnp.ones((3, 3, 16, 32), bool))
      >>> without_plans(with_plans(layout)).plan is None
      True
    """

    def without(node: Layout) -> Layout:
        return dataclasses.replace(node, plan=None) if isinstance(node, BlockLayout) else node

    return jax.tree.map(without, layouts, is_leaf=is_layout)


@jax.jit
def _with_plans(layouts: Layouts) -> Layouts:
    return jax.tree.map(_with_plan, without_plans(layouts), is_leaf=is_layout)


def _with_plan(node: Layout) -> Layout:
    if not isinstance(node, BlockLayout) or why_no_plan(node.kernels.conv_shape):
        return node

    def plan(layout: BlockLayout) -> Plan:
        return make_plan(
            Index(layout.filters, layout.channels, layout.taps),
            kernel_shape=layout.kernels.conv_shape,
            channel_block=layout.channel_block,
        )

    return dataclasses.replace(node, plan=node.kernels.each(plan)(node))
