"""What `optax.multi_transform` hides of the parameters from a method, read off its other parts."""

from collections.abc import Callable
from typing import Any

import jax
import optax
from jaxtyping import PyTree

from blocksparse_jax.layout_nodes import is_layout


def is_hidden(node: Any) -> bool:
    """True for what multi_transform puts where a method sees nothing."""
    return isinstance(node, optax.MaskedNode)


def reveal(tree: PyTree, state: PyTree, absent: Any, is_leaf: Callable[[Any], bool]) -> PyTree:
    """Puts `absent` at each leaf that a method does not see.

    Labels of whole subtrees hide a subtree as one node. What it consists of stands in the moments
    of the transformation that trains it; where that has none, the node becomes one `absent`.

    Args:
      tree: of masks or layouts, from a method's state.
      state: the optimizer state that the method's is in.
      absent: what stands for a leaf that the method does not see.
      is_leaf: nodes of `state` that hold no such moments.

    Returns:
      The tree without hidden nodes.

    Example:
      >>> state = {"mu": {"a": optax.MaskedNode(), "b": {"bias": 1.0}}}
      >>> reveal({"a": {"kernel": 2}, "b": optax.MaskedNode()}, state, 0, lambda node: False)
      {'a': {'kernel': 2}, 'b': {'bias': 0}}
    """
    if any(map(is_hidden, jax.tree.leaves(tree, is_leaf=is_hidden))) and not is_hidden(tree):
        nodes = [state]
        while nodes:
            node = nodes.pop()
            completed = _completed(tree, node)
            tree = tree if completed is None else completed
            if not is_leaf(node):
                nodes.extend(child for _, child in _children(node))
    return jax.tree.map(
        lambda node: absent if is_hidden(node) else node,
        tree,
        is_leaf=lambda node: is_hidden(node) or is_layout(node),
    )


def _completed(tree: Any, other: Any) -> Any:
    """The tree with hidden subtrees as in the other one; None where that has another structure."""
    if is_hidden(tree):
        return jax.tree.map(lambda _: tree, other)
    if is_hidden(other):
        return tree
    children, others = _children(tree), _children(other)
    if not children or is_layout(tree):
        return None if others else tree
    if type(tree) is not type(other) or [key for key, _ in children] != [key for key, _ in others]:
        return None
    completed = [
        _completed(child, its) for (_, child), (_, its) in zip(children, others, strict=True)
    ]
    if any(child is None for child in completed):
        return None
    return jax.tree.unflatten(jax.tree.structure(tree, is_leaf=lambda n: n is not tree), completed)


def _children(node: Any) -> list[tuple[Any, Any]]:
    """The keys and the children of a node; none of a leaf."""
    pairs = jax.tree.leaves_with_path(node, is_leaf=lambda child: child is not node)
    return [(path, child) for path, child in pairs if path]
