"""ThiNet: channels whose removal changes the next layer's output least, and rescaled survivors."""

from collections.abc import Mapping

import numpy as np
from jaxtyping import Array, Bool, PyTree

from blocksparse_jax.channel_pruning.inputs import LayerInput, Problem
from blocksparse_jax.channel_pruning.reconstruction import Reconstruction, reconstruct
from blocksparse_jax.channel_pruning.spaces import Counts
from blocksparse_jax.grouping.channel_spaces import Spaces


def thinet(
    params: PyTree,
    spaces: Spaces,
    counts: Counts,
    inputs: Mapping[str, LayerInput],
    *,
    originals: Mapping[str, LayerInput] | None = None,
    samples: int = 1000,
    key: Array | None = None,
) -> Reconstruction:
    """Removes one channel after the other, each time the one that the next layer misses least.

    With `z_c` the contribution of channel c to the outputs `y` of all layers that read the space,
    at sampled positions: adds to the removed set T the channel that leaves the smallest
    `|y - sum_(c not in T) z_c|^2`. Then every reader scales the weights of each kept channel by a
    factor of its own, those that minimise `|y - sum_c s_c z_c|^2`.

    Args:
      params: the parameters of a trained network.
      spaces: `{space: [(leaf name, axis), ...]}`, as in `fold_channel_orders`.
      counts: `{space: channels to keep}`, as from `channel_counts`; spaces left out keep all.
      inputs: `{kernel name: LayerInput}` of the readers of these spaces, over some images, as from
        `linen.capture_inputs`.
      originals: their inputs before anything was pruned, where the network is pruned space by
        space; they make the outputs to reconstruct. None is `inputs`.
      samples: positions over all images that every reader draws; all where there are fewer.
      key: JAX random key of the positions; None is `jax.random.key(0)`.

    Returns:
      The kept channels, and parameters of the same shapes with rescaled readers.

    Raises:
      ValueError: spaces, counts or inputs that do not fit the params.

    Example:
      >>> import jax.numpy as jnp
      >>> params = {"a": jnp.ones((1, 3)), "b": jnp.array([[1.0], [0.1], [1.0]])}
      >>> x = LayerInput(jnp.array([[1.0, 1.0, 0.0], [2.0, 0.0, 1.0]]))
      >>> result = thinet(params, {"s": [("a", 1), ("b", 0)]}, {"s": 2}, {"b": x})
      >>> result.kept["s"].tolist()
      [True, False, True]

    Reference: Luo et al., "ThiNet", ICCV 2017, algorithm 1 and equation 7. All filters at each
    sampled position, where the paper draws one, one choice for all layers that read a residual
    stream, and the higher number removed of equal channels are our choice.
    """
    return reconstruct(_greedy, _rescaled, params, spaces, counts, inputs, originals, samples, key)


def _greedy(gram: np.ndarray, with_targets: np.ndarray, count: int) -> Bool[np.ndarray, " c"]:
    """The channels that stay when the others went one by one."""
    kept = np.ones(len(gram), bool)
    # |r + sum over T of z|^2 grows by 2 <r + sum over T of z, z_c> + |z_c|^2 when c joins T
    inner = with_targets - gram.sum(1)
    for _ in range(len(gram) - count):
        growth = np.where(kept, 2 * inner + np.diag(gram), np.inf)
        last = len(growth) - 1 - int(np.argmin(growth[::-1]))
        kept[last] = False
        inner = inner + gram[:, last]
    return kept


def _rescaled(one: Problem, kept: Bool[np.ndarray, " c"]) -> np.ndarray:
    """The kernel of the kept channels, each times its factor."""
    gram, with_targets = one.normal_equations()
    gram, with_targets = gram[np.ix_(kept, kept)], with_targets[kept]
    # from 1 on: a channel without any contribution keeps its weights
    factors = 1 + np.linalg.lstsq(gram, with_targets - gram.sum(1))[0]
    return one.kernel[:, kept] * factors[:, None]
