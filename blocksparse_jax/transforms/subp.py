"""SUBP: soft uniform 1xN block pruning."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float

from blocksparse_jax import _checks, schedules, tree
from blocksparse_jax.alike import map_alike
from blocksparse_jax.patterns import Kept, one_by_n
from blocksparse_jax.patterns.one_by_n import OneByN
from blocksparse_jax.schedules import Between, between, check_between
from blocksparse_jax.scores import CRITERIA, Criterion, block_scores
from blocksparse_jax.selection import highest_in_rows
from blocksparse_jax.spec import Spec
from blocksparse_jax.transforms._base import decay_of_pruned, sparse_transformation
from blocksparse_jax.transforms.leaves import Leaf, Leaves, Step


@dataclasses.dataclass(frozen=True)
class Epochs:
    """True at the step before each epoch that begins at `start` or later, through `last`.

    Epochs are counted from step 0, whatever `start` is. The update of that step sets the masks with
    which the epoch begins.

    Attributes:
      length: steps in an epoch.
      start: no masks for an epoch that begins before this step.
      last: the first step of the last epoch with new masks; None = forever.
    """

    length: int
    start: int
    last: int | None

    def __call__(self, count: Any) -> Any:
        """Whether `count` (int or int32 array) is an update step."""
        first = count + 1
        due = (first >= self.start) & (first % self.length == 0)
        return due if self.last is None else due & (first <= self.last)


def subp(
    sparsity: float,
    *,
    block: int = 16,
    criterion: Criterion = "l1",
    curve: schedules.Curve = "cubic",
    schedule: Between | schedules.Curve | None = None,
    soft: bool = True,
    version: int = 2,
    tau: float = 1.0,
    alpha: float = 1.0,
    decay: float = 2e-4,
    where: tree.Where | None = None,
    key: Array | None = None,
    start: int | None = None,
    end: int | None = None,
    update_every: int | None = None,
) -> optax.GradientTransformationExtraArgs:
    """SUBP: groups of N consecutive filters keep equally many channels, chosen anew each epoch.

    At each epoch the `floor(P * C)` blocks (N filters x one channel x the whole kernel) of lowest
    score go in every group, and `floor((P - P * rho(t)) * C)` of those come back, drawn without
    replacement with probabilities `softmax(x / tau)`, x = their scores divided by the scores' L2
    norm. rho rises from 0 at the schedule's start (dense) to 1 at its end (plain top-k, final from
    there on). Soft: the forward pass uses `w * mask` (`masked(params, state)`), the gradient goes
    to all weights plus `decay * (1 - mask) * w`. Hard: gradients are masked, and pruned weights are
    zero (the authors' hard class leaves them as they are, decays them and may bring them back).

    The masks of an epoch are set before its first forward pass, from the weights with which it
    begins: by the last update of the epoch before, from `params + updates`. `keep_zeros` gives
    these (`sparse(method, optimizer)` includes it); without it the weights before that update
    decide, with a warning.

    After an epoch's last update the state holds the masks of the next epoch (`Spec.ahead`), while
    batch normalisation's running averages belong to those of the epoch that ends: a network with
    the new masks may score less than chance until the averages follow. So test it by the masks
    before: `masked(params, state)` with the weights after that update and the state before it. The
    experiment scripts do.

    Args:
      sparsity: P, the final fraction of blocks to remove, in [0, 1). A layer of C channels removes
        `floor(P * C)`, so that narrow layers keep more: 2 of 16 at P = 0.9.
      block: N, filters in a block; a layer whose filter count it does not divide uses the largest
        divisor below it, and warns where that is less than half of what can be.
      criterion: "l1", "l2" or "bpar" (see `scores.block_scores`).
      curve: of rho: "cubic", "linear", "cos" or "exp".
      schedule: `between(start, end, every=steps_per_epoch)`: where pruning starts, from where on
        the pattern is the plain top-k, and the length of an epoch; epochs begin at multiples of
        that length, counted from step 0.
      soft: straight-through (True) or masked gradients (False).
      version: 2 scores `w * mask` (the authors' published class), 1 scores `w`, so that its masks
        may change after the end too; the cosines of its BPAR are those of `w * mask`.
      tau: temperature of the regrowth.
      alpha: weight of the redundancy in BPAR.
      decay: pull of pruned weights towards zero, soft only.
      where: predicate (name, leaf) of the sparse leaves, default conv kernels except the stem; conv
        kernels and dense kernels.
      key: JAX random key of the regrowth, each update and leaf folds in its number; None is
        `jax.random.key(0)`, the same in every run. The state holds a number drawn from it.
      start: deprecated, as are `end`, `update_every` and the name of a curve as `schedule`: they
        mean `schedule=between(start, end, every=update_every)`, with 1 where it is left out.
      end: deprecated, see `start`.
      update_every: deprecated, see `start`.

    Returns:
      An optax transformation. `get_layouts(state)`, outside of jit, gives the pattern's layouts, of
      the present kept count. While it is soft, `pack_tree` would lose the pruned weights and
      refuses.

    Raises:
      ValueError: a bad argument, no schedule, a deprecated argument beside it, or at init a chosen
        leaf that holds no kernels.

    Example:
      >>> import blocksparse_jax as bsj
      >>> params = {"w": jnp.ones((3, 3, 8, 32))}
      >>> tx = bsj.sparse(bsj.subp(0.5, schedule=bsj.between(0, 1)), optax.sgd(0.1))
      >>> state = tx.init(params)
      >>> for _ in range(2):
      ...     _, state = tx.update(params, state, params)
      >>> bsj.get_layouts(state)["w"].packed_shape
      (2, 4, 9, 16)

    Reference: Xiang et al., "SUBP: soft uniform block pruning for 1xN sparse CNNs multithreading
    acceleration", NeurIPS 2023. Our choice: the block of a layer whose filters N does not divide,
    and zeros where hard pruning removes.
    """
    _checks.fraction("sparsity", sparsity)
    _checks.positive_int("block", block)
    _checks.choice("criterion", criterion, CRITERIA)
    if isinstance(schedule, str):
        curve, schedule = schedule, None
    _checks.choice("curve", curve, schedules.CURVES)
    era = _era(schedule, start, end, update_every)
    if version not in (1, 2):
        raise ValueError(f"version: expected 1 (scores w) or 2 (scores w * mask), got {version!r}")
    tau = _checks.number("tau", tau, low_open=True)
    alpha = _checks.number("alpha", alpha)
    decay = _checks.number("decay", decay)
    random_key = _checks.random_key("key", key)
    pattern = one_by_n(block)

    def draw(chosen: dict[str, Array]) -> dict[str, Kept]:
        pattern.check_leaves(chosen)
        return {
            name: Kept(jnp.ones(leaf.shape, bool), pattern.shrinking(leaf.shape))
            for name, leaf in chosen.items()
        }

    next_masks = _NextMasks(
        sparsity,
        era,
        curve,
        pattern,
        criterion,
        version,
        tau,
        alpha,
        jax.random.key_impl(random_key),
    )

    last_epoch = min(-(-era.end // era.every) * era.every, _checks.MAX_STEP)
    last = None if version == 1 else last_epoch
    all_steps = schedules.Always() if last is None else schedules.Through(last - 1)

    def spec(chosen: dict[str, Array]) -> Spec:
        return Spec(
            "subp",
            1 - sparsity,
            schedule=Epochs(era.every, era.start, last),
            # soft until the pattern is final; from then on the pruned weights play no part
            gradient_schedule=all_steps if soft else schedules.Never(),
            pattern=pattern,
            straight_through=soft,
            resizes=True,
            ahead=True,
            has_layout=True,
            on_proposed=next_masks,
        )

    return sparse_transformation(
        spec,
        where=where,
        draw=draw,
        penalty=decay_of_pruned(decay) if soft else None,
        memory=lambda leaf: jax.random.bits(random_key, dtype=jnp.uint32),
    )


@dataclasses.dataclass(frozen=True)
class _NextMasks:
    """Sets the masks of the epoch that follows an update, from the weights as this leaves them.

    It compares by value, so it can sit in a `Spec`; the seed of its noise is in the state, since a
    random key may be traced.
    """

    sparsity: float
    era: Between
    curve: schedules.Curve
    pattern: OneByN
    criterion: Criterion
    version: int
    tau: float
    alpha: float
    key_impl: Any

    def __call__(self, step: Step, leaves: Leaves) -> Leaves:
        """The leaves with the masks of the step after this one."""
        first, era = step.count + 1, self.era
        rho = schedules.progress(self.curve, first, era.start, era.end, era.every)
        seed = next(iter(leaves.values())).memory
        key = jax.random.fold_in(jax.random.key(seed, impl=self.key_impl), first)
        blocks = {
            name: leaf.mask.size // self.pattern.units(leaf.mask.shape).weights
            for name, leaf in leaves.items()
        }
        noise = _noise(key, blocks)

        def prune(layer: tuple[Leaf, Array], _: None) -> Array:
            leaf, noise = layer
            kernel = leaf.weights
            if self.version == 2:
                kernel = jnp.where(leaf.mask, kernel, 0)
            size = self.pattern.size(leaf.mask.shape[-1])
            scores = block_scores(kernel, size, self.criterion, self.alpha, leaf.mask)
            blocks = _regrow(noise.reshape(scores.shape), scores, self.sparsity, rho, self.tau)
            return self.pattern.mask(blocks, leaf.mask.shape)

        layers = {name: (leaf, noise[name]) for name, leaf in leaves.items()}
        masks = map_alike(prune, layers, dict.fromkeys(layers))
        return {name: leaf._replace(mask=masks[name]) for name, leaf in leaves.items()}


def _era(schedule: Any, start: int | None, end: int | None, update_every: int | None) -> Between:
    """The schedule, or the one that its deprecated parts stand for."""
    is_given = (start, end, update_every) != (None, None, None)
    if schedule is not None and is_given:
        raise ValueError(
            "start: deprecated beside `schedule`, got both; leave start, end and update_every out"
        )
    if is_given:
        every = 1 if update_every is None else update_every
        return between(start, end, every=every)  # type: ignore[arg-type]
    return check_between(schedule)


def soft_blocks(
    key: Array,
    scores: Float[Array, "groups cin"],
    sparsity: float,
    rho: Float[Array, ""],
    tau: float = 1.0,
) -> Bool[Array, "groups cin"]:
    """Removes the lowest blocks of each group and regrows some of them by importance sampling.

    `floor(P * C)` blocks go, `floor((P - P * rho) * C)` of those come back. Sampling without
    replacement is the top-k of `x / tau` plus Gumbel noise, which has the same distribution as
    drawing one by one.

    Args:
      key: JAX random key.
      scores: block scores, higher = keep.
      sparsity: P.
      rho: progress of the schedule, 0 = all regrown, 1 = none.
      tau: temperature.

    Returns:
      bool `[groups, cin]`, True = kept.

    Example:
      >>> scores = jnp.array([[1.0, 4.0, 2.0, 3.0]])
      >>> soft_blocks(jax.random.key(0), scores, 0.5, jnp.float32(1.0)).tolist()
      [[False, True, False, True]]

    Reference: Xiang et al., "SUBP", NeurIPS 2023; Kool et al., "Stochastic beams", ICML 2019
    (Gumbel top-k).
    """
    noise = jax.random.gumbel(key, scores.shape, jnp.float32)
    return _regrow(noise, scores, sparsity, rho, tau)


def _noise(key: Array, sizes: dict[str, int]) -> dict[str, Float[Array, " size"]]:
    """Gumbel noise for layers, by one program for all of a size; the key folds in their place."""
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(len(sizes)))

    def draw(place: Array, size: int) -> Array:
        return jax.random.gumbel(keys[place], (size,), jnp.float32)

    places = {name: jnp.int32(place) for place, name in enumerate(sizes)}
    return map_alike(draw, places, sizes)


def _regrow(
    noise: Float[Array, "groups cin"],
    scores: Float[Array, "groups cin"],
    sparsity: float,
    rho: Float[Array, ""],
    tau: float,
) -> Bool[Array, "groups cin"]:
    """The blocks of `soft_blocks`, with Gumbel noise."""
    cin = scores.shape[1]
    removed = ~highest_in_rows(scores, cin - _floor(sparsity * cin))
    regrown = (sparsity - sparsity * rho) * cin
    # float32 turns 3 into 2.99997 when cin is in the hundreds
    regrown = jnp.floor(regrown + 1e-4).astype(jnp.int32)
    norm = jnp.sqrt(jnp.square(jnp.where(removed, scores, 0)).sum(1, keepdims=True))
    logits = scores / jnp.where(norm == 0, 1, norm) / tau + noise
    return ~removed | highest_in_rows(jnp.where(removed, logits, -jnp.inf), regrown)


def _floor(x: float) -> int:
    """Floor that does not turn 0.7 * 10 into 6."""
    return int(x * (1 + 1e-9) + 1e-9)
