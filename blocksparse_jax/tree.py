"""Pytrees of parameters: names of leaves, the sparse ones, and the state that belongs to them."""

import contextvars
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

Where = Callable[[str, Array], bool]

GROUPED = contextvars.ContextVar[frozenset[str]]("GROUPED", default=frozenset())
"""Names of kernels that are known to be grouped: the default choice leaves them out."""


def path_name(path: tuple[Any, ...]) -> str:
    """The name of a leaf: its keys joined by `/`, without the `/value` that ends nnx paths.

    Args:
      path: a key path of `jax.tree_util`.

    Returns:
      The name, e.g. `"Conv_0/kernel"`.

    Example:
      >>> [path_name(path) for path, _ in jax.tree.leaves_with_path({"Conv_0": {"kernel": 1.0}})]
      ['Conv_0/kernel']
    """
    return jax.tree_util.keystr(path, simple=True, separator="/").removesuffix("/value")


def conv_kernels(name: str, leaf: Array) -> bool:
    """The default choice of sparse leaves: conv kernels except the stem.

    A conv kernel is a leaf `[kh, kw, cin, cout]`, or `[layers, kh, kw, cin, cout]` as `nn.scan` and
    vmapped ensembles stack them (the kernel of a 3-D convolution looks the same); the stem is one
    whose name holds "stem" or that reads at most 4 input channels (images); depthwise kernels, and
    grouped ones of at most 4 channels a group, stay dense by the same rule. A grouped convolution
    of more looks like an ordinary one of few channels: `bsj.nnx.Optimizer`, which sees the layers,
    leaves it out; elsewhere exclude it by name. The variances of variational dropout,
    `log_sigma2`, are no kernels.

    Args:
      name: the leaf's path name.
      leaf: the parameter.

    Returns:
      Whether the leaf is sparse.

    Example:
      >>> import jax.numpy as jnp
      >>> stem, kernel = jnp.zeros((3, 3, 3, 64)), jnp.zeros((3, 3, 64, 64))
      >>> conv_kernels("stem/kernel", stem), conv_kernels("Conv_1/kernel", kernel)
      (False, True)

    Reference: the dense layers of Xiang et al., "SUBP", NeurIPS 2023 (stem and classifier).
    """
    is_kernel = leaf.ndim >= 4 and leaf.shape[-2] > 4 and not name.endswith("log_sigma2")
    return is_kernel and "stem" not in name.lower() and name not in GROUPED.get()


def has_variables(params: PyTree) -> bool:
    """Whether leaves lie in Flax nnx variables, as in `nnx.state(model)`.

    Args:
      params: any pytree.

    Returns:
      False also for a tree without leaves.

    Example:
      >>> has_variables({"kernel": 1.0})
      False
    """
    return any(_plain(path) != path for path, _ in jax.tree.leaves_with_path(params))


def choose(where: Where | None, params: PyTree, label: str = "params") -> dict[str, Array]:
    """The sparse leaves of a tree, by name.

    Args:
      where: predicate on a leaf's name and the leaf; None means `conv_kernels`.
      params: any pytree of arrays.
      label: what to call the tree in errors.

    Returns:
      Name -> leaf, in tree order.

    Raises:
      ValueError: a leaf is no array, none is chosen, a chosen one holds no floats, two leaves have
        one name, or `where` takes other arguments.

    Example:
      >>> import jax.numpy as jnp
      >>> list(choose(None, {"a": jnp.zeros((3, 3, 8, 8)), "b": jnp.zeros(8)}))
      ['a']
    """
    where = conv_kernels if where is None else where
    if not callable(where):
        raise ValueError(f"where: expected a predicate (name, leaf) -> bool, got {where!r}")
    try:
        inspect.signature(where).bind("", None)
    except TypeError as error:
        raise ValueError(
            "where: expected a predicate of two arguments, (name, leaf) -> bool, but it does not "
            f"take them: {error}"
        ) from None
    except ValueError:
        pass  # a builtin without a signature
    leaves = [(path_name(path), leaf) for path, leaf in jax.tree.leaves_with_path(params)]
    if not leaves:
        raise ValueError(f"{label}: expected a tree of arrays, got one without leaves")
    for name, leaf in leaves:
        if not hasattr(leaf, "dtype"):
            raise ValueError(
                f"{label}[{name!r}]: expected an array, got {leaf!r}; wrap it in jnp.asarray(...)"
            )
    chosen = {name: leaf for name, leaf in leaves if where(name, leaf)}
    if not chosen:
        largest = sorted(
            leaves, key=lambda named: -len(named[1].shape) // 2
        )  # matrices and kernels
        shapes = ", ".join(f"{name}{list(leaf.shape)}" for name, leaf in largest[:8])
        more = f" and {len(leaves) - 8} more" if len(leaves) > 8 else ""
        raise ValueError(
            f"where: no leaf of {label} was chosen, expected at least one of: {shapes}{more}; pass "
            "where=lambda name, leaf: ..., e.g. leaf.ndim == 2 for dense kernels"
        )
    for name, leaf in chosen.items():
        if not jnp.issubdtype(leaf.dtype, jnp.inexact):
            raise ValueError(
                f"{label}[{name!r}]: expected floats, got {leaf.dtype}; cast it, or exclude the "
                "leaf with `where`"
            )
    if len({name for name, _ in leaves}) != len(leaves):
        raise ValueError(
            f"{label}: two leaves have the same path name; rename one so that each has its own"
        )
    return chosen


def shapes(leaves: Mapping[str, Array]) -> dict[str, tuple[int, ...]]:
    """The shapes of named leaves.

    Args:
      leaves: name -> array.

    Returns:
      Name -> shape.

    Example:
      >>> import jax.numpy as jnp
      >>> shapes({"a": jnp.zeros((3, 3, 8, 8))})
      {'a': (3, 3, 8, 8)}
    """
    return {name: tuple(leaf.shape) for name, leaf in leaves.items()}


def match(
    name: str, other: PyTree, params: PyTree, is_leaf: Callable[[Any], bool] | None = None
) -> list[Any]:
    """The nodes of `other` at the leaves of `params`.

    Leaves of two trees belong together when their path names are equal, so the state of an
    `nnx.Optimizer` (its own kind of variable at each leaf) fits the params of the model, as they
    are or as plain dicts.

    Args:
      name: the argument's name, for the error.
      other: a tree with the structure of `params`; one node may stand for a whole subtree (as of
        masks read through multi_transform).
      params: any pytree.
      is_leaf: what counts as one node of `other`.

    Returns:
      One node for each leaf of `params`.

    Raises:
      ValueError: `other` has another structure.

    Example:
      >>> match("masks", {"a": 1}, {"a": 2})
      [1]
    """
    expected: Any = jax.tree.structure(params)
    if is_leaf is None and expected == jax.tree.structure(other):
        return jax.tree.leaves(other)
    names = [path_name(path) for path, _ in jax.tree.leaves_with_path(params)]
    flat = [
        (path_name(path), node) for path, node in jax.tree.leaves_with_path(other, is_leaf=is_leaf)
    ]
    nodes = dict(flat)
    # Where two leaves have one name, only the structure tells them apart.
    if len(set(names)) < len(names) or len(nodes) < len(flat):
        try:
            return expected.flatten_up_to(other)
        except (ValueError, TypeError) as error:
            raise ValueError(
                f"{name}: expected the tree structure of params; was it made from another model?"
            ) from error
    nearest = [_nearest(leaf, nodes) for leaf in names]
    # multi_transform marks what it hides
    hidden = {path_name(path) for path, _ in jax.tree.leaves_with_path(params, is_leaf=is_leaf)}
    missing = [leaf for leaf, node in zip(names, nearest) if node is None]
    extra = sorted(set(nodes) - set(nearest) - hidden)
    if missing or extra:
        differences = [
            f"{what} {some[0]!r}"
            for what, some in (("it lacks", missing), ("params lack", extra))
            if some
        ]
        raise ValueError(
            f"{name}: expected the tree structure of params, but {' and '.join(differences)}; was "
            f"it made from another model?"
        )
    return [nodes[node] for node in nearest if node is not None]


def _nearest(name: str, nodes: Mapping[str, Any]) -> str | None:
    """The name of the node at that leaf, or of the nearest one above it."""
    while name not in nodes and name:
        name = name.rpartition("/")[0]
    return name if name in nodes else None


def _plain(path: tuple[Any, ...]) -> tuple[Any, ...]:
    """A key path without the `.value` that ends nnx paths."""
    return path[:-1] if path and path[-1] == jax.tree_util.GetAttrKey("value") else path


def map_state(
    function: Callable[..., Any],
    params: PyTree,
    state: PyTree,
    *rest: PyTree,
    is_leaf: Callable[[Any], bool],
) -> PyTree:
    """Maps over the leaves of an optimizer state, with the parameter that each one belongs to.

    A state leaf belongs to a parameter when its key path ends with the parameter's: moments, traces
    and accumulators of any transformation do, whatever wraps it (chain, inject_hyperparams,
    MultiSteps, multi_transform); counts do not.

    Args:
      function: called as `function(name | None, leaf, *rest_leaves)`, name = the parameter's path
        name.
      params: any pytree.
      state: an optimizer state.
      *rest: states of the same structure.
      is_leaf: nodes of `state` to hand over whole, with name None.

    Returns:
      A state of the same structure.

    Example:
      >>> import optax, jax.numpy as jnp
      >>> params = {"w": jnp.ones(2)}
      >>> state = optax.trace(0.9).init(params)
      >>> map_state(lambda name, leaf: name, params, state, is_leaf=lambda x: False).trace
      {'w': 'w'}
    """
    parameters: Mapping[tuple[Any, ...], str] = {
        _plain(path): path_name(path) for path, _ in jax.tree.leaves_with_path(params)
    }
    lengths = sorted({len(path) for path in parameters}, reverse=True)

    def parameter_of(path: tuple[Any, ...]) -> str | None:
        tails = (path[len(path) - n :] for n in lengths)
        return next((parameters[tail] for tail in tails if tail in parameters), None)

    def call(path: tuple[Any, ...], leaf: Any, *others: Any) -> Any:
        name = None if is_leaf(leaf) else parameter_of(_plain(path))
        return function(name, leaf, *others)

    return jax.tree.map_with_path(call, state, *rest, is_leaf=is_leaf)


def replace(structure: PyTree, values: Mapping[str, Any], is_leaf: Callable[[Any], bool]) -> PyTree:
    """The tree with the named nodes replaced; the others stay.

    Args:
      structure: any pytree.
      values: path name -> new node.
      is_leaf: what counts as one node.

    Returns:
      A tree of the same structure.

    Example:
      >>> replace({"a": 1, "b": 2}, {"b": 3}, is_leaf=lambda node: False)
      {'a': 1, 'b': 3}
    """
    return jax.tree.map_with_path(
        lambda path, node: values.get(path_name(path), node), structure, is_leaf=is_leaf
    )
