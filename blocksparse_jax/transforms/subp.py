"""SUBP: soft uniform 1xN block pruning."""

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float

from blocksparse_jax import _checks, schedules, tree
from blocksparse_jax.layout import ConsecutiveGroups
from blocksparse_jax.masks import one_by_n, top_rows
from blocksparse_jax.scores import Criterion, block_scores
from blocksparse_jax.state import Spec
from blocksparse_jax.transforms._base import Drawn, Leaf, sparse_transformation


def subp(
    sparsity: float,
    *,
    block: int = 16,
    criterion: Criterion = "l1",
    schedule: schedules.Curve = "cubic",
    start: int,
    end: int,
    update_every: int = 1,
    soft: bool = True,
    version: int = 2,
    tau: float = 1.0,
    alpha: float = 1.0,
    decay: float = 2e-4,
    where: tree.Where | None = None,
    key: Array | None = None,
) -> optax.GradientTransformationExtraArgs:
    """SUBP: every group of N consecutive filters keeps the same number of input channels, chosen
    anew once an epoch.

    At each update the `floor(P * C)` blocks (N filters x one channel x the whole kernel) of lowest
    score go in every group, and `floor((P - P * rho(t)) * C)` of those come back, drawn without
    replacement with probabilities `softmax(x / tau)`, x = their scores divided by the scores' L2
    norm. rho rises from 0 at `start` (dense) to 1 at `end` (plain top-k from there on). Soft: the
    forward pass uses `w * mask` (`masked(params, state)`), the gradient goes to all weights plus
    `decay * (1 - mask) * w`. Hard: gradients are masked.

    Args:
      sparsity: P, the final fraction of blocks to remove, in [0, 1).
      block: N, filters in a block; a layer whose filter count it does not divide uses the largest
        divisor below it.
      criterion: "l1", "l2" or "bpar" (see `scores.block_scores`).
      schedule: rho's curve: "cubic", "linear", "cos" or "exp".
      start: step at which pruning starts.
      end: step from which the pattern is the plain top-k.
      update_every: steps between updates; the paper's epoch.
      soft: straight-through (True) or masked gradients (False).
      version: 2 scores `w * mask` (the authors' published class), 1 scores `w`.
      tau: temperature of the regrowth.
      alpha: weight of the redundancy in BPAR.
      decay: pull of pruned weights towards zero, soft only.
      where: predicate (name, leaf) of the sparse leaves, default conv kernels except the stem; each
        must be `[kh, kw, cin, cout]`.
      key: JAX random key of the regrowth, each update and leaf folds in its number; None is
        `jax.random.key(0)`, the same in every run.

    Returns:
      An optax transformation. `get_layouts(state)`, outside of jit, gives the pattern's layouts, of
      the present kept count. While it is soft, `pack_tree` would lose the pruned weights and
      refuses.

    Raises:
      ValueError: a bad argument, or at init a chosen leaf that is no conv kernel.

    Example:
      >>> import blocksparse_jax as bsj
      >>> params = {"w": jnp.ones((3, 3, 8, 32))}
      >>> tx = bsj.subp(0.5, start=0, end=1)
      >>> state = tx.init(params)
      >>> for _ in range(2):
      ...     _, state = tx.update(params, state, params)
      >>> bsj.get_layouts(state)["w"].packed_shape
      (2, 4, 9, 16)

    Reference: Xiang et al., "SUBP: soft uniform block pruning for 1xN sparse CNNs multithreading
    acceleration", NeurIPS 2023.
    """
    _checks.fraction("sparsity", sparsity)
    _checks.positive_int("block", block)
    _checks.choice("criterion", criterion, ("l1", "l2", "bpar"))
    _checks.choice("schedule", schedule, schedules.CURVES)
    _checks.positive_int("update_every", update_every)
    _checks.step("end", end, start=_checks.step("start", start))
    if version not in (1, 2):
        raise ValueError(f"version: expected 1 (scores w) or 2 (scores w * mask), got {version!r}")
    tau, alpha, decay = (
        _checks.number("tau", tau, low_open=True),
        _checks.number("alpha", alpha),
        _checks.number("decay", decay),
    )
    random_key = _checks.random_key("key", key)

    def draw(chosen: dict[str, Array]) -> Drawn:
        shapes = {
            name: _checks.kernel_shape(f"params[{name!r}]", leaf.shape)
            for name, leaf in chosen.items()
        }
        return {
            name: (jnp.ones(s, bool), ConsecutiveGroups(_checks.divisor(s[3], block)))
            for name, s in shapes.items()
        }

    def redraw(count: Array, leaves: dict[str, Leaf]) -> Drawn:
        rho = schedules.progress(schedule, count, start, end, update_every)
        update_key = jax.random.fold_in(random_key, count)
        drawn = {}
        for i, (name, leaf) in enumerate(leaves.items()):
            assert isinstance(leaf.layout, ConsecutiveGroups)
            kernel = jnp.where(leaf.mask, leaf.weights, 0) if version == 2 else leaf.weights
            scores = block_scores(kernel, leaf.layout.group_size, criterion, alpha)
            blocks = soft_blocks(jax.random.fold_in(update_key, i), scores, sparsity, rho, tau)
            shape = _checks.kernel_shape(f"params[{name!r}]", leaf.mask.shape)
            drawn[name] = (one_by_n(blocks, shape), leaf.layout)
        return drawn

    return sparse_transformation(
        lambda chosen: Spec("subp", _density(chosen, sparsity), block, straight_through=soft),
        where=where,
        draw=draw,
        redraw=redraw,
        due=lambda count: count % update_every == 0,
        decay=decay,
    )


def soft_blocks(
    key: Array,
    scores: Float[Array, "groups cin"],
    sparsity: float,
    rho: Float[Array, ""],
    tau: float = 1.0,
) -> Bool[Array, "groups cin"]:
    """Removes the lowest `floor(P * C)` blocks of each group and regrows `floor((P - P * rho) * C)`
    of them by importance sampling.

    Sampling without replacement is the top-k of `x / tau` plus Gumbel noise, which has the same
    distribution as drawing one by one.

    Args:
      key: JAX random key.
      scores: block scores, higher = keep.
      sparsity: P.
      rho: progress of the schedule, 0 = all regrown, 1 = none.
      tau: temperature.

    Returns:
      bool `[groups, cin]`, True = kept.

    Example:
      >>> soft_blocks(jax.random.key(0), jnp.array([[1.0, 4.0, 2.0, 3.0]]), 0.5, jnp.float32(1.0)).tolist()
      [[False, True, False, True]]

    Reference: Xiang et al., "SUBP", NeurIPS 2023; Kool et al., "Stochastic beams", ICML 2019
    (Gumbel top-k).
    """
    cin = scores.shape[1]
    removed = ~top_rows(scores, cin - _floor(sparsity * cin))
    regrown = (sparsity - sparsity * rho) * cin
    regrown = jnp.floor(regrown + 1e-4).astype(
        jnp.int32
    )  # float32 turns 3 into 2.99997 when cin is in the hundreds
    norm = jnp.sqrt(jnp.square(jnp.where(removed, scores, 0)).sum(1, keepdims=True))
    logits = scores / jnp.where(norm == 0, 1, norm) / tau + jax.random.gumbel(key, scores.shape)
    return ~removed | top_rows(jnp.where(removed, logits, -jnp.inf), regrown)


def _floor(x: float) -> int:
    """Floor that does not turn 0.7 * 10 into 6."""
    return int(x * (1 + 1e-9) + 1e-9)


def _density(chosen: dict[str, Array], sparsity: float) -> float:
    """The pattern's final density, which the paper's floor decides."""
    kept = sum(
        leaf.size * (1 - _floor(sparsity * leaf.shape[2]) / leaf.shape[2])
        for leaf in chosen.values()
    )
    return kept / sum(leaf.size for leaf in chosen.values())
