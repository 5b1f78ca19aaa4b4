"""HRBP and HRBP++: hardware-friendly regrouped block patterns, static and dynamic."""

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, PyTree

from blocksparse_jax import _checks, budgets, schedules, tree
from blocksparse_jax import scores as scores_
from blocksparse_jax.grouping import search as grouping
from blocksparse_jax.layout import BlockLayout, Layout, layout_to_mask
from blocksparse_jax.masks import top_rows
from blocksparse_jax.state import Spec
from blocksparse_jax.transforms._base import (
    Drawn,
    Leaf,
    check_budget,
    sparse_transformation,
    target_density,
)


def hrbp_prune(
    sparsity: float,
    *,
    group_size: int = 32,
    block_density: float = 1 / 3,
    channel_block: int = 1,
    budget: budgets.Budget = "uniform",
    scores: scores_.Kind | PyTree = "magnitude",
    update: schedules.Periodic | None = None,
    drop_fraction: float = 0.3,
    where: tree.Where | None = None,
    key: Array | None = None,
) -> optax.GradientTransformationExtraArgs:
    """HRBP: groups of similar filters that keep the same input channels and, within the block, the
    same taps (HRBP++).

    A layer keeps `K` channels and `ceil(block_density * kh * kw)` taps in every group, so its
    density is `K / cin * taps / (kh * kw)`; the counts are the whole numbers whose total density
    over the chosen leaves comes closest to `1 - sparsity`. Where that is off by more than half a
    percentage point of all weights (few, narrow layers), a layer may keep another number of taps;
    where still, or by more than 5% of the target itself, a warning gives the density reached.
    Groups, channels and taps maximise the kept score (`grouping.hrbp_groups`).

    With `update`, masks move at those steps (dynamic HRBP): in every group the kept channels of
    smallest summed magnitude are dropped and as many with the largest summed gradient grown, the
    fraction decaying by a cosine; filters stay in their groups, taps stay, and that step applies no
    gradient. Dynamic HRBP and `scores="gradient"` need the full gradient at their update steps: any
    dense execution, or `conv(..., kernel_gradient="dense")`. Where it is zero on every pruned
    weight of a layer, the update raises a ValueError, or inside jit counts in the state's
    `blind_updates`, which `summarize` shows. Put it first in the chain, inside `keep_zeros`.

    Args:
      sparsity: fraction of the chosen weights to remove, in [0, 1).
      group_size: filters in a group; a layer whose filter count it does not divide uses the largest
        divisor below it.
      block_density: fraction of the taps that a block keeps, in (0, 1]; 1 keeps whole kernels (HRBP
        without "++").
      channel_block: channels are kept in aligned runs of this many; likewise the largest divisor of
        cin.
      budget: "uniform", "erk", "er", or a map layer name -> sparsity.
      scores: "magnitude", "gradient" (`|g|` of the first update), "random", or a tree of arrays
        (higher = keep).
      update: a `periodic` schedule for dynamic HRBP; None = static masks.
      drop_fraction: fraction of the kept channels that moves at `update.start`.
      where: predicate (name, leaf) of the sparse leaves, default conv kernels except the stem; each
        must be `[kh, kw, cin, cout]`.
      key: JAX random key for `scores="random"`; None is `jax.random.key(0)`, the same masks in
        every run.

    Returns:
      An optax transformation that masks gradients; read it with `get_masks`, `get_layouts`.

    Raises:
      ValueError: a bad argument, or at init a chosen leaf that is no conv kernel.

    Example:
      >>> import blocksparse_jax as bsj
      >>> params = {"conv": {"kernel": jnp.ones((3, 3, 64, 64)), "bias": jnp.zeros(64)}}
      >>> tx = bsj.keep_zeros(optax.chain(bsj.hrbp_prune(0.9, group_size=32), optax.sgd(0.1, momentum=0.9)))
      >>> bsj.get_layouts(tx.init(params))["conv"]["kernel"].packed_shape
      (2, 19, 3, 32)

    Reference: Ma et al., "HRBP: hardware-friendly regrouping towards block-based pruning for sparse
    CNN training", CPAL 2024; the equal group sizes and kept counts, the drop fraction and its
    period are ours.
    """
    _checks.fraction("sparsity", sparsity)
    _checks.positive_int("group_size", group_size)
    _checks.positive_int("channel_block", channel_block)
    _checks.fraction("drop_fraction", drop_fraction, high_open=False)
    if not _checks.fraction("block_density", block_density, high_open=False) > 0:
        raise ValueError("block_density: expected a number in (0, 1], got 0; 1 keeps whole kernels")
    check_budget(budget)
    if isinstance(scores, str):
        _checks.choice("scores", scores, ("magnitude", "gradient", "random"))
    if update is not None and not callable(update):
        raise ValueError(
            f"update: expected None or a schedule such as periodic(100, until=30_000), got "
            f"{update!r}"
        )
    random_key = _checks.random_key("key", key)
    from_first_gradient = isinstance(scores, str) and scores == "gradient"

    def draw(chosen: dict[str, Array], grads: dict[str, Array] | None = None) -> Drawn:
        shapes = {
            name: _checks.kernel_shape(f"params[{name!r}]", leaf.shape)
            for name, leaf in chosen.items()
        }
        densities = budgets.layer_densities(budget, shapes, sparsity)
        runs = {name: _checks.divisor(shape[2], channel_block) for name, shape in shapes.items()}
        counts = budgets.block_counts(
            shapes, densities, block_density=block_density, channel_blocks=runs
        )
        kind = "magnitude" if from_first_gradient and grads is None else scores
        drawn: dict[str, tuple[Array, Layout]] = {}
        for name, score in scores_.make(kind, chosen, grads, random_key).items():
            kept, kept_taps = counts[name]
            size = _checks.divisor(shapes[name][3], group_size)
            layout = grouping.hrbp_groups(
                score, group_size=size, kept=kept, kept_taps=kept_taps, channel_block=runs[name]
            )
            drawn[name] = (layout_to_mask(layout), layout)
        return drawn

    def first(leaves: dict[str, Leaf]) -> Drawn:
        return draw(
            {name: leaf.weights for name, leaf in leaves.items()},
            {name: leaf.grad for name, leaf in leaves.items()},
        )

    def move(count: Array, leaves: dict[str, Leaf]) -> Drawn:
        start, until = getattr(update, "start", 0), getattr(update, "until", None)
        fraction = schedules.cosine_fraction(drop_fraction, count, start, until)
        moved = {}
        for name, leaf in leaves.items():
            assert isinstance(leaf.layout, BlockLayout)
            layout = move_channels(leaf.layout, leaf.weights, leaf.grad, fraction)
            moved[name] = (layout_to_mask(layout), layout)
        return moved

    def redraw(count: Array, leaves: dict[str, Leaf]) -> Drawn:
        if not from_first_gradient:
            return move(count, leaves)
        if update is None:
            return first(leaves)
        return jax.lax.cond(count == 0, first, lambda leaves: move(count, leaves), leaves)

    def due(count: Array) -> Array:
        now = count == 0 if from_first_gradient else jnp.asarray(False)
        return now | update(count) if update is not None else now

    return sparse_transformation(
        lambda chosen: Spec(
            "hrbp" if update is None else "hrbp-dynamic",
            target_density(budget, chosen, sparsity),
            group_size,
            skips=update is not None,
            full_gradient=update is not None or from_first_gradient,
            channel_block=channel_block,
        ),
        where=where,
        draw=draw,
        redraw=redraw if update is not None or from_first_gradient else None,
        due=due,
    )


def move_channels(
    layout: BlockLayout,
    weights: Float[Array, "kh kw cin cout"],
    grad: Float[Array, "kh kw cin cout"],
    fraction: Float[Array, ""],
) -> BlockLayout:
    """One topology step: drops each group's weakest kept channels and grows as many where the
    gradient is largest.

    Scores are sums over the group's filters and kept taps: of `|w|` to drop, of `|g|` to grow among
    all channels not kept, the just dropped ones included. Moves `round(fraction * kept)` channels,
    in runs of the layout's `channel_block`.

    Args:
      layout: the layout now.
      weights: the conv kernel.
      grad: its full gradient, also where the mask is False.
      fraction: of the kept channels, in [0, 1].

    Returns:
      A layout with the same filters, taps and counts.

    Example:
      >>> layout = grouping.hrbp_groups(jnp.zeros((1, 1, 4, 2)), group_size=2, kept=2, kept_taps=1)
      >>> weights = jnp.array([3.0, 1.0, 0.0, 0.0])[None, None, :, None] * jnp.ones(2)
      >>> grad = jnp.array([0.0, 0.0, 0.0, 5.0])[None, None, :, None] * jnp.ones(2)
      >>> move_channels(layout, weights, grad, jnp.float32(0.5)).channels.tolist()
      [[0, 3]]

    Reference: Ma et al., "HRBP", CPAL 2024 (dynamic); fraction as Evci et al., "RigL", ICML 2020
    (ours).
    """
    runs = layout.shape[2] // layout.channel_block
    kept = layout.channels.shape[1] // layout.channel_block
    is_kept = jnp.zeros((layout.filters.shape[0], runs), bool)
    is_kept = is_kept.at[
        jnp.arange(is_kept.shape[0])[:, None], layout.channels // layout.channel_block
    ].set(True)
    count = jnp.floor(fraction * kept + 0.5).astype(jnp.int32)
    stays = top_rows(jnp.where(is_kept, _run_scores(layout, weights), -jnp.inf), kept - count)
    grows = top_rows(jnp.where(stays, -jnp.inf, _run_scores(layout, grad)), count)
    index = jnp.argsort(~(stays | grows), axis=1, stable=True)[:, :kept].astype(jnp.int32)
    channels = index[:, :, None] * layout.channel_block + jnp.arange(
        layout.channel_block, dtype=jnp.int32
    )
    return BlockLayout(
        layout.filters,
        channels.reshape(layout.channels.shape),
        layout.taps,
        layout.shape,
        layout.channel_block,
    )


def _run_scores(
    layout: BlockLayout, array: Float[Array, "kh kw cin cout"]
) -> Float[Array, "groups runs"]:
    """`|array|` summed over each group's filters and kept taps, and over each run of channels."""
    kh, kw, cin, cout = layout.shape
    size = scores_.magnitude(array).reshape(kh * kw, cin, cout)
    blocks = size[
        layout.taps[:, :, None], :, layout.filters[:, None, :]
    ]  # [groups, kept_taps, group_size, cin]
    return blocks.sum((1, 2)).reshape(blocks.shape[0], -1, layout.channel_block).sum(-1)
