"""Which channels stay: those that weights use, or those of the largest scores.

Each function returns what `remove_channels` takes as `kept`.
"""

from collections.abc import Collection, Mapping
from typing import Any

import jax
import numpy as np
from jaxtyping import Bool, Float, PyTree

from blocksparse_jax import _checks, tree
from blocksparse_jax.grouping.channel_spaces import Spaces, kernel_axes


def weights_of_channels(name: str, leaf: Any) -> bool:
    """The default choice of leaves that form channel groups: kernels that are not depthwise.

    Args:
      name: the leaf's path name.
      leaf: the parameter.

    Returns:
      Whether its input and output channels are groups.

    Example:
      >>> weights_of_channels("conv/kernel", np.ones((3, 3, 8, 8)))
      True
      >>> weights_of_channels("block1_depthwise/kernel", np.ones((3, 3, 1, 8)))
      False

    Reference: the layers that Lym et al., "PruneTrain", SC 2019 regularise.
    """
    return leaf.ndim >= 2 and "depthwise" not in name.lower()


def channels_above(
    spaces: Spaces, params: PyTree, threshold: float = 1e-4, *, where: tree.Where | None = None
) -> dict[str, Bool[np.ndarray, " c"]]:
    """The channels that some weight uses: PruneTrain's choice.

    A channel goes where `max |w| < threshold` over all kernels that make it and over all that read
    it. In a residual stream any of them keeps it, so removal changes what the network computes by
    no more than weights below the threshold do.

    Args:
      spaces: `{space: [(leaf name, axis), ...]}`, as in `fold_channel_orders`.
      params: the parameters, concrete.
      threshold: magnitude below which a weight counts as zero.
      where: predicate (name, leaf) of the kernels that count, default all but depthwise ones, whose
        names hold "depthwise".

    Returns:
      `{space: bool vector}`, True = stays; the channel with the largest weight of each space does
      in any case. A space without such kernels is left out.

    Raises:
      ValueError: a threshold below 0, or a space that does not fit the params.

    Example:
      >>> params = {"a": np.array([[1., 0., 2.]]), "b": np.array([[3.], [0.], [5.]])}
      >>> channels_above({"s": [("a", 1), ("b", 0)]}, params)["s"].tolist()
      [True, False, True]

    Reference: Lym et al., "PruneTrain", SC 2019, section 4.1.
    """
    _checks.number("threshold", threshold)
    largest = channel_maxima(spaces, params, where=where or weights_of_channels)
    return {
        space: (values >= threshold) | (np.arange(values.size) == values.argmax())
        for space, values in largest.items()
    }


def used_channels(
    spaces: Spaces,
    params: PyTree,
    *,
    vanishing: Collection[str] = (),
    where: tree.Where | None = None,
) -> dict[str, Bool[np.ndarray, " c"]]:
    """The channels that some weight makes and some weight reads: what masks have left.

    A weight makes its output channel out of its input channel. It counts where it is not zero and
    both its channels are used, so a channel that only unused ones read is unused itself. In a
    residual stream one kernel that makes a channel is enough, and one that reads it.

    Removing a channel that nothing reads leaves what the network computes as it is; with one that
    nothing makes, the shift of its norm goes.

    Args:
      spaces: `{space: [(leaf name, axis), ...]}`, as in `fold_channel_orders`.
      params: the parameters, concrete, pruned weights zero.
      vanishing: spaces inside of residual branches, which may lose all channels: a branch goes
        where one of its kernels is all zeros.
      where: predicate (name, leaf) of the kernels that count, default all but depthwise ones, whose
        names hold "depthwise".

    Returns:
      `{space: bool vector}`, True = stays; of other spaces without used channels the one with the
      largest weight. A space without such kernels is left out.

    Raises:
      ValueError: a space that does not fit the params, or a traced array.

    Example:
      >>> params = {"a": np.array([[1.0, 0.0, 2.0]]), "b": np.array([[0.0], [4.0], [5.0]])}
      >>> used_channels({"s": [("a", 1), ("b", 0)]}, params)["s"].tolist()
      [False, False, True]

    Reference: the channels that Wen et al., "Learning structured sparsity in deep neural networks",
    NIPS 2016 remove; our choice: channels whose readers are all removed go too.
    """
    ends = kernel_axes(spaces, params, where or weights_of_channels)
    leaves = {
        name: np.abs(weights.astype(np.float64))
        for name, weights in _concrete(params, ends).items()
    }
    kept = {
        space: np.ones(leaves[name].shape[axis], bool) for space, ((name, axis), *_) in ends.items()
    }
    changed = True
    while changed:
        changed = False
        for space, keeps in kept.items():
            sides = _strengths(ends[space], leaves)
            used = keeps & np.all([side > 0 for side in sides], axis=0)
            if not used.any() and space not in vanishing:
                best = np.where(keeps, np.sum(sides, axis=0), -1.0).argmax()
                used = np.arange(keeps.size) == best
            changed |= bool((used != keeps).any())
            kept[space] = used
            for name, axis in ends[space]:
                leaves[name][(slice(None),) * axis + (~used,)] = 0
    return kept


def _strengths(ends: list[tuple[str, int]], leaves: Mapping[str, np.ndarray]) -> list[np.ndarray]:
    """The largest weight of each channel among the kernels that make it, and that read it."""
    sides = dict[bool, np.ndarray]()
    for name, axis in ends:
        makes, largest = axis == leaves[name].ndim - 1, _largest(leaves[name], axis)
        sides[makes] = np.maximum(sides.get(makes, largest), largest)
    return list(sides.values())


def _largest(weights: np.ndarray, axis: int) -> np.ndarray:
    """The largest magnitude of each channel, 0 where there are no weights."""
    others = tuple(other for other in range(weights.ndim) if other != axis)
    return np.abs(weights).max(others, initial=0.0)


def _concrete(params: PyTree, ends: Mapping[str, list[tuple[str, int]]]) -> dict[str, np.ndarray]:
    """The values of the leaves that have an end, by name."""
    names = {name for entries in ends.values() for name, _ in entries}
    return {
        name: _checks.concrete(f"params[{name!r}]", leaf)
        for path, leaf in jax.tree.leaves_with_path(params)
        if (name := tree.path_name(path)) in names
    }


def channel_maxima(
    spaces: Spaces, params: PyTree, *, where: tree.Where
) -> dict[str, Float[np.ndarray, " c"]]:
    """The largest magnitude that belongs to each channel, over some leaves of its space.

    Args:
      spaces: `{space: [(leaf name, axis), ...]}`, as in `fold_channel_orders`.
      params: the parameters, concrete.
      where: predicate (name, leaf) of the leaves that count.

    Returns:
      `{space: float32 vector}`; a space without such leaves is left out.

    Raises:
      ValueError: a space that does not fit the params, or a traced array.

    Example:
      >>> params = {"norm": {"scale": np.array([-3., 1.])}, "kernel": np.ones((1, 2))}
      >>> spaces = {"s": [("norm/scale", 0), ("kernel", 1)]}
      >>> channel_maxima(spaces, params, where=lambda name, leaf: "scale" in name)["s"].tolist()
      [3.0, 1.0]
    """
    ends = kernel_axes(spaces, params, where)
    leaves = _concrete(params, ends)
    return {
        space: np.max([_largest(leaves[n], axis) for n, axis in entries], 0).astype(np.float32)
        for space, entries in ends.items()
    }


def largest_channels(
    scores: Mapping[str, Float[np.ndarray, " c"]], sparsity: float
) -> dict[str, Bool[np.ndarray, " c"]]:
    """The channels of the largest scores, ranked over all spaces together.

    Args:
      scores: `{space: vector}`, higher = keep, comparable between spaces.
      sparsity: fraction of all channels to remove, in [0, 1).

    Returns:
      `{space: bool vector}` that removes `round(sparsity * channels)` in all, or fewer where a
      space would lose its last one: the best of each space stays. Of equal scores the later channel
      goes first.

    Raises:
      ValueError: a sparsity out of range, no space, or scores that are no finite vectors.

    Example:
      >>> scores = {"a": np.array([5.0, 1.0, 3.0]), "b": np.array([0.1, 0.2, 0.3])}
      >>> {space: kept.tolist() for space, kept in largest_channels(scores, 0.5).items()}
      {'a': [True, False, True], 'b': [False, False, True]}

    Reference: the global threshold of Liu et al., "Network slimming", ICCV 2017. That one channel
    of each layer stays is our choice.
    """
    _checks.fraction("sparsity", sparsity)
    if not scores:
        raise ValueError("scores: expected a vector of each channel space, got none")
    vectors = {space: _checks.concrete(f"scores[{space!r}]", v) for space, v in scores.items()}
    for space, values in vectors.items():
        if values.ndim != 1 or not values.size or not np.isfinite(values).all():
            raise ValueError(
                f"scores[{space!r}]: expected a vector of finite values, one for each channel, got "
                f"{values.dtype}{list(values.shape)}"
            )
    ranked = np.concatenate(
        [np.where(np.arange(v.size) == v.argmax(), np.inf, v) for v in vectors.values()]
    )
    gone = min(round(sparsity * ranked.size), ranked.size - len(vectors))
    kept = np.ones(ranked.size, bool)
    kept[np.lexsort((-np.arange(ranked.size), ranked))[:gone]] = False
    ends = np.cumsum([v.size for v in vectors.values()])
    return dict(zip(vectors, np.split(kept, ends[:-1]), strict=True))
