"""The programs that are timed of one convolution: passes alone, and together as in training."""

from collections.abc import Callable

import jax

from experiments.measuring.row_names import PASS_NAMES
from pallas_kernels.block_sparse_conv.cpu_times import MODES


def training_programs(
    conv: Callable[..., jax.Array],
) -> dict[str, Callable[..., tuple[jax.Array, ...]]]:
    """Returns the convolution alone and with both gradients, as a training step runs it.

    Args:
      conv: `(x, weights, *index) -> y`.

    Returns:
      Jitted functions `(x, weights, dy, *index) -> (y,)` and `-> (y, dx, dweights)`, under the two
      names of `MODES`.

    Example:
      >>> one = jax.numpy.ones(())
      >>> [len(run(one, one, one)) for run in training_programs(lambda x, w: x * w).values()]
      [1, 3]
    """

    def forward(
        x: jax.Array, weights: jax.Array, dy: jax.Array, *index: jax.Array
    ) -> tuple[jax.Array, ...]:
        return (conv(x, weights, *index),)

    def training(
        x: jax.Array, weights: jax.Array, dy: jax.Array, *index: jax.Array
    ) -> tuple[jax.Array, ...]:
        y, pullback = jax.vjp(lambda x, weights: conv(x, weights, *index), x, weights)
        return y, *pullback(dy)

    return dict(zip(MODES, (jax.jit(forward), jax.jit(training)), strict=True))


def single_passes(conv: Callable[..., jax.Array]) -> dict[str, Callable[..., jax.Array]]:
    """Returns the three passes of a convolution, each alone.

    Args:
      conv: `(x, weights, *rest) -> y`.

    Returns:
      Functions `(x, dy, weights, *rest)`, not jitted, by the names in `PASS_NAMES`. The compiler
      drops the forward pass that a gradient does not need.
    """

    def forward(x: jax.Array, dy: jax.Array, weights: jax.Array, *rest: jax.Array) -> jax.Array:
        return conv(x, weights, *rest)

    def input_gradient(
        x: jax.Array, dy: jax.Array, weights: jax.Array, *rest: jax.Array
    ) -> jax.Array:
        return jax.vjp(lambda x: conv(x, weights, *rest), x)[1](dy)[0]

    def weight_gradient(
        x: jax.Array, dy: jax.Array, weights: jax.Array, *rest: jax.Array
    ) -> jax.Array:
        return jax.vjp(lambda weights: conv(x, weights, *rest), weights)[1](dy)[0]

    return dict(zip(PASS_NAMES, (forward, input_gradient, weight_gradient), strict=True))
