"""A max pool of what a batch norm from sums gives, of which nothing in full size is written.

The gradient of the activations is zero but at the maxima, so its sums need those alone: the forward
pass keeps z there. The gradient of z is spread over the image where the convolution below reads it.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels import max_pool
from pallas_kernels.batch_norm import formula
from pallas_kernels.batch_norm.spec import NormSpec
from pallas_kernels.batch_norm.sums import Norm, affine, count, norm_gradient
from pallas_kernels.varying import vary_alike


def norm_act_max_pool(spec: NormSpec, z: jax.Array, norm: Norm, size: int) -> jax.Array:
    """The maximum of each `size x size` tile of `relu(norm(z))`.

    Args:
      spec: the static arguments.
      z: activations, the image on axes 1 and 2, whose sizes the tile's divides.
      norm: sums and parameters.
      size: of the tiles in pixels.

    Returns:
      The maxima, in the dtype of z.

    Example:
      >>> import jax.numpy as jnp
      >>> from pallas_kernels.batch_norm import channel_sums
      >>> z = jnp.array([1.0, 3.0, 1.0, 3.0]).reshape(1, 2, 2, 1)
      >>> norm = Norm(channel_sums(z), jnp.ones(1), jnp.zeros(1))
      >>> norm_act_max_pool(NormSpec(epsilon=0.0), z, norm, 2).tolist()
      [[[[1.0]]]]
    """
    return _norm_act_max_pool(spec, size, *vary_alike((z, norm)))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _norm_act_max_pool(spec: NormSpec, size: int, z: jax.Array, norm: Norm) -> jax.Array:
    return _fwd(spec, size, z, norm)[0]


def _fwd(spec: NormSpec, size: int, z: jax.Array, norm: Norm) -> tuple[jax.Array, Any]:
    scales = affine(spec, norm, count(z, spec.channel_axis))
    pixels = max_pool.pixels_of_tiles(z, size)
    x = [formula.apply(spec, scales, pixel, None) for pixel in pixels]
    y, place, highest = max_pool.first_maximum(x, pixels)
    if spec.relu:  # a maximum that the ReLU held back is nowhere
        place = jnp.where(y > 0, place, jnp.asarray(-1, place.dtype))
    y, place, highest = lax.optimization_barrier((y, place, highest))
    return y, (place, highest, norm)


def _bwd(spec: NormSpec, size: int, residuals: Any, dy: jax.Array) -> tuple[jax.Array, Norm]:
    place, highest, norm = residuals
    values = count(highest, spec.channel_axis) * size**2
    g = jnp.where(place >= 0, dy, 0)
    linear = dataclasses.replace(spec, relu=False)
    masked = formula.masked_gradient(linear, affine(spec, norm, values), g, highest)
    dz = max_pool.spread(masked.dz, place, size)
    return dz, norm_gradient(spec, norm, values, masked.sums)


_norm_act_max_pool.defvjp(_fwd, _bwd)
