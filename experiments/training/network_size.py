"""How large the network of a run is beside the one that its training began with.

The two differ where a method removes channels. Shapes are trees of `jax.ShapeDtypeStruct`.
"""

import math
from collections.abc import Collection, Mapping
from typing import Any

import jax
import jax.numpy as jnp

import blocksparse_jax as bsj
from blocksparse_jax import tree


def parameters(shapes: Any) -> int:
    """How many weights there are."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes))


def density(masks: Any, shapes: Any, original: Any, sparse: Collection[str] = ()) -> float:
    """The kept fraction of the sparse layers' weights; removed channels are not kept.

    Args:
      masks: a tree of the network's masks, the scalar True where dense.
      shapes: of the network's parameters.
      original: those that training began with.
      sparse: names of the layers that masks prune, those whose channels are all gone too; where
        there are none, those that methods prune by default count.
    """
    sizes = {name: math.prod(leaf.shape) for name, leaf in _named(shapes).items()}
    kept = {
        name: int(mask.sum()) if jnp.ndim(mask) else sizes[name]
        for name, mask in _named(masks).items()
    }
    return kept_fraction(kept, original, sparse)


def kept_fraction(kept: Mapping[str, int], original: Any, sparse: Collection[str]) -> float:
    """The kept fraction of the sparse layers' weights, from counts.

    Args:
      kept: layer name -> weights that are left of it; none of a layer that is not there.
      original: shapes of the parameters that training began with.
      sparse: names of the layers that masks prune; where there are none, those that methods prune
        by default count.
    """
    sparse = sparse or tree.choose(None, original)
    sizes = _named(original)
    of = sum(math.prod(sizes[name].shape) for name in sparse)
    return sum(kept.get(name, 0) for name in sparse) / of


def kept_flops(masks: Any, params: Any, original: Any, positions: Mapping[str, int]) -> float:
    """The fraction of the original network's multiplications that are left.

    Args:
      masks: a tree of the network's masks.
      params: its parameters, dense.
      original: shapes of those that training began with.
      positions: layer name -> how often each of its weights is used for one image.

    Returns:
      `bsj.metrics.kept_flops` of the masks, times what the network without masks has of the
      original.
    """
    left, of = (
        sum(math.prod(_named(one)[name].shape) * n for name, n in positions.items())
        for one in (params, original)
    )
    return bsj.metrics.kept_flops(masks, params, positions) * (left / of)


def _named(shapes: Any) -> dict[str, Any]:
    return {tree.path_name(path): leaf for path, leaf in jax.tree.leaves_with_path(shapes)}
