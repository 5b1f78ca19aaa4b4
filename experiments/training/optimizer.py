"""The optimizer of a run without its method: its learning rate and weight decay."""

import jax
import optax

from experiments.training.config import TrainConfig
from experiments.training.length import Length, Passes
from experiments.training.methods import Options


def learning_rate(config: TrainConfig, length: Length) -> optax.Schedule:
    """The learning rate of each step.

    step falls to a tenth after 1/2 and again after 3/4 of the run; the others are cosine and
    constant. Of a run that is rewound it is the schedule of one pass.

    Args:
      config: a resolved config.
      length: of the run.

    Returns:
      An optax schedule, step -> learning rate.

    Reference: the steps of Ma et al., "HRBP", CPAL 2024 (80 and 120 of 160 epochs).
    """
    assert config.lr is not None
    extension = length.total - mask_length(config, length).total
    total = passes(config, length).end + extension
    if config.lr_schedule == "step":
        steps = {total // 2: 0.1, total * 3 // 4: 0.1}
        return optax.piecewise_constant_schedule(config.lr, steps)
    if config.lr_schedule == "cosine":
        return optax.cosine_decay_schedule(config.lr, total)
    return optax.constant_schedule(config.lr)


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
    base = optax.sgd(rate, momentum=momentum) if config.optimizer == "sgd" else optax.adam(rate)
    decay = optax.add_decayed_weights(
        config.weight_decay, mask=lambda tree: jax.tree.map(lambda leaf: leaf.ndim > 1, tree)
    )
    return optax.chain(decay, base)
