"""The optimizer of a run: its learning rate, weight decay and method, composed by optax."""

import jax
import optax

import blocksparse_jax as bsj
from experiments.training.config import TrainConfig
from experiments.training.length import Length
from experiments.training.methods import Setup


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


def optimizer(
    config: TrainConfig,
    method: optax.GradientTransformation | None,
    length: Length,
    setup: Setup | None = None,
) -> optax.GradientTransformation:
    """`sparse(method, chain(weight decay, sgd or adam))`; without a method just the last two.

    Args:
      config: a resolved config.
      method: the pruning transformation; None trains dense.
      length: of the run.
      setup: what the run gives to its method, whose options may change the optimizer; None leaves
        it as it is.

    Returns:
      An optax transformation for dense and for packed parameters.
    """
    rate = learning_rate(config, length)
    momentum = config.momentum or None
    base = optax.sgd(rate, momentum=momentum) if config.optimizer == "sgd" else optax.adam(rate)
    decay = optax.add_decayed_weights(
        config.weight_decay, mask=lambda tree: jax.tree.map(lambda leaf: leaf.ndim > 1, tree)
    )
    dense = optax.chain(decay, base)
    if setup is not None and config.options is not None:
        dense = config.options.optimizer(dense, setup)
    return dense if method is None else bsj.sparse(method, dense)
