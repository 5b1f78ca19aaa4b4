"""Layers that are alike share one program: compilation is most of what a first call costs."""

from collections.abc import Callable, Hashable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import PyTree


def map_alike(
    function: Callable[[Any, Any], PyTree],
    layers: Mapping[str, PyTree],
    static: Mapping[str, Hashable],
) -> dict[str, Any]:
    """Maps over layers inside a program; a loop does those of one shape, so it holds them once.

    Args:
      function: called as `function(layer, static)`.
      layers: name -> arrays of a layer.
      static: name -> what is fixed about it, e.g. the counts that become shapes.

    Returns:
      Name -> what the function returned, in the order of `layers`.

    Example:
      >>> layers = {"a": jnp.ones(2), "b": jnp.zeros(2), "c": jnp.ones(3)}
      >>> results = map_alike(lambda layer, by: by * layer.sum(), layers, dict.fromkeys(layers, 2))
      >>> {name: float(result) for name, result in results.items()}
      {'a': 4.0, 'b': 0.0, 'c': 6.0}
    """
    groups: dict[Hashable, list[str]] = {}
    for name, layer in layers.items():
        arrays, structure = jax.tree.flatten(layer)
        key = (structure, *map(jax.typeof, arrays), static[name])
        groups.setdefault(key, []).append(name)
    results = {}
    for names in groups.values():
        fixed = static[names[0]]
        if len(names) == 1:
            results[names[0]] = function(layers[names[0]], fixed)
            continue
        stacked = jax.tree.map(lambda *arrays: jnp.stack(arrays), *(layers[n] for n in names))
        mapped = jax.lax.map(lambda layer, fixed=fixed: function(layer, fixed), stacked)
        for place, name in enumerate(names):
            results[name] = jax.tree.map(lambda array, place=place: array[place], mapped)
    return {name: results[name] for name in layers}


def flat(layers: Mapping[str, PyTree]) -> dict[str, Any]:
    """The layers with their arrays as vectors, so that those of one size are alike too.

    Stacked kernels, and arrays that are sharded over explicit axes, stay as they are.

    Args:
      layers: name -> arrays of a layer.

    Returns:
      Name -> the arrays in C order.

    Example:
      >>> {name: array.shape for name, array in flat({"a": jnp.ones((2, 3))}).items()}
      {'a': (6,)}
    """

    def vector(array: jax.Array) -> jax.Array:
        is_sharded = any(jax.typeof(array).sharding.spec)
        return array if is_sharded or not 1 < array.ndim <= 4 else array.reshape(-1)

    return jax.tree.map(vector, dict(layers))
