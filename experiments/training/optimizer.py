"""The optimizer of a run without its method: its learning rate and weight decay."""

import jax
import optax

from experiments.training.config import TrainConfig
from experiments.training.length import Length


def learning_rate(config: TrainConfig, length: Length) -> optax.Schedule:
    """The learning rate of each step.

    step falls to a tenth after 1/2 and again after 3/4 of the run; the others are cosine and
    constant.

    Args:
      config: a resolved config.
      length: of the run.

    Returns:
      An optax schedule, step -> learning rate.

    Reference: the steps of Ma et al., "HRBP", CPAL 2024 (80 and 120 of 160 epochs).
    """
    assert config.lr is not None
    if config.lr_schedule == "step":
        steps = {length.total // 2: 0.1, length.total * 3 // 4: 0.1}
        return optax.piecewise_constant_schedule(config.lr, steps)
    if config.lr_schedule == "cosine":
        return optax.cosine_decay_schedule(config.lr, length.total)
    return optax.constant_schedule(config.lr)


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
