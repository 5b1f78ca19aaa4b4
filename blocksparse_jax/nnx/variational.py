"""Variational dropout for Flax nnx: noisy layers."""

from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from blocksparse_jax.variational import (
    INITIAL_LOG_SIGMA2,
    THRESHOLD,
    log_alpha,
    variances,
    with_noise,
)


class VariationalConv(nnx.Conv):
    """`nnx.Conv` whose weights are noisy: sparse variational dropout.

    In training it draws its outputs from their distribution, a Gaussian of mean `x * kernel + bias`
    and variance `x^2 * sigma^2` (local reparameterisation); deterministic, as after `model.eval()`,
    it convolves with the mean of the weights whose log alpha is at most the threshold.

    Args:
      *args: those of `nnx.Conv`.
      rngs: `nnx.Rngs`; the noise is drawn from its stream `dropout`.
      initial_log_sigma2: of all weights, in `self.log_sigma2`.
      threshold: of log alpha, for the weights that are kept.
      deterministic: no noise.
      **kwargs: those of `nnx.Conv`.

    Example:
      >>> layer = VariationalConv(4, 8, (3, 3), rngs=nnx.Rngs(0))
      >>> x = jnp.ones((1, 5, 5, 4))
      >>> bool((layer(x) == layer(x)).all())
      False
      >>> layer.eval()
      >>> bool((layer(x) == layer(x)).all())
      True

    Reference: Molchanov, Ashukha & Vetrov, "Variational dropout sparsifies deep neural networks",
    ICML 2017; Kingma, Salimans & Welling, "Variational dropout and the local reparameterization
    trick", NeurIPS 2015.
    """

    def __init__(
        self,
        *args: Any,
        rngs: nnx.Rngs,
        initial_log_sigma2: float = INITIAL_LOG_SIGMA2,
        threshold: float = THRESHOLD,
        deterministic: bool = False,
        **kwargs: Any,
    ):
        super().__init__(*args, rngs=rngs, **kwargs)
        _make_noisy(self, rngs, initial_log_sigma2, threshold, deterministic)

    def __call__(
        self, inputs: Float[Array, "*n h w cin"], out_sharding: Any = None
    ) -> Float[Array, "*n ho wo cout"]:
        """Convolves.

        Args:
          inputs: as those of `nnx.Conv`.
          out_sharding: likewise.

        Returns:
          As `nnx.Conv`.
        """
        return _noisy(self, nnx.Conv.__call__, inputs, out_sharding)


class VariationalDense(nnx.Linear):
    """`nnx.Linear` whose weights are noisy: sparse variational dropout.

    As `VariationalConv`, for `y = x @ kernel + bias`.

    Args:
      *args: those of `nnx.Linear`.
      rngs: `nnx.Rngs`; the noise is drawn from its stream `dropout`.
      initial_log_sigma2: of all weights, in `self.log_sigma2`.
      threshold: of log alpha, for the weights that are kept.
      deterministic: no noise.
      **kwargs: those of `nnx.Linear`.

    Example:
      >>> layer = VariationalDense(4, 8, rngs=nnx.Rngs(0))
      >>> layer(jnp.ones((2, 4))).shape
      (2, 8)

    Reference: Molchanov, Ashukha & Vetrov, "Variational dropout sparsifies deep neural networks",
    ICML 2017.
    """

    def __init__(
        self,
        *args: Any,
        rngs: nnx.Rngs,
        initial_log_sigma2: float = INITIAL_LOG_SIGMA2,
        threshold: float = THRESHOLD,
        deterministic: bool = False,
        **kwargs: Any,
    ):
        super().__init__(*args, rngs=rngs, **kwargs)
        _make_noisy(self, rngs, initial_log_sigma2, threshold, deterministic)

    def __call__(
        self, inputs: Float[Array, "*rows cin"], out_sharding: Any = None
    ) -> Float[Array, "*rows cout"]:
        """Multiplies.

        Args:
          inputs: `[..., in_features]`.
          out_sharding: as that of `nnx.Linear`.

        Returns:
          `[..., out_features]`.
        """
        return _noisy(self, nnx.Linear.__call__, inputs, out_sharding)


def _make_noisy(
    layer: Any, rngs: nnx.Rngs, initial_log_sigma2: float, threshold: float, deterministic: bool
) -> None:
    layer.log_sigma2 = nnx.Param(jnp.full_like(layer.kernel[...], initial_log_sigma2))
    layer.threshold = threshold
    layer.deterministic = deterministic
    layer.noise = rngs["dropout"].fork()


def _noisy(layer: Any, call: Any, inputs: Array, out_sharding: Any) -> Array:
    """The outputs of a noisy layer, given how its base class computes."""
    kernel, log_sigma2 = layer.kernel[...], layer.log_sigma2[...]
    if layer.deterministic:
        dropped = log_alpha(kernel, log_sigma2) > layer.threshold
        return call(_twin(layer, jnp.where(dropped, 0, kernel)), inputs, out_sharding)
    plain = _twin(layer, variances(kernel, log_sigma2))
    plain.use_bias, plain.bias = False, None
    variance = call(plain, inputs * inputs, out_sharding)
    return with_noise(call(layer, inputs, out_sharding), variance, layer.noise())


def _twin(layer: Any, kernel: Array) -> Any:
    """A copy of the layer with another kernel."""
    graph, state = nnx.split(layer)
    twin = nnx.merge(graph, state, copy=True)
    twin.kernel = nnx.Param(kernel)
    return twin
