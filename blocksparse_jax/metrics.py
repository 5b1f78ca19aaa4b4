"""Metrics: density, kept FLOPs, mask distances, and a table per layer."""

import dataclasses
import math
from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from blocksparse_jax import tree
from blocksparse_jax.layout import BlockLayout, Dense, Layout, is_layout
from blocksparse_jax.state import SparseState, get_layouts, get_masks, sparse_states


class Sad(NamedTuple):
    """Sparse architecture divergence between two trees of masks: the fraction of the mask bits that
    differ.

    Attributes:
      total: over all masks together, float32 in [0, 1].
      layers: layer name -> the same for one mask.

    Reference: Zhou et al., ICLR 2021 (SAD).
    """

    total: Float[Array, ""]
    layers: dict[str, Float[Array, ""]]


def sad(masks_a: PyTree, masks_b: PyTree) -> Sad:
    """Sparse architecture divergence `||m_b - m_a||_1`, normalised by size.

    Args:
      masks_a: a tree of masks, as `get_masks` gives.
      masks_b: a tree of the same structure and shapes.

    Returns:
      `Sad(total, layers)`; dense leaves (the scalar True) do not count.

    Raises:
      ValueError: the trees differ.

    Example:
      >>> a, b = {"w": jnp.array([True, False])}, {"w": jnp.array([False, True])}
      >>> float(sad(a, b).total), float(sad(a, a).layers["w"])
      (1.0, 0.0)

    Reference: Zhou et al., "Learning N:M fine-grained structured sparse neural networks from
    scratch", ICLR 2021, section 3.3.
    """
    others = tree.match("masks_b", masks_b, masks_a)
    changed, sizes = {}, {}
    for (path, a), b in zip(jax.tree.leaves_with_path(masks_a), others, strict=True):
        name = tree.path_name(path)
        if jnp.shape(a) != jnp.shape(b):
            raise ValueError(
                f"masks_b: expected shape {jnp.shape(a)} at {name!r}, got {jnp.shape(b)}; made "
                f"from another model?"
            )
        if jnp.ndim(a):
            changed[name], sizes[name] = (a != b).sum(dtype=jnp.float32), a.size
    total = sum(changed.values(), jnp.float32(0)) / max(1, sum(sizes.values()))
    return Sad(total, {name: changed[name] / sizes[name] for name in changed})


def density(masks: PyTree) -> Float[Array, ""]:
    """The kept fraction over all masks of a tree; dense leaves (the scalar True) do not count.

    Args:
      masks: as `get_masks` gives.

    Returns:
      float32 scalar in [0, 1].

    Example:
      >>> float(density({"w": jnp.array([True, False]), "b": jnp.asarray(True)}))
      0.5
    """
    sparse = [m for m in jax.tree.leaves(masks) if jnp.ndim(m)]
    if not sparse:
        return jnp.float32(1)
    return sum((m.sum(dtype=jnp.float32) for m in sparse), jnp.float32(0)) / sum(
        m.size for m in sparse
    )


def kept_flops(masks: PyTree, params: PyTree, positions: Mapping[str, int]) -> float:
    """The fraction of a network's multiplications that the masks keep.

    Args:
      masks: as `get_masks` gives.
      params: the dense parameters.
      positions: layer name -> how often each of its weights is used for one image (output height
        times width; 1 for a dense layer).

    Returns:
      `sum(kept * positions) / sum(size * positions)` over the named layers, dense ones included.

    Raises:
      ValueError: a name is no parameter.

    Example:
      >>> masks = {"a": jnp.array([True, False]), "b": jnp.asarray(True)}
      >>> kept_flops(masks, {"a": jnp.ones(2), "b": jnp.ones(2)}, {"a": 9, "b": 1})
      0.55

    Reference: FLOPs as counted by Evci et al., "RigL", ICML 2020.
    """
    nodes = tree.match("masks", masks, params)
    leaves = {
        tree.path_name(path): (leaf.size, int(mask.sum()) if jnp.ndim(mask) else leaf.size)
        for (path, leaf), mask in zip(jax.tree.leaves_with_path(params), nodes, strict=True)
    }
    unknown = [name for name in positions if name not in leaves]
    if unknown:
        raise ValueError(
            f"positions: {unknown[0]!r} is no parameter, expected names among {list(leaves)[:8]}"
        )
    kept = sum(leaves[name][1] * n for name, n in positions.items())
    return kept / sum(leaves[name][0] * n for name, n in positions.items())


@dataclasses.dataclass(frozen=True)
class Row:
    """One layer of a `Summary`: name, shape, weights, kept weights, and the block pattern where
    there is one.
    """

    name: str
    shape: tuple[int, ...]
    weights: int
    kept: int
    pattern: str

    @property
    def density(self) -> float:
        """Kept fraction of this layer."""
        return self.kept / self.weights


@dataclasses.dataclass(frozen=True)
class Summary:
    """What is kept in each layer; `str()` makes a table.

    Attributes:
      rows: one for each parameter.
      method: names of the methods.
      target_densities: what each method asked for over its sparse leaves.
      density: reached over the sparse leaves.
      total_density: reached over all parameters.
      blind_updates: updates of the masks that could grow no weight, since the gradient of the
        pruned ones was missing (`SparseState`).
    """

    rows: tuple[Row, ...]
    method: str
    target_densities: tuple[float, ...]
    density: float
    total_density: float
    blind_updates: int = 0

    @property
    def target_density(self) -> float:
        """What the first method asked for."""
        return self.target_densities[0]

    def __str__(self) -> str:
        table = [("layer", "shape", "weights", "kept", "density", "pattern")]
        table += [
            (
                r.name,
                "x".join(map(str, r.shape)),
                f"{r.weights:,}",
                f"{r.kept:,}",
                f"{r.density:.4f}",
                r.pattern,
            )
            for r in self.rows
        ]
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        lines = [
            "  ".join(
                c.ljust(w) if i in (0, 1, 5) else c.rjust(w)
                for i, (c, w) in enumerate(zip(line, widths))
            )
            for line in table
        ]
        rule = "-" * max(map(len, lines))
        targets = " and ".join(f"{target:.4f}" for target in self.target_densities)
        sparse = f"{self.method}: sparse layers keep {self.density:.4f} (target {targets})"
        foot = [f"{sparse}, all parameters {self.total_density:.4f}"]
        if self.blind_updates:
            foot.append(
                f"{self.blind_updates} updates of the masks could grow nothing: the gradient of "
                f"the pruned weights was zero; "
                "give these steps the full one, e.g. conv(..., kernel_gradient='dense')"
            )
        return "\n".join(line.rstrip() for line in [lines[0], rule, *lines[1:], rule, *foot])


def summarize(params: PyTree, state: PyTree) -> Summary:
    """A table per layer, and totals: target and reached density, group sizes asked for and used.

    Args:
      params: the parameters, dense or packed by `pack_tree`.
      state: their optimizer state, of a chain with a sparse method (outside of jit).

    Returns:
      A `Summary`; print it.

    Raises:
      ValueError: there is no sparse method in the state, it is of another tree or shape, or packed
        by a method whose layouts are not in it (subp: `unpack_tree` first).

    Example:
      >>> import blocksparse_jax as bsj
      >>> params = {"conv": jnp.ones((3, 3, 64, 48)), "bias": jnp.ones(48)}
      >>> print(bsj.summarize(params, bsj.hrbp_prune(0.9, group_size=32).init(params)))
      layer  shape      weights   kept  density  pattern
      --------------------------------------------------------------------------------------------------
      bias   48              48     48   1.0000  dense
      conv   3x3x64x48   27,648  2,736   0.0990  2 groups of 24 filters (asked 32), 19 channels x 3 taps
      --------------------------------------------------------------------------------------------------
      hrbp: sparse layers keep 0.0990 (target 0.1000), all parameters 0.1005
    """
    masks = tree.match("state", get_masks(state), params)
    layouts = tree.match("state", get_layouts(state), params, is_leaf=is_layout)
    states = sparse_states(state)
    rows, sparse = [], []
    for (path, leaf), mask, layout in zip(
        jax.tree.leaves_with_path(params), masks, layouts, strict=True
    ):
        name, packed = tree.path_name(path), isinstance(layout, BlockLayout) and not jnp.ndim(mask)
        expected = layout.packed_shape if packed else jnp.shape(mask) or jnp.shape(leaf)
        if jnp.shape(leaf) != expected:
            raise ValueError(
                f"params: expected shape {expected} of the state at {name!r}, got "
                f"{jnp.shape(leaf)}; pack both, or neither"
            )
        shape = layout.shape if packed else jnp.shape(leaf)
        kept = int(mask.sum()) if jnp.ndim(mask) else leaf.size
        rows.append(Row(name, tuple(shape), math.prod(shape), kept, "dense"))
        if packed or jnp.ndim(mask):
            rows[-1] = dataclasses.replace(rows[-1], pattern=_pattern(rows[-1], layout, states))
            sparse.append(rows[-1])
    return Summary(
        rows=tuple(rows),
        method=" + ".join(s.spec.method for s in states),
        target_densities=tuple(s.spec.density for s in states),
        density=sum(row.kept for row in sparse) / max(1, sum(row.weights for row in sparse)),
        total_density=sum(row.kept for row in rows) / sum(row.weights for row in rows),
        blind_updates=sum(int(count) for s in states for count in jax.tree.leaves(s.blind_updates)),
    )


def _pattern(row: Row, layout: Layout, states: list[SparseState]) -> str:
    """In words: the blocks of a layer, with the sizes asked for where others were used."""
    if not isinstance(layout, BlockLayout):
        return "single weights, masked-dense" if row.kept < row.weights else "all kept"
    owners = (
        s.spec for s in states if any(node != Dense() for node in _nodes(s.layouts, row.name))
    )
    spec = next(owners)
    groups, kept, kept_taps, group_size = layout.packed_shape
    asked_size = f" (asked {spec.group_size})" if spec.group_size not in (None, group_size) else ""
    asked_run = (
        f" (asked {spec.channel_block})"
        if spec.channel_block not in (None, layout.channel_block)
        else ""
    )
    runs = (
        f" in runs of {layout.channel_block}{asked_run}"
        if layout.channel_block > 1 or asked_run
        else ""
    )
    return f"{groups} groups of {group_size} filters{asked_size}, {kept} channels{runs} x {kept_taps} taps"


def _nodes(layouts: PyTree, name: str) -> list[Layout]:
    return [
        node
        for path, node in jax.tree.leaves_with_path(layouts, is_leaf=is_layout)
        if tree.path_name(path) == name
    ]
