"""The registry of training methods: a name, whether its pattern has a block layout, and how to
build its optax transformation.

A new method is one entry of `METHODS`: a function from the config, the length of the run and the
initial parameters to a `Recipe`.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import optax

import blocksparse_jax as bsj
from blocksparse_jax import tree
from blocksparse_jax.schedules import periodic

if TYPE_CHECKING:
    from experiments.training.config import TrainConfig


class Length(NamedTuple):
    """How long a run is, in training steps."""

    steps_per_epoch: int
    total: int


def never(step: int) -> bool:
    """No step is one: the schedule of masks that stay."""
    return False


class Recipe(NamedTuple):
    """What a method gives to the training loop.

    Attributes:
      transform: the pruning transformation, first in the chain; None trains dense.
      changes: step -> whether that step's update changes the masks.
      dense_gradient: step -> whether that step needs the gradient of the pruned weights too.
      hard: pruned weights are exactly zero (False: straight-through methods keep them).
      resizes: the updates change how many weights are kept, so that each would compile a
        block-sparse step of its own.
    """

    transform: optax.GradientTransformation | None
    changes: Callable[[int], bool] = never
    dense_gradient: Callable[[int], bool] = never
    hard: bool = True
    resizes: bool = False


@dataclasses.dataclass(frozen=True)
class Method:
    """One entry of the registry.

    Attributes:
      build: (config, length, params) -> Recipe.
      has_layout: its masks fit a `BlockLayout`, so that the sparse and packed executions can run
        it.
      budgets: the budgets that it takes, its own default first.
      sparsity: config -> the sparsity that the method itself fixes; None where `--sparsity` sets
        it.
    """

    build: Callable[["TrainConfig", Length, Any], Recipe]
    has_layout: bool = False
    budgets: tuple[str, ...] = ("uniform",)
    sparsity: Callable[["TrainConfig"], float] | None = None


def _key(config: "TrainConfig") -> jax.Array:
    return jax.random.fold_in(jax.random.key(config.seed), 1)


def _every(config: "TrainConfig", length: Length) -> int:
    return config.update_every or min(100, length.steps_per_epoch)


def _dense(config: "TrainConfig", length: Length, params: Any) -> Recipe:
    return Recipe(None)


def _hrbp(
    config: "TrainConfig", length: Length, params: Any, update: Callable | None = None
) -> Recipe:
    transform = bsj.hrbp_prune(
        config.sparsity,
        group_size=config.group_size,
        block_density=config.block_density,
        channel_block=config.channel_block,
        budget=config.budget,
        scores=config.scores,
        update=update,
        drop_fraction=config.drop_fraction,
        key=_key(config),
    )
    first = 0 if config.scores == "gradient" else -1

    def moves(step: int) -> bool:
        return step == first or (update is not None and bool(update(step)))

    return Recipe(transform, changes=moves, dense_gradient=moves)


def _hrbp_dynamic(config: "TrainConfig", length: Length, params: Any) -> Recipe:
    return _hrbp(
        config,
        length,
        params,
        periodic(_every(config, length), until=max(1, int(0.75 * length.total))),
    )


def _subp(config: "TrainConfig", length: Length, params: Any) -> Recipe:
    """The paper's epochs 10 to 180 of 250 (the 250 is ours), as whole update periods, its epochs."""
    every = min(config.update_every or length.steps_per_epoch, max(1, length.total // 3))
    start, end = (round(length.total * epoch / 250 / every) * every for epoch in (10, 180))
    end = max(end, start + every)
    transform = bsj.subp(
        config.sparsity,
        block=config.block,
        criterion=config.criterion,
        start=start,
        end=end,
        update_every=every,
        key=_key(config),
    )
    return Recipe(
        transform,
        changes=lambda step: start <= step <= end and step % every == 0,
        dense_gradient=lambda step: (
            step <= end
        ),  # soft until the pattern is final; from then on the pruned weights play no part
        hard=False,
        resizes=True,
    )


def _n_of_m(config: "TrainConfig") -> float:
    """The sparsity of N:M."""
    if config.n > config.m:
        raise ValueError(f"n: expected at most m={config.m}, got {config.n}")
    return 1 - config.n / config.m


def _check_m(config: "TrainConfig", params: Any) -> None:
    """ValueError unless m divides the input channels of every sparse layer."""
    channels = {name: leaf.shape[2] for name, leaf in tree.choose(None, params).items()}
    for name, cin in channels.items():
        if cin % config.m:
            most = math.gcd(*channels.values())
            raise ValueError(
                f"m: {config.m} does not divide the {cin} input channels of {name}; take one that "
                f"divides {most}"
            )


def _sr_ste(config: "TrainConfig", length: Length, params: Any) -> Recipe:
    _check_m(config, params)
    return Recipe(bsj.sr_ste(config.n, config.m), hard=False)


def _ste(config: "TrainConfig", length: Length, params: Any) -> Recipe:
    _check_m(config, params)
    return Recipe(bsj.ste(config.n, config.m), hard=False)


def _rigl(config: "TrainConfig", length: Length, params: Any) -> Recipe:
    every, until = _every(config, length), max(1, int(0.75 * length.total))
    transform = bsj.rigl(
        config.sparsity,
        update_every=every,
        until=until,
        drop_fraction=config.drop_fraction,
        budget=config.budget,
        key=_key(config),
    )
    return Recipe(transform, changes=periodic(every, until=until))


def _gradual(config: "TrainConfig", length: Length, params: Any) -> Recipe:
    every, end = _every(config, length), max(1, length.total // 2)
    transform = bsj.gradual_magnitude(
        config.sparsity, start=0, end=end, update_every=every, budget=config.budget
    )
    return Recipe(
        transform, changes=lambda step: step <= end and (step % every == 0 or step == end)
    )


def _random(config: "TrainConfig", length: Length, params: Any) -> Recipe:
    return Recipe(
        bsj.fixed_masks(
            bsj.random_masks(_key(config), params, config.sparsity, budget=config.budget)
        )
    )


def _random_channel(config: "TrainConfig", length: Length, params: Any) -> Recipe:
    layouts = bsj.random_channel_layouts(_key(config), params, config.sparsity)
    return Recipe(bsj.fixed_masks(layouts=layouts))


BUDGETS = ("uniform", "erk", "er")

METHODS: dict[str, Method] = {
    "dense": Method(_dense, sparsity=lambda config: 0.0),
    "hrbp": Method(_hrbp, has_layout=True, budgets=BUDGETS),
    "hrbp-dynamic": Method(_hrbp_dynamic, has_layout=True, budgets=BUDGETS),
    "subp": Method(_subp, has_layout=True),
    "sr-ste": Method(_sr_ste, sparsity=_n_of_m),
    "ste": Method(_ste, sparsity=_n_of_m),
    "rigl": Method(_rigl, budgets=("erk", "uniform", "er")),
    "random": Method(_random, budgets=BUDGETS),
    "random-channel": Method(_random_channel, has_layout=True),
    "gradual": Method(_gradual, budgets=BUDGETS),
}


def learning_rate(config: "TrainConfig", length: Length) -> optax.Schedule:
    """The learning rate of each step: step (a tenth after 1/2 and 3/4 of the run), cosine or
    constant.

    Args:
      config: a resolved config.
      length: of the run.

    Returns:
      An optax schedule, step -> learning rate.

    Reference: the steps of Ma et al., "HRBP", CPAL 2024 (80 and 120 of 160 epochs).
    """
    if config.lr_schedule == "step":
        return optax.piecewise_constant_schedule(
            config.lr, {length.total // 2: 0.1, length.total * 3 // 4: 0.1}
        )
    if config.lr_schedule == "cosine":
        return optax.cosine_decay_schedule(config.lr, length.total)
    return optax.constant_schedule(config.lr)


def optimizer(
    config: "TrainConfig", recipe: Recipe, length: Length
) -> optax.GradientTransformation:
    """`keep_zeros(chain(method, weight decay, sgd or adam))`; without a method just the last two.

    Args:
      config: a resolved config.
      recipe: the method's.
      length: of the run.

    Returns:
      An optax transformation for dense and for packed parameters.
    """
    rate = learning_rate(config, length)
    base = (
        optax.sgd(rate, momentum=config.momentum or None)
        if config.optimizer == "sgd"
        else optax.adam(rate)
    )
    decay = optax.add_decayed_weights(
        config.weight_decay, mask=lambda tree: jax.tree.map(lambda leaf: leaf.ndim > 1, tree)
    )
    if recipe.transform is None:
        return optax.chain(decay, base)
    return bsj.keep_zeros(optax.chain(recipe.transform, decay, base))
