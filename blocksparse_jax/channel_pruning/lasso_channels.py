"""Channels that survive a lasso over their contributions, and readers fitted anew."""

from collections.abc import Mapping

import numpy as np
from jaxtyping import Array, Bool, PyTree

from blocksparse_jax.channel_pruning.inputs import LayerInput, Problem
from blocksparse_jax.channel_pruning.reconstruction import Reconstruction, reconstruct
from blocksparse_jax.channel_pruning.spaces import Counts
from blocksparse_jax.grouping.channel_spaces import Spaces

_PENALTIES = 100  # of the path, from the one that removes all channels to a thousandth of it


def lasso_channels(
    params: PyTree,
    spaces: Spaces,
    counts: Counts,
    inputs: Mapping[str, LayerInput],
    *,
    originals: Mapping[str, LayerInput] | None = None,
    samples: int = 1000,
    key: Array | None = None,
) -> Reconstruction:
    """Keeps the channels that a growing L1 penalty removes last, and fits the readers to them.

    With `z_c` the contribution of channel c to the outputs `y` of all layers that read the space,
    at sampled positions: minimises `|y - sum_c b_c z_c|^2 / 2 + penalty * |b|_1` for growing
    penalties until no more than the wanted channels have `b_c != 0`. Then every reader gets the
    weights, all taps of the kept channels, whose outputs come closest to `y`.

    Args:
      params: the parameters of a trained network.
      spaces: as in `thinet`.
      counts: as in `thinet`.
      inputs: as in `thinet`.
      originals: as in `thinet`.
      samples: as in `thinet`. Where they are fewer than the weights of a filter, of all exact
        solutions the one nearest to the old weights is taken.
      key: as in `thinet`.

    Returns:
      The kept channels, and parameters of the same shapes with fitted readers.

    Raises:
      ValueError: spaces, counts or inputs that do not fit the params.
      ImportError: scikit-learn, which solves the lasso, is not installed.

    Example:
      >>> import jax.numpy as jnp
      >>> params = {"a": jnp.ones((1, 3)), "b": jnp.array([[1.0], [0.1], [1.0]])}
      >>> x = LayerInput(jnp.array([[1.0, 1.0, 0.0], [2.0, 0.0, 1.0], [0.0, 1.0, 1.0]]))
      >>> result = lasso_channels(params, {"s": [("a", 1), ("b", 0)]}, {"s": 2}, {"b": x})
      >>> result.kept["s"].tolist()
      [True, False, True]

    Reference: He et al., "Channel pruning for accelerating very deep neural networks", ICCV 2017,
    equations 2 to 4. Our choice: a path of 100 penalties; of channels that one step of it removes
    together, those of the largest factors before it come back; one choice for all layers that read
    a residual stream.
    """
    return reconstruct(
        _last_of_path, _fitted, params, spaces, counts, inputs, originals, samples, key
    )


def _last_of_path(gram: np.ndarray, with_targets: np.ndarray, count: int) -> Bool[np.ndarray, " c"]:
    """The `count` channels that survive the largest penalties."""
    try:
        from sklearn.linear_model import lasso_path
    except ImportError as error:
        raise ImportError(
            "lasso_channels solves its lasso with scikit-learn: pip install scikit-learn"
        ) from error
    # any matrix with these inner products has the same lasso: the smallest one
    values, vectors = np.linalg.eigh(gram)
    roots = np.sqrt(np.maximum(values, 0))
    solid = roots > 1e-7 * max(roots.max(), np.finfo(float).tiny)
    design = roots[solid, None] * vectors[:, solid].T
    target = (vectors[:, solid].T @ with_targets) / roots[solid]
    survivors = np.zeros((len(gram), 0))
    largest = np.abs(design.T @ target).max(initial=0) / max(1, len(target))
    if largest > 0:
        penalties = largest * np.logspace(0, -3, _PENALTIES)
        survivors = np.abs(lasso_path(design, target, alphas=penalties, max_iter=10_000)[1])
    order: list[int] = []
    for column in survivors.T:  # from the largest penalty down
        alive = np.flatnonzero(column)
        if len(alive) > count:
            order += alive[np.argsort(-column[alive], kind="stable")].tolist()
            break
        order = alive.tolist()
    order += np.argsort(-np.diag(gram), kind="stable").tolist()  # where the whole path has too few
    kept = np.zeros(len(gram), bool)
    kept[list(dict.fromkeys(order))[:count]] = True
    return kept


def _fitted(one: Problem, kept: Bool[np.ndarray, " c"]) -> np.ndarray:
    """The least-squares kernel of the kept channels, nearest to the old one where it is free."""
    rows = one.patches[:, :, kept].reshape(len(one.patches), -1)
    old = one.kernel[:, kept]
    flat = old.reshape(rows.shape[1], -1)
    return (flat + np.linalg.lstsq(rows, one.targets - rows @ flat)[0]).reshape(old.shape)
