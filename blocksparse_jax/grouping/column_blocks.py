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
    min_rows: int = 16,
    max_rows: int = 32,
    t1: float = 1.5,
) -> ColumnBlocks:
    """Regroups an unstructured mask into dense blocks of filters x columns.

    Empty rows and columns go; the rows are clustered; clusters of more than `max_rows` are split
    evenly and those of fewer than `min_rows` dropped; each cluster takes its non-empty columns in
    order of non-zeros while `i <= t1 * remaining` for some row: `i` columns taken, `remaining` the
    row's non-zeros. The mask is the union of the blocks.

    Args:
      mask: bool `[kh, kw, cin, cout]`, concrete.
      min_rows: smallest cluster that is kept.
      max_rows: largest cluster that is not split.
      t1: columns taken per non-zero of the fullest row, at most.

    Returns:
      The blocks; none when every cluster is too small.

    Raises:
      ValueError: the mask is traced, not bool or of the wrong rank, or a number is out of range.

    Example:
      >>> mask = np.zeros((1, 1, 4, 32), bool)
      >>> mask[0, 0, 1, ::2] = mask[0, 0, 2, 1::2] = True
      >>> blocks = rumi_groups(mask, max_rows=16).blocks
      >>> [(rows[:3].tolist(), columns.tolist()) for rows, columns in blocks]
      [([0, 2, 4], [1]), ([1, 3, 5], [2])]

    Reference: Rumi et al., "Accelerating sparse CNN inference on GPUs with performance-aware weight
    pruning", 2020, in the variant of its public re-implementation. Our choice: complete-linkage
    clusters by Jaccard distance, as few as fit `max_rows`, instead of a hypergraph partition;
    `remaining` read as above.
    """
    kept = _checks.concrete("mask", mask)
    shape = _checks.kernel_shape("mask.shape", kept.shape)
    _checks.boolean("mask", kept.dtype)
    if _checks.positive_int("min_rows", min_rows) > _checks.positive_int("max_rows", max_rows):
        raise ValueError(f"min_rows: expected at most max_rows={max_rows}, got {min_rows}")
    if not t1 > 0:
        raise ValueError(f"t1: expected a positive number, got {t1!r}")
    forward = _forward(kept)
    rows = np.flatnonzero(forward.any(1))
    dense = forward[rows].astype(np.float32)
    shared, counts = dense @ dense.T, dense.sum(1)
    distance = 1 - shared / np.maximum(counts[:, None] + counts - shared, 1)
    blocks = []
    for cluster in _complete_linkage(distance, math.ceil(len(rows) / max_rows)):
        for members in np.array_split(rows[cluster], math.ceil(len(cluster) / max_rows)):
            if len(members) >= min_rows:
                block = forward[members]
                taken = min(int(t1 * block.sum(1).max()), int(block.any(0).sum()))
                columns = np.argsort(-block.sum(0), kind="stable")[:taken]
                blocks.append((np.sort(members), np.sort(columns)))
    return ColumnBlocks(shape, tuple(blocks))


def dsb_groups(
    weights: Float[Array | np.ndarray, "kh kw cin cout"], *, sparsity: float, block: int = 16
) -> ColumnBlocks:
    """Shuffles rows and columns into `block x block` squares and keeps the heaviest.

    Rows are clustered by `1 - cosine` and cut into groups of `block`; a group's columns, by
    descending L2 norm, are cut into runs of `block`; the `ceil((1 - sparsity) * size / block^2)`
    squares of largest L2 norm in the layer stay.

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
      >>> blocks = dsb_groups(np.arange(64.0).reshape(1, 1, 8, 8), sparsity=0.75, block=4)
      >>> [(rows.tolist(), columns.tolist()) for rows, columns in blocks.blocks]
      [([4, 5, 6, 7], [4, 5, 6, 7])]
      >>> float(blocks.mask().mean())
      0.25

    Reference: "Shuffled block sparsity" (DSB), 2022. Our choice: groups of exactly `block` are cut
    from the order in which the complete-linkage tree lists the rows; ties go to the lower index.
    """
    dense = _checks.concrete("weights", weights)
    shape = _checks.kernel_shape("weights.shape", dense.shape)
    density = 1 - _checks.fraction("sparsity", sparsity)
    block = _checks.positive_int("block", block)
    forward = _forward(dense).astype(np.float64)
    unit = forward / np.maximum(np.linalg.norm(forward, axis=1, keepdims=True), 1e-30)
    order = _complete_linkage(1 - unit @ unit.T, 1)[0]
    squares, energy = [], []
    for start in range(0, len(order), block):
        rows = np.sort(order[start : start + block])
        norms = np.square(forward[rows]).sum(0)
        columns = np.argsort(-norms, kind="stable")
        for at in range(0, len(columns), block):
            squares.append((rows, np.sort(columns[at : at + block])))
            energy.append(norms[columns[at : at + block]].sum())
    best = np.argsort(-np.array(energy), kind="stable")[
        : math.ceil(density * forward.size / block**2 - 1e-9)
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
