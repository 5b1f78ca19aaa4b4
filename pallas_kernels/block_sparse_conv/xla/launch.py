"""The implementation "xla": for each shape the formulation that `tiles.choose` picks."""

import functools

import jax

from pallas_kernels.block_sparse_conv.spec import PASSES, ConvSpec, Implementation
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


def _run(name: str, spec: ConvSpec, *operands: jax.Array) -> jax.Array:
    """One pass, by name."""
    return getattr(FORMULATIONS[tiles.choose(spec)], name)(spec, *operands)


IMPLEMENTATION = Implementation(
    "xla", _supports, *(functools.partial(_run, name) for name in PASSES)
)
