"""Campfire: structured pruning after every update of an era, frozen from its end on."""

import math
from typing import Any, Literal, NamedTuple

import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float

from blocksparse_jax import _checks, schedules, tree
from blocksparse_jax.alike import map_alike
from blocksparse_jax.counts import warn_if_off
from blocksparse_jax.dead_inputs import Feeds, checked_feeds, live_inputs
from blocksparse_jax.layout_nodes import Dense
from blocksparse_jax.patterns import Kept
from blocksparse_jax.patterns.kernel import Kernel
from blocksparse_jax.patterns.window import Window
from blocksparse_jax.schedules import Between, between
from blocksparse_jax.selection import highest
from blocksparse_jax.spec import Spec
from blocksparse_jax.transforms._base import sparse_transformation
from blocksparse_jax.transforms.leaves import Leaf, Leaves, Step

Kind = Literal["window", "ck", "combined", "inter_epoch"]
KINDS: tuple[Kind, ...] = ("window", "ck", "combined", "inter_epoch")
Fc = Literal["block", "fine"]
LARGEST_FC_BLOCK = 4
_WINDOW, _CK = Window(), Kernel("max")


class _Count(NamedTuple):
    """What a conv layer keeps when the era ends.

    Attributes:
      taps: weights of each kernel slice.
      kernels: kernel slices of each kernel.
      share: of the sparsity that windows take.
    """

    taps: int
    kernels: int
    share: float


class _Sparsity(NamedTuple):
    """How far windows and kernel slices are at a step: its sparsity, 1 from their last step on."""

    window: Array
    ck: Array


def campfire(
    sparsity: float,
    *,
    kind: Kind = "combined",
    era: tuple[int, int],
    exponent: float = 3.0,
    window_share: float = 0.8,
    fc: Fc | None = None,
    fc_block: int = LARGEST_FC_BLOCK,
    feeds: Feeds | None = None,
    where: tree.Where | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Prunes the proposed weights after every update of an era, each layer by itself.

    At update t of the era the sparsity is `s_t = s_f * (1 - (1 - (t - start) / length)^exponent)`.
    Pruned weights stay zero, and from the end of the era on the masks stay. With `window_share` v,

    - "window": every kernel slice keeps `(1 - s_t) * taps` of its weights, those of the largest
      magnitude;
    - "ck": whole kernel slices go, those with the smallest `max |w|`;
    - "combined": windows as at the sparsity `v * s_t`, then slices up to the rest;
    - "inter_epoch": the masks of "combined", the slices in the first half of the era and the
      windows in the second.

    A 1x1 kernel has one weight in a slice: its slices go in every kind. Dense kernels, of which
    `fc` says how they are pruned, keep at least one weight of every output neuron. Inputs that come
    from a channel whose kernel slices are all pruned (`feeds`) are eliminated first: a dense layer
    keeps its weights among the inputs that are left. `bsj.metrics.eliminated_inputs` counts them.

    It acts on `params + updates`, so it prunes inside of `keep_zeros` (or `sparse`) only.

    Args:
      sparsity: fraction of the chosen weights to remove, in [0, 1).
      kind: which weights go together.
      era: the first update, which prunes nothing yet, and the number of updates to the last.
      exponent: of the curve, above 0.
      window_share: the part v of the sparsity that windows take, in [0, 1].
      fc: prunes dense kernels too: "fine" by single weights, "block" by windows of
        `fc_block x fc_block` weights with the smallest `sum |w|`. None leaves them dense, unless
        `where` chooses them: then as "fine".
      fc_block: size of the windows of a dense kernel, 1 to 4.
      feeds: name of a dense kernel -> name, or names, of the conv kernels whose (summed) output it
        reads, through a pool or a flattening of NHWC activations. Channels without kernels must
        give zeros: no bias, or one that the dense layer's bias can make up for.
      where: predicate (name, leaf) of the sparse leaves, default conv kernels except the stem, and
        all dense kernels with `fc`.

    Returns:
      An optax transformation that masks gradients; put it first in the chain, inside `keep_zeros`
      (`sparse(method, optimizer)` does both).

    Raises:
      ValueError: a bad argument, or at init a chosen leaf that is no kernel or `feeds` that do not
        fit.

    Example:
      >>> import blocksparse_jax as bsj
      >>> params = {"w": jnp.arange(1.0, 577.0).reshape(3, 3, 8, 8)}
      >>> tx = bsj.sparse(campfire(2 / 3, kind="window", era=(0, 2)), optax.sgd(0.1))
      >>> state, kept = tx.init(params), []
      >>> for _ in range(4):
      ...     _, state = tx.update(params, state, params)
      ...     kept.append(int(bsj.get_masks(state)["w"].sum()))
      >>> kept
      [576, 256, 192, 192]

    Reference: Gamboa et al., "Campfire", 2020, equation 1. Steps as the unit of the era, the
    nearest whole counts of each layer, slices of 1x1 kernels in the window kinds, the halves of
    "inter_epoch" and elimination before magnitude are our choice.
    """
    _checks.fraction("sparsity", sparsity)
    _checks.choice("kind", kind, KINDS)
    schedule = _checked_era(era)
    _checks.number("exponent", exponent, low_open=True)
    _checks.fraction("window_share", window_share, high_open=False)
    if fc is not None:
        _checks.choice("fc", fc, ("block", "fine"))
    if _checks.positive_int("fc_block", fc_block) > LARGEST_FC_BLOCK:
        raise ValueError(f"fc_block: expected 1 to {LARGEST_FC_BLOCK}, got {fc_block}")
    block = fc_block if fc == "block" else 1
    share = {"window": 1.0, "ck": 0.0}.get(kind, window_share)
    if where is None and fc is not None:
        where = _conv_and_dense_kernels

    def draw(chosen: dict[str, Array]) -> dict[str, Kept]:
        _CK.check_leaves(chosen)
        checked_feeds(feeds, tree.shapes(chosen))
        return {name: Kept(jnp.ones(leaf.shape, bool), Dense()) for name, leaf in chosen.items()}

    def curve(count: Array, start: int, end: int) -> Array:
        now = schedules.cubic_sparsity(0.0, sparsity, count, start, end, exponent)
        return jnp.where(count >= end, 1.0, now)  # counts never fall below the final ones

    def prune(step: Step, leaves: Leaves) -> Leaves:
        start, end = schedule.start, schedule.end
        middle = start + max(1, (end - start) // 2)
        at = _Sparsity(curve(step.count, start, end), curve(step.count, start, end))
        if kind == "inter_epoch" and middle < end:
            at = _Sparsity(curve(step.count, middle, end), curve(step.count, start, middle))
        convs = {name: leaf for name, leaf in leaves.items() if leaf.mask.ndim != 2}
        counts = _final_counts({n: leaf.mask.shape for n, leaf in convs.items()}, sparsity, share)
        layers = {name: (leaf.weights, leaf.mask, at) for name, leaf in convs.items()}
        masks = map_alike(_prune_conv, layers, counts)
        sources = checked_feeds(feeds, {n: leaf.mask.shape for n, leaf in leaves.items()})
        for name, leaf in leaves.items():
            if name not in convs:
                live = live_inputs(masks, sources.get(name, ()), leaf.mask.shape[0])
                masks[name] = _prune_dense(leaf, live, at.ck, sparsity, block)
        return {name: leaf._replace(mask=masks[name]) for name, leaf in leaves.items()}

    spec = Spec(
        "campfire",
        1 - sparsity,
        schedule=schedule,
        pattern=_WINDOW if kind == "window" else _CK,
        resizes=True,
        on_proposed=prune,
    )
    return sparse_transformation(spec, where=where, draw=draw)


def _checked_era(era: Any) -> Between:
    if not isinstance(era, tuple) or len(era) != 2:
        raise ValueError(
            f"era: expected the first update and the number of updates to the last, such as (0, "
            f"1000), got {era!r}"
        )
    start, length = _checks.step("era[0]", era[0]), _checks.positive_int("era[1]", era[1])
    _checks.step("era[0] + era[1]", start + length)
    return between(start, start + length)


def _conv_and_dense_kernels(name: str, leaf: Array) -> bool:
    return leaf.ndim == 2 or tree.conv_kernels(name, leaf)


def _final_counts(
    shapes: dict[str, tuple[int, ...]], sparsity: float, share: float
) -> dict[str, _Count]:
    """What each conv layer keeps at the end; windows first, then kernel slices up to the rest."""
    counts, off = dict[str, _Count](), 0.0
    for name, shape in shapes.items():
        rows, slices, all_taps = _CK.units(shape)
        own = share if all_taps > 1 else 0.0
        taps = max(1, round((1 - own * sparsity) * all_taps))
        target = (1 - sparsity) * slices * all_taps
        kernels = slices if own == 1 else min(slices, max(1, round(target / taps)))
        counts[name] = _Count(taps, kernels, own)
        off += rows * (kernels * taps - target)
    size = sum(math.prod(shape) for shape in shapes.values())
    if shapes:
        warn_if_off(abs(off) / size, 1 - sparsity, "whole windows and slices", "another kind")
    return counts


def _prune_conv(layer: tuple[Array, Array, _Sparsity], final: _Count) -> Bool[Array, "..."]:
    """The smaller mask of a conv layer."""
    weights, mask, at = layer
    scores, share = jnp.abs(weights), final.share
    if share > 0:
        taps = _count(1 - share * at.window, _WINDOW.units(mask.shape).sets, final.taps)
        mask = mask & _WINDOW.keep(scores, mask, Dense(), taps)
    if share < 1:
        density = (1 - at.ck) / (1 - share * at.ck)
        kernels = _count(density, _CK.units(mask.shape).sets, final.kernels)
        mask = mask & _CK.keep(scores, mask, Dense(), kernels)
    return mask


def _count(density: Array, sets: int, final: int) -> Array:
    return jnp.maximum(final, jnp.round(density * sets).astype(jnp.int32))


def _prune_dense(
    leaf: Leaf, live: Bool[Array, " cin"], at: Array, sparsity: float, block: int
) -> Bool[Array, "cin cout"]:
    """The smaller mask of a dense layer: the best blocks of live inputs, one in every column."""

    def sums(array: Array) -> Float[Array, "rows columns"]:
        cin, cout = array.shape
        padded = jnp.pad(array, ((0, -cin % block), (0, -cout % block)))
        rows, columns = (size // block for size in padded.shape)
        return padded.reshape(rows, block, columns, block).sum((1, 3))

    def spread(blocks: Bool[Array, "rows columns"]) -> Bool[Array, "cin cout"]:
        whole = blocks.repeat(block, 0).repeat(block, 1)
        return whole[: leaf.mask.shape[0], : leaf.mask.shape[1]]

    usable = leaf.mask & live[:, None]
    is_live = sums(usable.astype(jnp.float32)) > 0
    # Block columns whose inputs are all dead keep their best block still.
    alone = ~is_live.any(0, keepdims=True)
    usable = jnp.where(spread(jnp.broadcast_to(alone, is_live.shape)), leaf.mask, usable)
    candidates = sums(usable.astype(jnp.float32)) > 0
    scores = jnp.where(candidates, sums(jnp.where(usable, jnp.abs(leaf.weights), 0)), -jnp.inf)
    first = jnp.arange(len(scores))[:, None] == scores.argmax(0, keepdims=True)
    candidates = jnp.where(alone, first, candidates)
    scores = jnp.where(candidates, jnp.where(first, jnp.inf, scores), -jnp.inf)
    final = max(1, round((1 - sparsity) * scores.size))
    count = jnp.maximum(_count(1 - at, scores.size, final), scores.shape[1])
    return usable & spread(highest(scores, count) & candidates)
