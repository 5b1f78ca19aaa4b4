"""`two_of_four_matmul`: argument checks, the choice between cuSPARSELt and XLA's dense product, and
the derivative.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from pallas_kernels.two_of_four import cusparselt

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
      >>> bool(is_two_of_four(jnp.array([[1.0], [0.0], [2.0], [0.0]]))), bool(is_two_of_four(jnp.ones((4, 1))))
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
    """Multiplies activations with weights of which at most two of each four along the input axis
    are kept.

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
      NotImplementedError: cuSPARSELt was named and cannot serve; the message says why.

    Example:
      >>> weights = jnp.array([[1.0], [0.0], [2.0], [0.0]])
      >>> two_of_four_matmul(weights, jnp.ones((3, 4))).tolist()
      [[3.0], [3.0], [3.0]]

    Reference: Zhou et al., "Learning N:M fine-grained structured sparse neural networks from
    scratch", ICLR 2021, equation 4.
    """
    if weights.ndim != 2 or not jnp.issubdtype(weights.dtype, jnp.floating):
        raise ValueError(
            f"weights: expected floats [k, m], got {weights.dtype}{list(weights.shape)}"
        )
    k, m = weights.shape
    if (
        x.ndim < 1
        or not jnp.issubdtype(x.dtype, jnp.floating)
        or x.shape[0 if channel_major else -1] != k
    ):
        wanted = "[k, ...]" if channel_major else "[..., k]"
        raise ValueError(
            f"x: expected floats {wanted} with k = {k} as in weights, got {x.dtype}{list(x.shape)}"
        )
    if implementation not in (None, *IMPLEMENTATIONS):
        raise ValueError(
            f"implementation: expected None or one of {', '.join(map(repr, IMPLEMENTATIONS))}, got "
            f"{implementation!r}"
        )
    rest = x.shape[1:] if channel_major else x.shape[:-1]
    sizes = k, m, math.prod(rest), jnp.dtype(x.dtype).name
    if implementation == "cusparselt" and (
        reason := cusparselt.unavailable() or cusparselt.limits(*sizes)
    ):
        raise NotImplementedError(f"implementation='cusparselt': {reason}")
    flat = (
        x.reshape((k, -1) if channel_major else (-1, k))
        if x.size
        else x.reshape((k, 0) if channel_major else (0, k))
    )
    y = _matmul(implementation or choose(*sizes)[0], channel_major, *_vary_alike(weights, flat))
    return y.reshape((m, *rest) if channel_major else (*rest, m))


def _vary_alike(*operands: jax.Array) -> list[jax.Array]:
    """Inside shard_map: marks each operand as varying over the mesh axes that any varies over, so
    that its gradient is summed over them.
    """
    union = frozenset().union(*(jax.typeof(a).manual_axis_type.varying for a in operands))
    missing = [tuple(union - jax.typeof(a).manual_axis_type.varying) for a in operands]
    return [
        lax.pcast(a, axes, to="varying") if axes else a
        for a, axes in zip(operands, missing, strict=True)
    ]


def _contract(a: jax.Array, b: jax.Array, axes: tuple[int, int]) -> jax.Array:
    """Sums over an axis of each, in float32 or wider."""
    wide = jnp.promote_types(a.dtype, jnp.float32)
    return lax.dot_general(a, b, (((axes[0],), (axes[1],)), ((), ())), preferred_element_type=wide)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _matmul(
    implementation: str, channel_major: bool, weights: jax.Array, x: jax.Array
) -> jax.Array:
    weights = weights.astype(x.dtype)
    if implementation == "cusparselt":
        return cusparselt.product(weights, x, channel_major=channel_major)
    return (
        _contract(weights, x, (0, 0)) if channel_major else _contract(x, weights, (1, 0))
    ).astype(x.dtype)


def _matmul_fwd(implementation: str, channel_major: bool, weights: jax.Array, x: jax.Array) -> Any:
    return _matmul(implementation, channel_major, weights, x), (weights, x)


def _matmul_bwd(
    implementation: str, channel_major: bool, saved: Any, dy: jax.Array
) -> tuple[jax.Array, jax.Array]:
    weights, x = saved
    low = weights.astype(x.dtype)
    if channel_major:
        dx, dweights = _contract(low, dy, (1, 0)), _contract(x, dy, (1, 1))
    else:
        dx, dweights = _contract(dy, low, (1, 1)), _contract(x, dy, (0, 0))
    return dweights.astype(weights.dtype), dx.astype(x.dtype)


_matmul.defvjp(_matmul_fwd, _matmul_bwd)
