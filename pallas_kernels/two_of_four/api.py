"""`two_of_four_matmul`: checks, the choice of cuSPARSELt or XLA, and the derivative."""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from pallas_kernels.two_of_four import cusparselt
from pallas_kernels.varying import vary_alike

IMPLEMENTATIONS = ("cusparselt", "dense")


def choose(k: int, m: int, n: int, dtype: str) -> tuple[str, str]:
    """What `implementation=None` picks, and why: dense, until cuSPARSELt is measured.

    Args:
      k: inputs, the contracted axis.
      m: outputs.
      n: columns of activations.
      dtype: of the activations.

    Returns:
      "dense", and the reason.

    Example:
      >>> choose(64, 64, 64, "float32")[0]
      'dense'
    """
    if reason := cusparselt.unavailable() or cusparselt.limits(k, m, n, dtype):
        return "dense", f"XLA's dense product; 'cusparselt': {reason}"
    return "dense", "XLA's dense product: no time of 'cusparselt' is known yet; name it to run it"


def is_two_of_four(weights: Float[Array, "k m"]) -> Bool[Array, ""]:
    """Whether at most two of each four weights along the input axis are other than 0.

    Args:
      weights: `[k, m]`.

    Returns:
      A boolean; False where 4 does not divide k.

    Example:
      >>> weights = jnp.array([[1.0], [0.0], [2.0], [0.0]])
      >>> bool(is_two_of_four(weights)), bool(is_two_of_four(jnp.ones((4, 1))))
      (True, False)

    Reference: Mishra et al., "Accelerating sparse deep neural networks", 2021.
    """
    if weights.shape[0] % 4:
        return jnp.zeros((), bool)
    return jnp.all(jnp.count_nonzero(weights.reshape(-1, 4, weights.shape[1]), axis=1) <= 2)


def two_of_four_matmul(
    weights: Float[Array, "k m"],
    x: Float[Array, "..."],
    *,
    channel_major: bool = False,
    implementation: str | None = None,
) -> Float[Array, "..."]:
    """Multiplies activations with 2:4 weights.

    At most two of each four weights along the input axis are kept.

    `y = x W`, or `y = W^T x` where the channels come first: a dense layer, or a 1x1 convolution of
    stride 1 in (C, H, W, N). Nothing checks the pattern (`is_two_of_four` does); with other weights
    cuSPARSELt's result is undefined. Both gradients are dense products: that of the weights is
    straight-through, for the pruned ones too; that of x contracts the outputs, along which the
    weights have no pattern.

    Args:
      weights: `[k, m]`, already masked, e.g. by `bsj.sr_ste(2, 4)`; cast to `x.dtype`, products are
        accumulated in float32.
      x: `[..., k]`, or `[k, ...]` where the channels come first.
      channel_major: whether the channels come first.
      implementation: "cusparselt", "dense", or None: dense (`choose` says why).

    Returns:
      `y [..., m]` or `[m, ...]` in `x.dtype`.

    Raises:
      ValueError: an argument does not fit the others; the message names it.
      NotImplementedError: cuSPARSELt was named and cannot run this product; the message says why.

    Example:
      >>> weights = jnp.array([[1.0], [0.0], [2.0], [0.0]])
      >>> two_of_four_matmul(weights, jnp.ones((3, 4))).tolist()
      [[3.0], [3.0], [3.0]]

    Reference: Zhou et al., "Learning N:M fine-grained structured sparse neural networks from
    scratch", ICLR 2021, equation 4.
    """
    _check(weights, x, channel_major, implementation)
    k, m = weights.shape
    other_axes = x.shape[1:] if channel_major else x.shape[:-1]
    n = math.prod(other_axes)
    dtype = jnp.dtype(x.dtype).name
    if implementation == "cusparselt":
        if reason := cusparselt.unavailable() or cusparselt.limits(k, m, n, dtype):
            raise NotImplementedError(f"implementation='cusparselt': {reason}")
    elif implementation is None:
        implementation, _ = choose(k, m, n, dtype)
    matrix = x.reshape((k, n) if channel_major else (n, k))
    weights, matrix = vary_alike((weights, matrix))
    y = _matmul(implementation, channel_major, weights, matrix)
    return y.reshape((m, *other_axes) if channel_major else (*other_axes, m))


def _check(
    weights: jax.Array, x: jax.Array, channel_major: bool, implementation: str | None
) -> None:
    """ValueError unless the arguments fit each other."""
    if weights.ndim != 2 or not jnp.issubdtype(weights.dtype, jnp.floating):
        raise ValueError(
            f"weights: expected floats [k, m], got {weights.dtype}{list(weights.shape)}"
        )
    k = weights.shape[0]
    channel_axis = 0 if channel_major else -1
    is_float = jnp.issubdtype(x.dtype, jnp.floating)
    if x.ndim < 1 or not is_float or x.shape[channel_axis] != k:
        expected = "[k, ...]" if channel_major else "[..., k]"
        raise ValueError(
            f"x: expected floats {expected} with k = {k} as in weights, got "
            f"{x.dtype}{list(x.shape)}"
        )
    if implementation not in (None, *IMPLEMENTATIONS):
        names = ", ".join(map(repr, IMPLEMENTATIONS))
        raise ValueError(f"implementation: expected None or one of {names}, got {implementation!r}")


class Residuals(NamedTuple):
    """What the backward pass needs.

    Attributes:
      weights: in their own dtype.
      x: the activations as a matrix.
    """

    weights: jax.Array
    x: jax.Array


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _matmul(
    implementation: str, channel_major: bool, weights: jax.Array, x: jax.Array
) -> jax.Array:
    weights = weights.astype(x.dtype)
    if implementation == "cusparselt":
        return cusparselt.product(weights, x, channel_major=channel_major)
    y = _contract(weights, x, (0, 0)) if channel_major else _contract(x, weights, (1, 0))
    return y.astype(x.dtype)


def _matmul_fwd(
    implementation: str, channel_major: bool, weights: jax.Array, x: jax.Array
) -> tuple[jax.Array, Residuals]:
    return _matmul(implementation, channel_major, weights, x), Residuals(weights, x)


def _matmul_bwd(
    implementation: str, channel_major: bool, residuals: Residuals, dy: jax.Array
) -> tuple[jax.Array, jax.Array]:
    weights, x = residuals
    rounded = weights.astype(x.dtype)
    if channel_major:
        dx, dweights = _contract(rounded, dy, (1, 0)), _contract(x, dy, (1, 1))
    else:
        dx, dweights = _contract(dy, rounded, (1, 1)), _contract(x, dy, (0, 0))
    return dweights.astype(weights.dtype), dx.astype(x.dtype)


_matmul.defvjp(_matmul_fwd, _matmul_bwd)


def _contract(a: jax.Array, b: jax.Array, axes: tuple[int, int]) -> jax.Array:
    """Sums over an axis of each, in float32 or wider."""
    dtype = jnp.float64 if a.dtype == jnp.float64 else jnp.float32
    contracted = (((axes[0],), (axes[1],)), ((), ()))
    return lax.dot_general(a, b, contracted, preferred_element_type=dtype)
