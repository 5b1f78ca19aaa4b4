"""The fast gradient sign method: images that were changed to fool the network that they show."""

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from experiments.data.batches import Data
from experiments.data.specs import SPECS
from experiments.measuring.environment import origin
from experiments.training.execution import State, to_form
from experiments.training.loop import Trainer

Loss = Callable[[Float[Array, "n h w c"]], Float[Array, ""]]


def fast_gradient_sign(
    loss_fn: Loss,
    images: Float[Array, "n h w c"],
    epsilon: Float[Array, ""] | float,
    mean: Sequence[float],
    std: Sequence[float],
) -> Float[Array, "n h w c"]:
    """Moves every pixel by epsilon in the direction that raises the loss.

    `x' = clip(x + epsilon * sign(dL/dx), 0, 1)` for pixels x in [0, 1]; the network sees
    `(x - mean) / std`, and so does this function.

    Args:
      loss_fn: of normalised images.
      images: normalised images.
      epsilon: in units of the pixels before normalisation, where 1 is the brightest.
      mean: of each channel.
      std: of each channel.

    Returns:
      Normalised images.

    Example:
      >>> images = jnp.array([0.2, 0.95]).reshape(1, 1, 2, 1)
      >>> attacked = fast_gradient_sign(jnp.sum, images, 0.1, mean=[0.0], std=[1.0])
      >>> [round(float(pixel), 2) for pixel in attacked.ravel()]
      [0.3, 1.0]

    Reference: Goodfellow et al., "Explaining and harnessing adversarial examples", ICLR 2015.
    """
    return _moved(images, jnp.sign(jax.grad(loss_fn)(images)), epsilon, mean, std)


def _moved(
    images: Array, sign: Array, epsilon: Any, mean: Sequence[float], std: Sequence[float]
) -> Array:
    center, scale = jnp.asarray(mean, jnp.float32), jnp.asarray(std, jnp.float32)
    moved = images + epsilon / scale * sign
    return jnp.clip(moved, -center / scale, (1 - center) / scale)


def attacked_accuracies(
    trainer: Trainer,
    state: State,
    batches: Iterable[tuple[Array, Array, Array]],
    epsilons: Sequence[float],
    mean: Sequence[float],
    std: Sequence[float],
) -> list[float]:
    """The accuracy of a network on examples that were made to fool it, as at inference.

    Args:
      trainer: of the state.
      state: in any form.
      batches: normalised NHWC float32 images, int32 labels, 0/1 weights.
      epsilons: in units of the pixels before normalisation.
      mean: of each channel, with which the images were normalised.
      std: of each channel.

    Returns:
      A fraction of right answers for each epsilon.
    """
    state = to_form("masked", state)

    @jax.jit
    def right(
        state: State, images: Array, labels: Int[Array, " n"], weight: Float[Array, " n"]
    ) -> Float[Array, " epsilons"]:
        logits = functools.partial(trainer.logits, state)

        def loss(images: Array) -> Array:
            return optax.softmax_cross_entropy_with_integer_labels(logits(images), labels).sum()

        sign = jnp.sign(jax.grad(loss)(images))

        def count(epsilon: Array) -> Array:
            moved = _moved(images, sign, epsilon, mean, std)
            return jnp.sum((logits(moved).argmax(-1) == labels) * weight)

        return jax.lax.map(count, jnp.asarray(epsilons, jnp.float32))

    counts, totals = [], []
    for images, labels, weight in batches:
        counts.append(right(state, images, labels, weight))
        totals.append(weight.sum())
    counts, totals = jax.device_get((counts, totals))
    return [float(number) / float(sum(totals)) for number in sum(counts)]


def attack(
    trainer: Trainer, state: State, data: Data, step: int, epsilons: Sequence[float]
) -> dict[str, Any]:
    """What attack.json holds: the accuracies of a network with and without the attack.

    Args:
      trainer: of the state.
      state: in any form.
      data: the run's.
      step: training steps done.
      epsilons: in units of the pixels before normalisation.

    Returns:
      The run, `test_accuracy`, `rows` of epsilon and accuracy, device, versions and commit.
    """
    config = trainer.config
    spec, batch_size = SPECS[config.dataset], config.batch_size
    assert batch_size is not None
    accuracies = attacked_accuracies(
        trainer, state, data.test_batches(batch_size), epsilons, spec.mean, spec.std
    )
    names = ("method", "dataset", "model", "width", "seed", "sparsity")
    return {name: getattr(config, name) for name in names} | {
        "step": step,
        "attack": "fast gradient sign method",
        "test_accuracy": trainer.evaluate(state, data.test_batches(batch_size)),
        "rows": [
            {"epsilon": epsilon, "accuracy": accuracy}
            for epsilon, accuracy in zip(epsilons, accuracies, strict=True)
        ],
        **origin(),
    }
