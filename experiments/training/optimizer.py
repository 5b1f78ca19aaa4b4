"""The optimizer of a run without its method: its learning rate and weight decay."""

import jax
import optax

from experiments.training.config import LR_STEPS, TrainConfig
from experiments.training.length import Length, Passes
from experiments.training.methods import Options


def learning_rate(config: TrainConfig, length: Length) -> optax.Schedule:
    """The learning rate of each step.

    It falls in steps (`LR_STEPS`), as a cosine, or is constant, after a linear warm-up. Of a run
    that is rewound it is the schedule of one pass.

    Args:
      config: a resolved config.
      length: of the run.

    Returns:
      An optax schedule, step -> learning rate.

    Reference: `step` is of Ma et al., "HRBP", CPAL 2024 (80 and 120 of 160 epochs), `last-quarter`
    of Gamboa et al., 2020 (30 of 40), `fifths` of Evci et al., "RigL", ICML 2020.
    """
    assert config.lr is not None
    extension = length.total - mask_length(config, length).total
    warmup = round(config.warmup_epochs * length.steps_per_epoch)
    total = passes(config, length).end + extension - warmup
    if config.lr_schedule in LR_STEPS:
        steps = {int(part * total): factor for part, factor in LR_STEPS[config.lr_schedule].items()}
        schedule = optax.piecewise_constant_schedule(config.lr, steps)
    elif config.lr_schedule == "cosine":
        schedule = optax.cosine_decay_schedule(config.lr, total)
    else:
        schedule = optax.constant_schedule(config.lr)
    if not warmup:
        return schedule
    rise = optax.linear_schedule(0.0, config.lr, warmup)
    return optax.join_schedules([rise, schedule], [warmup])


def passes(config: TrainConfig, length: Length) -> Passes:
    """How often a run starts over; an extension of the run makes its last pass longer.

    Args:
      config: a resolved config.
      length: of the run.

    Returns:
      The passes that the method plans.
    """
    assert config.options is not None
    assert config.sparsity is not None
    if config.masks is not None:  # those of another run, which stay
        return Options().passes(mask_length(config, length), config.sparsity)
    return config.options.passes(mask_length(config, length), config.sparsity)


def mask_length(config: TrainConfig, length: Length) -> Length:
    """The length that the masks' schedule is made for: without the epochs of an extension."""
    if config.mask_epochs is None:
        return length
    return length._replace(total=length.steps_per_epoch * config.mask_epochs)


def optimizer(config: TrainConfig, length: Length) -> optax.GradientTransformation:
    """`chain(weight decay, sgd or adam)`, which the method's options combine with the method.

    Args:
      config: a resolved config.
      length: of the run.

    Returns:
      An optax transformation for dense and for packed parameters.
    """
    rate = learning_rate(config, length)
    momentum = config.momentum or None
    sgd = config.optimizer == "sgd"
    base = optax.sgd(rate, momentum, config.nesterov) if sgd else optax.adam(rate)
    decay = optax.add_decayed_weights(
        config.weight_decay, mask=lambda tree: jax.tree.map(lambda leaf: leaf.ndim > 1, tree)
    )
    return optax.chain(decay, base)
