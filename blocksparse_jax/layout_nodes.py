"""The nodes of a tree of layouts: a layout for each leaf, or what stands for one."""

import dataclasses
from typing import Any, TypeGuard

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool

from blocksparse_jax.layout import BlockLayout
from blocksparse_jax.layout_of_mask import mask_to_layout


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Dense:
    """The layout of a leaf that stays dense: a marker without arrays.

    Example:
      >>> jax.tree.leaves({"bias": Dense()})
      []
    """


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ConsecutiveGroups:
    """The layout of a leaf in groups of consecutive filters whose kept count changes in training.

    The kept count is a shape, so it is read from the mask outside of jit: `get_layouts` turns this
    marker into a `BlockLayout`.

    Attributes:
      group_size: filters in a group (static).
      packed: in the state of packed values, their layout: there is no mask to read it from.

    Example:
      >>> ConsecutiveGroups(16).group_size
      16

    Reference: the 1xN block of Xiang et al., "SUBP", NeurIPS 2023.
    """

    group_size: int = dataclasses.field(metadata={"static": True})
    packed: BlockLayout | None = None

    def read(self, mask: Bool[Array, "..."]) -> BlockLayout:
        """The layout of a concrete mask."""
        return mask_to_layout(mask, jnp.arange(mask.shape[-1]).reshape(-1, self.group_size))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class FilterGroups:
    """The layout of a leaf in groups of any filters whose kept counts change in training.

    As `ConsecutiveGroups`, for groups that a search chose: HRBP's blocks while a gradual
    method prunes them.

    Attributes:
      filters: int32 `[groups, group_size]`, a partition of `range(cout)`.
      channel_block: channels come in aligned runs of this many (static).
      packed: in the state of packed values, their layout.

    Example:
      >>> FilterGroups(jnp.array([[0, 2], [1, 3]])).filters.shape
      (2, 2)
    """

    filters: jax.Array  # int32[groups, group_size]
    channel_block: int = dataclasses.field(default=1, metadata={"static": True})
    packed: BlockLayout | None = None

    def read(self, mask: Bool[Array, "..."]) -> BlockLayout:
        """The layout of a concrete mask."""
        layout = mask_to_layout(mask, self.filters)
        return dataclasses.replace(layout, channel_block=self.channel_block)


ShrinkingLayout = ConsecutiveGroups | FilterGroups
Layout = BlockLayout | Dense | ShrinkingLayout


def is_layout(node: Any) -> TypeGuard[Layout]:
    """True for a node of a layout tree: pass it as `is_leaf` to `jax.tree.map`.

    Args:
      node: anything.

    Returns:
      Whether `node` is a `BlockLayout`, `Dense`, `ConsecutiveGroups` or `FilterGroups`.

    Example:
      >>> is_layout(Dense()), is_layout({})
      (True, False)
    """
    return isinstance(node, Layout)
