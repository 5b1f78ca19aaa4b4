"""Variational dropout for Flax linen: noisy layers, and any model's layers made noisy."""

import contextlib
import dataclasses
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import jax
from flax import linen as nn
from jaxtyping import Array, Float

from blocksparse_jax.variational import (
    INITIAL_LOG_SIGMA2,
    THRESHOLD,
    log_alpha,
    variances,
    with_noise,
)


class VariationalConv(nn.Conv):
    """`nn.Conv` whose weights are noisy: sparse variational dropout.

    In training it draws its outputs from their distribution, a Gaussian of mean `x * kernel + bias`
    and variance `x^2 * sigma^2` (local reparameterisation); deterministic, it convolves with the
    mean of the weights whose log alpha is at most the threshold.

    Attributes:
      log_sigma2_init: initializer of the param `log_sigma2`, of the kernel's shape.
      threshold: of log alpha, for the weights that are kept.
      deterministic: no noise; here or in the call.
      rng_collection: of the noise.

    Example:
      >>> import jax.numpy as jnp
      >>> layer, x = VariationalConv(8, (3, 3)), jnp.ones((1, 5, 5, 4))
      >>> params = layer.init(jax.random.key(0), x, deterministic=True)["params"]
      >>> layer.apply({"params": params}, x, rngs={"dropout": jax.random.key(1)},
      ...             deterministic=False).shape
      (1, 5, 5, 8)

    Reference: Molchanov, Ashukha & Vetrov, "Variational dropout sparsifies deep neural networks",
    ICML 2017; Kingma, Salimans & Welling, "Variational dropout and the local reparameterization
    trick", NeurIPS 2015.
    """

    log_sigma2_init: Callable[..., Array] = nn.initializers.constant(INITIAL_LOG_SIGMA2)
    threshold: float = THRESHOLD
    deterministic: bool | None = None
    rng_collection: str = "dropout"

    @nn.compact
    def __call__(
        self, inputs: Float[Array, "*n h w cin"], deterministic: bool | None = None
    ) -> Float[Array, "*n ho wo cout"]:
        """Convolves.

        Args:
          inputs: as those of `nn.Conv`.
          deterministic: no noise; may be an attribute instead.

        Returns:
          As `nn.Conv`.
        """
        return _noisy(self, nn.Conv, super().__call__(inputs), inputs, deterministic)


class VariationalDense(nn.Dense):
    """`nn.Dense` whose weights are noisy: sparse variational dropout.

    As `VariationalConv`, for `y = x @ kernel + bias`.

    Attributes:
      log_sigma2_init: initializer of the param `log_sigma2`, of the kernel's shape.
      threshold: of log alpha, for the weights that are kept.
      deterministic: no noise; here or in the call.
      rng_collection: of the noise.

    Example:
      >>> import jax.numpy as jnp
      >>> layer, x = VariationalDense(8, deterministic=True), jnp.ones((2, 4))
      >>> list(layer.init(jax.random.key(0), x)["params"])
      ['kernel', 'bias', 'log_sigma2']

    Reference: Molchanov, Ashukha & Vetrov, "Variational dropout sparsifies deep neural networks",
    ICML 2017.
    """

    log_sigma2_init: Callable[..., Array] = nn.initializers.constant(INITIAL_LOG_SIGMA2)
    threshold: float = THRESHOLD
    deterministic: bool | None = None
    rng_collection: str = "dropout"

    @nn.compact
    def __call__(
        self, inputs: Float[Array, "*rows cin"], deterministic: bool | None = None
    ) -> Float[Array, "*rows cout"]:
        """Multiplies.

        Args:
          inputs: `[..., cin]`.
          deterministic: no noise; may be an attribute instead.

        Returns:
          `[..., features]`.
        """
        return _noisy(self, nn.Dense, super().__call__(inputs), inputs, deterministic)


def _noisy(
    layer: Any, base: type[nn.Module], mean: Array, inputs: Array, deterministic: bool | None
) -> Array:
    """The outputs of a noisy layer, given those of its means."""
    deterministic = nn.merge_param("deterministic", layer.deterministic, deterministic)
    kernel = nn.meta.unbox(layer.get_variable("params", "kernel"))
    log_sigma2 = layer.param("log_sigma2", layer.log_sigma2_init, kernel.shape, layer.param_dtype)
    names = {field.name for field in dataclasses.fields(base) if field.init} - {"parent", "name"}
    plain = base(**{name: getattr(layer, name) for name in names})
    if not deterministic:
        variance = _linear(plain, variances(kernel, log_sigma2), inputs * inputs)
        return with_noise(mean, variance, layer.make_rng(layer.rng_collection))
    dropped = log_alpha(kernel, log_sigma2) > layer.threshold
    params = {"kernel": jax.numpy.where(dropped, 0, kernel)}
    if layer.use_bias:
        params["bias"] = layer.get_variable("params", "bias")
    outputs: Any = plain.clone(parent=None, name=None).apply({"params": params}, inputs)
    return outputs


@contextlib.contextmanager
def use_variational_dropout(key: Array) -> Iterator[None]:
    """Makes the layers of a model noisy whose params hold `log_sigma2` beside `kernel`.

    Within the `with` block, every such layer adds noise to its output, as `VariationalConv` does:
    `nn.Conv`, `nn.Dense`, `BlockSparseConv`, and other layers that are linear in an input and a
    kernel and have `use_bias`. The network needs no change; `with_log_variances` makes the params.
    For evaluation leave the block away and zero the pruned weights: `apply_masks(params,
    variational_masks(params))`. Batch norm's running averages are best taken from such a pass too,
    in training mode: noise widens the activations.

    Enter it where the model is applied, inside of the jitted function, with a new key in every
    step. The layers of `nn.scan` share the noise of one call.

    Args:
      key: JAX random key.

    Yields:
      Nothing.

    Raises:
      ValueError: a noisy layer is called with other arguments than its input; the message names
        the layer.

    Example:
      >>> import blocksparse_jax as bsj
      >>> import jax.numpy as jnp
      >>> model, x = nn.Conv(32, (3, 3)), jnp.ones((1, 8, 8, 16))
      >>> params = bsj.with_log_variances(model.init(jax.random.key(0), x)["params"])
      >>> with use_variational_dropout(jax.random.key(1)):
      ...     noisy = model.apply({"params": params}, x)
      >>> bool((noisy != model.apply({"params": params}, x)).all())
      True

    Reference: Molchanov, Ashukha & Vetrov, "Variational dropout sparsifies deep neural networks",
    ICML 2017.
    """
    calls = itertools.count()

    def intercept(
        method: Callable[..., Any], args: Any, kwargs: Any, context: nn.module.InterceptorContext
    ) -> Any:
        layer = context.module
        if (
            context.method_name != "__call__"
            or layer.scope is None
            or layer.is_initializing()
            or isinstance(layer, VariationalConv | VariationalDense)
            or not layer.has_variable("params", "log_sigma2")
        ):
            return method(*args, **kwargs)
        options = {
            name for name, value in kwargs.items() if value is not None and value is not False
        }
        if len(args) != 1 or options:
            raise ValueError(
                f"{'/'.join(layer.path)}: expected a noisy layer to be called with its input "
                f"alone, got {len(args)} arguments and {sorted(options)}; leave it out with where="
            )
        kernel = nn.meta.unbox(layer.get_variable("params", "kernel"))
        log_sigma2 = nn.meta.unbox(layer.get_variable("params", "log_sigma2"))
        variance = _linear(layer, variances(kernel, log_sigma2), args[0] * args[0])
        noise_key = jax.random.fold_in(key, next(calls))
        return with_noise(method(*args), variance, noise_key)

    with _inside(intercept), nn.intercept_methods(intercept):
        yield


_inside = jax.make_user_context(None)
"""Tells `jax.jit` apart what was traced in a block and what outside of it."""


def _linear(layer: Any, kernel: Array, inputs: Array) -> Array:
    """What a layer without bias makes of the inputs with another kernel."""
    plain = layer.clone(parent=None, name=None, use_bias=False)
    return plain.apply({"params": {"kernel": kernel}}, inputs)
