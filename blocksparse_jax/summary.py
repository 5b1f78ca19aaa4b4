"""A table of what is kept in each layer, and whether the weights agree with the masks."""

import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, PyTree

from blocksparse_jax import tree
from blocksparse_jax.layout import BlockLayout
from blocksparse_jax.layout_nodes import Dense, Layout, is_layout
from blocksparse_jax.metrics import nonfinite_by_leaf, nonzero_pruned_by_layer
from blocksparse_jax.patterns import Pattern
from blocksparse_jax.state import (
    SparseState,
    get_layouts,
    get_masks,
    is_sparse_state,
    sparse_states,
)

# One program each, rather than one for every leaf.
_count_revived = jax.jit(nonzero_pruned_by_layer)
_count_nonfinite = jax.jit(nonfinite_by_leaf)

_LEFT_ALIGNED = ("layer", "shape", "pattern")


@dataclasses.dataclass(frozen=True)
class Row:
    """One layer of a `Summary`.

    Attributes:
      name: of the parameter.
      shape: of the dense parameter.
      weights: how many there are.
      kept: how many are kept.
      pattern: the pattern in words.
    """

    name: str
    shape: tuple[int, ...]
    weights: int
    kept: int
    pattern: str

    @property
    def density(self) -> float:
        """Kept fraction of this layer; 0 of one that has lost all its channels."""
        return self.kept / max(1, self.weights)


@dataclasses.dataclass(frozen=True)
class Summary:
    """What is kept in each layer; `str()` makes a table.

    Attributes:
      rows: one for each parameter.
      method: names of the methods.
      target_densities: what each method asked for over its sparse leaves; 1, shown as "-", where
        the method itself finds what to keep.
      density: of the masks, over the sparse leaves.
      total_density: of the masks, over all parameters but the method's own.
      stalled_updates: updates of the masks that could grow no weight, since the gradient of the
        pruned ones was missing (`SparseState`).
      weight_density: of the weights, over the sparse leaves: above `density` where pruned weights
        are not zero though the method promises zeros.
      nonzero_pruned: pruned weights that are not zero though the method promises zeros.
      nonzero_pruned_layers: layer -> how many of them, where there are any.
      nonfinite_weights: layer -> weights that are NaN or infinite, where there are any.
      nonfinite_state: leaf of the optimizer state (a moment, a trace) -> likewise.
      nonfinite_updates: updates of the masks that were left out, since what decides them was not
        finite (`SparseState`).
      straight_through: whether pruned weights train on, and the forward pass takes `masked(params,
        state)`.
      averaging: a remark on weights inside the optimizer state that are not zero where pruned.
      executions: what each layer with a layout ran, by the name of its kernel; None where that was
        not given.
      own_parameters: rows that are no weights of the network but a method's own parameters
        (`Spec.own_parameters`).
    """

    rows: tuple[Row, ...]
    method: str
    target_densities: tuple[float, ...]
    density: float
    total_density: float
    stalled_updates: int = 0
    weight_density: float = 0.0
    nonzero_pruned: int = 0
    nonzero_pruned_layers: Mapping[str, int] = dataclasses.field(default_factory=dict)
    nonfinite_weights: Mapping[str, int] = dataclasses.field(default_factory=dict)
    nonfinite_state: Mapping[str, int] = dataclasses.field(default_factory=dict)
    nonfinite_updates: int = 0
    straight_through: bool = False
    averaging: str = ""
    executions: Mapping[str, str] | None = None
    own_parameters: frozenset[str] = frozenset()

    @property
    def target_density(self) -> float:
        """What the first method asked for."""
        return self.target_densities[0]

    @property
    def dense_convs(self) -> tuple[Row, ...]:
        """The rows that are dense though they look like conv kernels: `where` passed them over."""
        dense = (row for row in self.rows if row.pattern == "dense" and len(row.shape) >= 4)
        return tuple(row for row in dense if row.name not in self.own_parameters)

    def __str__(self) -> str:
        lines = _aligned([_HEADINGS, *map(_cells, self.rows)])
        rule = "-" * max(map(len, lines))
        totals = [*self._dense_though_convs(), *self._what_ran(), *self.remarks, self._total()]
        return "\n".join([lines[0], rule, *lines[1:], rule, *totals])

    def _dense_though_convs(self) -> list[str]:
        if not self.dense_convs:
            return []
        named = [f"{row.name} ({_by(row.shape)})" for row in self.dense_convs]
        others = f" and {len(named) - 8} more" if len(named) > 8 else ""
        return [f"dense, though conv kernels by shape: {', '.join(named[:8])}{others}"]

    def _what_ran(self) -> Iterator[str]:
        """Which of the pruned layers ran block-sparse, and which did not, and why."""
        if self.executions is None:
            return
        pruned = [row.name for row in self.rows if row.pattern not in ("dense", "all kept")]
        ran = {name: self.executions.get(name, "dense: no layout reached it") for name in pruned}
        sparse = [name for name, runs in ran.items() if runs == "block-sparse"]
        yield f"ran block-sparse: {', '.join(sparse) or 'no layer'}"
        dense = [f"{name} ({runs})" for name, runs in ran.items() if runs != "block-sparse"]
        if dense:
            yield f"pruned, but did not run block-sparse: {', '.join(dense)}"

    @property
    def remarks(self) -> tuple[str, ...]:
        """One sentence for each thing that is wrong with the weights or the updates."""
        return tuple(filter(None, self._remarks()))

    def _total(self) -> str:
        asked = ("-" if target == 1 else f"{target:.4f}" for target in self.target_densities)
        targets = " and ".join(asked)
        truth = ""
        if self.nonzero_pruned:
            truth = f" by the masks, but {self.weight_density:.4f} of the weights are not zero"
        return (
            f"{self.method}: sparse layers keep {self.density:.4f}{truth} (target {targets}), all "
            f"parameters {self.total_density:.4f}"
        )

    def _remarks(self) -> Iterator[str]:
        if self.nonzero_pruned:
            yield (
                f"{self.nonzero_pruned:,} pruned weights are not zero"
                f"{_most(self.nonzero_pruned_layers)}: start from apply_masks(params, "
                "get_masks(state)), and train with sparse(method, optimizer) or keep_zeros(...) "
                "around the whole chain"
            )
        if self.straight_through:
            yield (
                "pruned weights train on: give the network masked(params, state), or it runs dense"
            )
        yield self.averaging
        if self.nonfinite_weights:
            yield f"{_total_and_most(self.nonfinite_weights, 'weights')} are not finite"
        if self.nonfinite_state:
            moments = _total_and_most(self.nonfinite_state, "values of the optimizer state")
            yield f"{moments} are not finite"
        if self.nonfinite_updates:
            yield (
                f"{self.nonfinite_updates} updates of the masks were left out, since the weights "
                "or gradients that decide them were not finite: the masks stayed as they were"
            )
        if self.stalled_updates:
            yield (
                f"{self.stalled_updates} updates of the masks could grow nothing: the "
                "gradient of the pruned weights was zero; give these steps the full one with "
                "kernel_gradient='dense', an argument of conv, of use_layouts, nnx.sparsify and of "
                "the layers"
            )


def _most(counts: Mapping[str, int]) -> str:
    """The leaf that has most of them, and how many others have some."""
    if not counts:
        return ""
    name = max(counts, key=lambda name: counts[name])
    others = len(counts) - 1
    layers = f", and in {others} other{'s' if others > 1 else ''}" if others else ""
    return f" ({counts[name]:,} at {name!r}{layers})"


def _total_and_most(counts: Mapping[str, int], what: str) -> str:
    return f"{sum(counts.values()):,} {what}{_most(counts)}"


_HEADINGS = ("layer", "shape", "weights", "kept", "density", "pattern")


def _cells(row: Row) -> tuple[str, ...]:
    numbers = (f"{row.weights:,}", f"{row.kept:,}", f"{row.density:.4f}")
    return row.name, _by(row.shape), *numbers, row.pattern


def _by(shape: tuple[int, ...]) -> str:
    """A shape as 3x3x64x64."""
    return "x".join(map(str, shape))


def _aligned(table: list[tuple[str, ...]]) -> list[str]:
    """The lines of a table: words to the left, numbers to the right."""
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = []
    for cells in table:
        padded = [
            cell.ljust(width) if heading in _LEFT_ALIGNED else cell.rjust(width)
            for cell, width, heading in zip(cells, widths, _HEADINGS, strict=True)
        ]
        lines.append("  ".join(padded).rstrip())
    return lines


def summarize(
    params: PyTree, state: PyTree, *, executions: Mapping[str, str] | None = None
) -> Summary:
    """A table per layer, and totals: target and reached density, group sizes asked for and used.

    It looks at the weights too, not only at the masks: pruned weights that are not zero, and
    weights and moments that are not finite, are counted and shown with their layer. Give it the
    weights that you evaluate: a wrapper outside of `keep_zeros` may have other ones than those that
    are trained (`lookahead`'s slow weights, `schedule_free_eval_params(state, params)`).

    Args:
      params: the parameters, dense or packed by `pack_tree`.
      state: their optimizer state, of a chain with a sparse method (outside of jit).
      executions: what the layers of a Flax model ran: what `linen.use_layouts` yields, or
        `nnx.executions(model)`. The summary then lists which layers ran block-sparse.

    Returns:
      A `Summary`; print it.

    Raises:
      ValueError: there is no sparse method in the state, it is of another tree or shape, or packed
        by a method whose layouts are not in it (subp: `unpack_tree` first).

    Example:
      >>> import blocksparse_jax as bsj
      >>> params = {"conv": jnp.ones((3, 3, 64, 48)), "bias": jnp.ones(48)}
      >>> state = bsj.hrbp_prune(0.9, group_size=16).init(params)
      >>> print(bsj.summarize(bsj.apply_masks(params, bsj.get_masks(state)), state))
      layer  shape      weights   kept  density  pattern
      ---------------------------------------------------------------------------------------
      bias   48              48     48   1.0000  dense
      conv   3x3x64x48   27,648  2,736   0.0990  3 groups of 16 filters, 19 channels x 3 taps
      ---------------------------------------------------------------------------------------
      hrbp: sparse layers keep 0.0990 (target 0.1000), all parameters 0.1005
    """
    masks = tree.match("state", get_masks(state), params)
    layouts = tree.match("state", get_layouts(state), params, is_leaf=is_layout)
    states = sparse_states(state)
    rows, sparse_rows = [], []
    for (path, leaf), mask, layout in zip(
        jax.tree.leaves_with_path(params), masks, layouts, strict=True
    ):
        name = tree.path_name(path)
        is_packed = isinstance(layout, BlockLayout) and not jnp.ndim(mask)
        expected = layout.full_packed_shape if is_packed else jnp.shape(mask) or jnp.shape(leaf)
        if jnp.shape(leaf) != expected:
            raise ValueError(
                f"params: expected shape {expected} of the state at {name!r}, got "
                f"{jnp.shape(leaf)}; pack both, or neither"
            )
        shape = layout.full_shape if is_packed else jnp.shape(leaf)
        kept = int(mask.sum()) if jnp.ndim(mask) else leaf.size
        row = Row(name, tuple(shape), math.prod(shape), kept, "dense")
        if is_packed or jnp.ndim(mask):
            row = dataclasses.replace(row, pattern=_in_words(row, layout, states))
            sparse_rows.append(row)
        rows.append(row)
    weights = sum(row.weights for row in sparse_rows)
    revived = _some(_count_revived(params, state))
    nonfinite_weights, nonfinite_state = _count_nonfinite(params, state)
    reached = sum(row.kept for row in sparse_rows) / max(1, weights)
    own = _own_parameters(rows, states)
    of_network = [row for row in rows if row.name not in own]
    return Summary(
        rows=tuple(rows),
        method=" + ".join(sparse.spec.method for sparse in states),
        target_densities=tuple(sparse.spec.density for sparse in states),
        density=reached,
        total_density=sum(row.kept for row in of_network) / sum(row.weights for row in of_network),
        stalled_updates=sum(
            int(count) for sparse in states for count in jax.tree.leaves(sparse.stalled_updates)
        ),
        weight_density=reached + sum(revived.values()) / max(1, weights),
        nonzero_pruned=sum(revived.values()),
        nonzero_pruned_layers=revived,
        nonfinite_weights=_some(nonfinite_weights),
        nonfinite_state=_some(nonfinite_state),
        nonfinite_updates=sum(
            int(count) for sparse in states for count in jax.tree.leaves(sparse.nonfinite_updates)
        ),
        straight_through=any(sparse.spec.straight_through for sparse in states),
        averaging=_schedule_free_outside(state),
        executions=None if executions is None else dict(executions),
        own_parameters=own,
    )


def _own_parameters(rows: list[Row], states: list[SparseState]) -> frozenset[str]:
    """The rows that a method's spec names as its own, beside a kernel of the same shape."""
    named = {name for sparse in states for name in sparse.spec.own_parameters}
    shapes = {row.name: row.shape for row in rows}

    def is_own(row: Row) -> bool:
        module, _, name = row.name.rpartition("/")
        kernel = f"{module}/kernel" if module else "kernel"
        return name in named and shapes.get(kernel) == row.shape

    return frozenset(row.name for row in rows if is_own(row))


def _some(counts: Mapping[str, Array]) -> dict[str, int]:
    """The counts above zero, as Python ints."""
    fetched = jax.device_get(dict(counts))
    return {name: int(count) for name, count in fetched.items() if count}


def _schedule_free_outside(state: PyTree) -> str:
    """A remark where schedule_free's own weights are not zero though pruned."""

    def stop(node: Any) -> bool:
        return isinstance(node, optax.contrib.ScheduleFreeState)

    count = 0
    for node in jax.tree.leaves(state, is_leaf=stop):
        holds_method = stop(node) and any(
            map(is_sparse_state, jax.tree.leaves(node, is_leaf=is_sparse_state))
        )
        if holds_method:
            count += sum(_some(nonzero_pruned_by_layer(node.z, node)).values())
    if not count:
        return ""
    return (
        f"schedule_free holds {count:,} pruned weights that are not zero, which its averages bring "
        "back: put it inside, keep_zeros(schedule_free(optax.chain(method, optimizer), rate))"
    )


def _in_words(row: Row, layout: Layout, states: list[SparseState]) -> str:
    """The pattern of a layer, with the sizes asked for where others were used."""
    if not isinstance(layout, BlockLayout):
        if row.kept == row.weights:
            return "all kept"
        pattern = next((s.spec.pattern for s in states if s.spec.pattern is not None), None)
        return f"{pattern.noun if pattern else 'single weights'}, masked-dense"
    pattern = next(
        sparse.spec.pattern
        for sparse in states
        if any(node != Dense() for node in _nodes(sparse.layouts, row.name))
    )
    groups, kept, kept_taps, group_size = layout.packed_shape
    stack = layout.kernels.count
    of_each = f"{stack} kernels of " if stack > 1 else ""
    size = _requested(pattern, "group_size", group_size)
    run = _requested(pattern, "channel_block", layout.channel_block)
    runs = f" in runs of {layout.channel_block}{run}" if layout.channel_block > 1 or run else ""
    filters = f"{of_each}{groups} groups of {group_size} filters{size}"
    return f"{filters}, {kept} channels{runs} x {kept_taps} taps"


def _requested(pattern: Pattern | None, name: str, used: int) -> str:
    """A remark on the requested size where another one is used."""
    requested = getattr(pattern, name, None)
    return "" if requested in (None, used) else f" (asked {requested})"


def _nodes(layouts: PyTree, name: str) -> list[Layout]:
    """The layouts of that name."""
    return [
        node
        for path, node in jax.tree.leaves_with_path(layouts, is_leaf=is_layout)
        if tree.path_name(path) == name
    ]
