"""Keeping the channels that let the next layers give what they gave, and mending these layers."""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, PyTree

from blocksparse_jax import _checks, tree
from blocksparse_jax.channel_pruning.inputs import LayerInput, Problem, problem
from blocksparse_jax.channel_pruning.spaces import (
    Counts,
    check_counts,
    kernel_shapes,
    readers,
    space_sizes,
)
from blocksparse_jax.grouping.channel_spaces import Spaces

Choose = Callable[[np.ndarray, np.ndarray, int], Bool[np.ndarray, " c"]]
"""Inner products of contributions, those with the targets, and a count -> kept channels."""
Fit = Callable[[Problem, Bool[np.ndarray, " c"]], np.ndarray]
"""A layer's problem and its kept channels -> its new kernel `[taps, kept, cout]`."""


class Reconstruction(NamedTuple):
    """Kept channels, and the parameters whose layers make do with them.

    Attributes:
      kept: `{space: bool vector of its channels}`, True = kept.
      params: of the same shapes; the kernels that read a space have new weights for its kept
        channels and zeros for the removed ones. Filters and norms of removed channels are as they
        were: `channel_masks` or `remove_channels` take them away.

    Example:
      >>> result = Reconstruction({"stem": np.array([True, False])}, {})
      >>> int(result.kept["stem"].sum())
      1
    """

    kept: dict[str, Bool[np.ndarray, " c"]]
    params: PyTree


def reconstruct(
    choose: Choose,
    fit: Fit,
    params: PyTree,
    spaces: Spaces,
    counts: Counts,
    inputs: Mapping[str, LayerInput],
    originals: Mapping[str, LayerInput] | None,
    samples: int,
    key: Array | None,
) -> Reconstruction:
    """Chooses the channels of every space for all its readers together, and fits each reader.

    Args:
      choose: the rule.
      fit: what mends a reader.
      params: of the trained network.
      spaces: as in `channel_counts`.
      counts: `{space: channels to keep}`.
      inputs: `{kernel name: what the layer reads}`.
      originals: likewise, before anything was pruned; None is `inputs`.
      samples: positions that each reader draws.
      key: JAX random key of the positions.

    Returns:
      Kept channels and new parameters.

    Raises:
      ValueError: arguments that do not fit each other.
    """
    shapes = kernel_shapes(params, spaces)
    counts = check_counts(counts, space_sizes(shapes, spaces))
    _checks.positive_int("samples", samples)
    seed = np.asarray(jax.random.key_data(_checks.random_key("key", key))).ravel().tolist()
    weights = {tree.path_name(path): leaf for path, leaf in jax.tree.leaves_with_path(params)}
    kept, fitted = {}, {}
    for space, count in counts.items():
        names = readers(shapes, spaces, space)
        _check_inputs(space, names, inputs, originals)
        problems = {
            name: problem(
                name,
                weights[name],
                inputs[name],
                samples,
                seed,
                None if originals is None else originals[name],
            )
            for name in names
        }
        equations = [one.normal_equations() for one in problems.values()]
        gram, with_targets = (np.sum(parts, axis=0) for parts in zip(*equations, strict=True))
        kept[space] = choose(gram, with_targets, count)
        for name, one in problems.items():
            kernel = np.zeros_like(one.kernel)
            kernel[:, kept[space]] = fit(one, kept[space])
            fitted[name] = jnp.asarray(kernel.reshape(shapes[name]), weights[name].dtype)
    new = jax.tree.map_with_path(lambda path, leaf: fitted.get(tree.path_name(path), leaf), params)
    return Reconstruction(kept, new)


def _check_inputs(
    space: str,
    names: list[str],
    inputs: Mapping[str, LayerInput],
    originals: Mapping[str, LayerInput] | None,
) -> None:
    """ValueError unless every reader of a space has its input."""
    if not names:
        raise ValueError(
            f"spaces[{space!r}]: no kernel reads it, so nothing can be reconstructed; leave it out "
            "of counts"
        )
    for label, given in (("inputs", inputs), ("originals", originals)):
        for name in names:
            if given is not None and not isinstance(given.get(name), LayerInput):
                raise ValueError(
                    f"{label}: expected a LayerInput for {name!r}, which reads space {space!r}, "
                    f"got names {sorted(given)[:8]}; linen.capture_inputs records them"
                )
