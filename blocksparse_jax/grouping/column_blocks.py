"""Blocks of arbitrary columns (Rumi et al., DSB), the baselines of HRBP, and their fill.

A convolution runs as `Y = W X` with `W` of shape `[cout, cin * kh * kw]`, and its input gradient as
`dX = W' dY` with `W'` of shape `[cin, cout * kh * kw]`. A block of rows and arbitrary columns of
`W` is dense forward and shattered in `W'`. On the host, in NumPy.
"""

import dataclasses
import math
from collections.abc import Iterable

import numpy as np
from jaxtyping import Array, Bool, Float

from blocksparse_jax import _checks
from blocksparse_jax.layout import BlockLayout


@dataclasses.dataclass(frozen=True, eq=False)
class ColumnBlocks:
    """Dense blocks of the forward matrix `W[cout, cin * kh * kw]`.

    Attributes:
      shape: `(kh, kw, cin, cout)` of the conv kernel.
      blocks: pairs `(rows, columns)` of ascending int arrays: filters, and columns `channel * kh *
        kw + y * kw + x`.

    Example:
      >>> blocks = ((np.array([0, 2]), np.array([1])),)
      >>> ColumnBlocks((1, 1, 3, 4), blocks).mask()[0, 0].astype(int).tolist()
      [[0, 0, 0, 0], [1, 0, 1, 0], [0, 0, 0, 0]]

    Reference: the blocks of Rumi et al., "Accelerating sparse CNN inference on GPUs with
    performance-aware weight pruning", 2020.
    """

    shape: tuple[int, int, int, int]
    blocks: tuple[tuple[np.ndarray, np.ndarray], ...]

    def mask(self) -> Bool[np.ndarray, "kh kw cin cout"]:
        """The union of the blocks: bool `[kh, kw, cin, cout]`, True = kept."""
        kh, kw, cin, cout = self.shape
        forward = np.zeros((cout, cin * kh * kw), bool)
        for rows, columns in self.blocks:
            forward[np.ix_(rows, columns)] = True
        return forward.reshape(cout, cin, kh, kw).transpose(2, 3, 1, 0)


def rumi_groups(
    mask: Bool[Array | np.ndarray, "kh kw cin cout"],
    *,
    clusters: int = 8,
    min_rows: int = 17,
    max_rows: int = 32,
    t1: float = 1.5,
) -> ColumnBlocks:
    """Regroups an unstructured mask into dense blocks of filters x columns.

    Empty rows and columns go; the rows are clustered; clusters of fewer than `min_rows` are
    dropped; each cluster takes its non-empty columns in order of non-zeros while
    `i <= t1 * remaining` for some row: `i` columns taken, `remaining` the row's non-zeros. Of a
    cluster of n rows, more than `max_rows`, the first `max_rows * floor(n / max_rows)` form one
    block, and the rest another of the same columns. The mask is the union of the blocks.

    Args:
      mask: bool `[kh, kw, cin, cout]`, concrete.
      clusters: how many clusters of rows.
      min_rows: smallest cluster that is kept.
      max_rows: blocks of larger clusters have a multiple of this many rows, and one has the rest.
      t1: columns taken per non-zero of the fullest row, at most.

    Returns:
      The blocks; none when every cluster is too small: then the authors keep the mask as it is,
      `blocks.mask() if blocks.blocks else mask`.

    Raises:
      ValueError: the mask is traced, not bool or of the wrong rank, or a number is out of range.

    Example:
      >>> mask = np.zeros((1, 1, 4, 40), bool)
      >>> mask[0, 0, 1, ::2] = mask[0, 0, 2, 1::2] = True
      >>> blocks = rumi_groups(mask, clusters=2).blocks
      >>> [(len(rows), rows[:3].tolist(), columns.tolist()) for rows, columns in blocks]
      [(20, [0, 2, 4], [1]), (20, [1, 3, 5], [2])]

    Reference: Rumi et al., "Accelerating sparse CNN inference on GPUs with performance-aware weight
    pruning", 2020, in the variant of its public re-implementation. Our choice: complete-linkage
    clusters by Jaccard distance instead of a hypergraph partition; `remaining` read as above.
    """
    kept = _checks.concrete("mask", mask)
    shape = _checks.kernel_shape("mask.shape", kept.shape)
    _checks.boolean("mask", kept.dtype)
    _checks.positive_int("clusters", clusters)
    _checks.positive_int("min_rows", min_rows)
    _checks.positive_int("max_rows", max_rows)
    if not t1 > 0:
        raise ValueError(f"t1: expected a positive number, got {t1!r}")
    forward = _forward(kept)
    rows = np.flatnonzero(forward.any(1))
    dense = forward[rows].astype(np.float32)
    shared, counts = dense @ dense.T, dense.sum(1)
    distance = 1 - shared / np.maximum(counts[:, None] + counts - shared, 1)
    blocks: list[tuple[np.ndarray, np.ndarray]] = []
    for cluster in _complete_linkage(distance, clusters):
        members = np.sort(rows[cluster])
        if len(members) < min_rows:
            continue
        block = forward[members]
        taken = min(int(t1 * block.sum(1).max()), int(block.any(0).sum()))
        columns = np.sort(np.argsort(-block.sum(0), kind="stable")[:taken])
        whole = len(members) // max_rows * max_rows or len(members)
        parts = (members[:whole], members[whole:])
        blocks.extend((part, columns) for part in parts if len(part))
    return ColumnBlocks(shape, tuple(blocks))


def dsb_groups(
    weights: Float[Array | np.ndarray, "kh kw cin cout"], *, sparsity: float, block: int = 16
) -> ColumnBlocks:
    """Shuffles rows and columns into `block x block` squares and keeps the heaviest.

    The largest `1 - sparsity` of `|w|` are the layer's unstructured mask `m0`. The filters are
    clustered by `1 - cosine` of their rows of `m0` (0 or 1) into `cout // block` clusters, which
    are listed by size and cut into groups of `block`. A group's columns, by descending L2 norm of
    `|w| * m0`, are cut into runs of `block`; the `ceil((1 - sparsity) * size / block^2)` squares
    whose column norms have the largest sum in the layer stay.

    Args:
      weights: `[kh, kw, cin, cout]`, weights or scores, concrete.
      sparsity: fraction removed, in [0, 1).
      block: side of a square; the last rows and columns make smaller blocks where it does not
        divide.

    Returns:
      The kept squares, by group of rows.

    Raises:
      ValueError: the weights are traced or of the wrong rank, or a number is out of range.

    Example:
      >>> weights = np.ones((1, 1, 8, 8))
      >>> weights[0, 0, 1::2, ::2] = weights[0, 0, ::2, 1::2] = 3
      >>> blocks = dsb_groups(weights, sparsity=0.5, block=4)
      >>> [(rows.tolist(), columns.tolist()) for rows, columns in blocks.blocks]
      [([0, 2, 4, 6], [1, 3, 5, 7]), ([1, 3, 5, 7], [0, 2, 4, 6])]

    Reference: "Shuffled block sparsity" (DSB), 2022, and its authors' code. Our choice: clusters
    are complete-linkage ones, the smallest first; ties go to the lower index.
    """
    dense = _checks.concrete("weights", weights)
    shape = _checks.kernel_shape("weights.shape", dense.shape)
    density = 1 - _checks.fraction("sparsity", sparsity)
    block = _checks.positive_int("block", block)
    magnitude = np.abs(_forward(dense).astype(np.float64))
    kept = max(1, round(density * magnitude.size))
    mask = np.zeros(magnitude.size, bool)
    mask[np.argsort(-magnitude, axis=None, kind="stable")[:kept]] = True
    magnitude = np.where(mask.reshape(magnitude.shape), magnitude, 0)

    binary = mask.reshape(magnitude.shape).astype(np.float64)
    shared, counts = binary @ binary.T, binary.sum(1)
    distance = 1 - shared / np.sqrt(np.maximum(np.outer(counts, counts), 1))
    clusters = _complete_linkage(distance, max(1, len(binary) // block))
    order = np.concatenate(sorted(map(np.sort, clusters), key=len))
    squares, scores = [], []
    for start in range(0, len(order), block):
        rows = np.sort(order[start : start + block])
        norms = np.linalg.norm(magnitude[rows], axis=0)
        columns = np.argsort(-norms, kind="stable")
        for at in range(0, len(columns), block):
            squares.append((rows, np.sort(columns[at : at + block])))
            scores.append(norms[columns[at : at + block]].sum())
    best = np.argsort(-np.array(scores), kind="stable")[
        : math.ceil(density * magnitude.size / block**2 - 1e-9)
    ]
    return ColumnBlocks(shape, tuple(squares[i] for i in np.sort(best)))


def block_fill(blocks: ColumnBlocks | BlockLayout) -> tuple[float, float]:
    """How densely the blocks sit in the matrices of the forward pass and of the input gradient.

    Each block's kept weights over its bounding rectangle (touched rows x touched columns), summed
    over the blocks: `sum_b kept_b / sum_b rows_b * columns_b`, in `W[cout, cin * kh * kw]` and in
    `W'[cin, cout * kh * kw]`.

    Args:
      blocks: column blocks, or a layout (one block a group), concrete.

    Returns:
      `(forward, backward)`, each in (0, 1]; 1 = dense blocks.

    Raises:
      ValueError: there are no blocks.

    Example:
      >>> filters, channels, taps = ([[0, 2], [1, 3]], [[0], [2]], [[4], [0]])
      >>> arrays = map(np.array, (filters, channels, taps))
      >>> block_fill(BlockLayout(*arrays, shape=(3, 3, 4, 4)))
      (1.0, 1.0)
      >>> block_fill(ColumnBlocks((3, 3, 4, 4), ((np.array([0, 2]), np.array([4, 18])),)))
      (1.0, 0.5)

    Reference: the argument of Ma et al., "HRBP", CPAL 2024, as a number.
    """
    positions = blocks.shape[0] * blocks.shape[1]
    kept, area = np.zeros(2), np.zeros(2)
    for rows, columns in _rows_and_columns(blocks):
        channels, place = np.unique(columns // positions, return_inverse=True)
        block = np.zeros((len(rows), len(channels), positions), bool)
        block[:, place, columns % positions] = True
        for i, matrix in enumerate(
            (block.reshape(len(rows), -1), block.transpose(1, 0, 2).reshape(len(channels), -1))
        ):
            kept[i] += matrix.sum()
            area[i] += matrix.any(1).sum() * matrix.any(0).sum()
    if not area.all():
        raise ValueError(
            f"blocks: a pattern of shape {blocks.shape} without blocks has no fill; keep at least "
            f"one block"
        )
    forward, backward = (kept / area).tolist()
    return forward, backward


def _rows_and_columns(
    blocks: ColumnBlocks | BlockLayout,
) -> Iterable[tuple[np.ndarray, np.ndarray]]:
    if isinstance(blocks, ColumnBlocks):
        return blocks.blocks
    filters, channels, taps = (
        _checks.concrete(f"blocks.{name}", getattr(blocks, name))
        for name in ("filters", "channels", "taps")
    )
    columns = channels[:, :, None] * (blocks.shape[0] * blocks.shape[1]) + taps[:, None]
    return zip(filters, columns.reshape(len(filters), -1))


def _forward(kernel: np.ndarray) -> np.ndarray:
    """`[kh, kw, cin, cout]` as the matrix `[cout, cin * kh * kw]`."""
    return kernel.transpose(3, 2, 0, 1).reshape(kernel.shape[3], -1)


def _complete_linkage(distance: np.ndarray, clusters: int) -> list[np.ndarray]:
    """Merges the closest pair of clusters until `clusters` remain.

    Clusters are as far apart as their farthest members; the lower index wins a tie. Each cluster
    lists its members in the order of its tree; clusters come by the place of their tree's first
    leaf.
    """
    if len(distance) <= clusters:
        return [np.array([i]) for i in range(len(distance))]
    distance = distance.copy()
    np.fill_diagonal(distance, np.inf)
    members = {i: [i] for i in range(len(distance))}
    nearest, near = distance.argmin(1), distance.min(1)
    while len(members) > clusters:
        first = int(near.argmin())
        first, second = sorted((first, int(nearest[first])))
        members[first] += members.pop(second)
        distance[first] = distance[:, first] = np.maximum(distance[first], distance[second])
        distance[second] = distance[:, second] = np.inf
        near[second] = np.inf
        stale = [i for i in members if i == first or nearest[i] in (first, second)]
        nearest[stale], near[stale] = distance[stale].argmin(1), distance[stale].min(1)
    return [np.array(members[i]) for i in sorted(members)]
