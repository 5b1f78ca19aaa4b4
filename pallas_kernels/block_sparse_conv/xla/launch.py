"""The implementation "xla": for each shape the formulation that `tiles.choose` picks."""

import functools

import jax

from pallas_kernels.block_sparse_conv.spec import ConvSpec, Implementation
from pallas_kernels.block_sparse_conv.xla import tiles
from pallas_kernels.block_sparse_conv.xla.kernels import FORMULATIONS


def unavailable() -> str | None:
    """Why XLA's formulations cannot run here: they always can.

    Returns:
      None.
    """
    return None


def _supports(spec: ConvSpec) -> str | None:
    """It runs every convolution."""
    return unavailable()


def _run(pass_name: str, spec: ConvSpec, *operands: jax.Array) -> jax.Array:
    """One pass, in the formulation for its spec."""
    return getattr(FORMULATIONS[tiles.choose(spec)], pass_name)(spec, *operands)


IMPLEMENTATION = Implementation(
    "xla",
    _supports,
    forward=functools.partial(_run, "forward"),
    input_gradient=functools.partial(_run, "input_gradient"),
    weight_gradient=functools.partial(_run, "weight_gradient"),
)
