"""The implementations that run on this device, and variants of the Triton kernels for checks."""

import dataclasses
import functools
import importlib
from collections.abc import Callable
from typing import Any
from unittest import mock

import jax

from experiments.bench.gpu.tiles import TILED, capability
from pallas_kernels.block_sparse_conv import PASSES, ConvSpec, Implementation, xla

WIDE = "wide"  # the variant with 64-bit offsets
FRUGAL = "frugal"  # the variant in the tiles that load least


def implementations() -> dict[str, Implementation | str]:
    """Returns the implementations that run on this device, XLA's among them.

    Returns:
      The record, or why it is absent, by name.

    Example:
      >>> implementations()["xla"].name
      'xla'
    """
    records: dict[str, Implementation | str] = {}
    for name in TILED:
        try:
            module = importlib.import_module(f"pallas_kernels.block_sparse_conv.{name}")
            records[name] = module.unavailable() or module.IMPLEMENTATION
        except ImportError as error:
            records[name] = f"does not import: {error}"
    return records | {"xla": xla.IMPLEMENTATION}


def present_implementations() -> dict[str, Implementation]:
    """Returns the records of the implementations that run on this device, by name."""
    return {name: one for name, one in implementations().items() if not isinstance(one, str)}


def variant(implementation: Implementation, name: str) -> Implementation:
    """Returns the Triton implementation with one thing forced.

    Args:
      implementation: the record.
      name: of a method of the input gradient, `WIDE` or `FRUGAL`; "" forces nothing.

    Returns:
      The record that does so.
    """
    if name == WIDE:
        passes: Any = {field: _wide(getattr(implementation, field)) for field in PASSES}
        return dataclasses.replace(implementation, **passes)
    if name == FRUGAL:
        passes = {field: _frugal(getattr(implementation, field), field) for field in PASSES}
        return dataclasses.replace(implementation, **passes)
    if name:
        return dataclasses.replace(
            implementation,
            input_gradient=functools.partial(implementation.input_gradient, method=name),
        )
    return implementation


def _frugal(run: Callable[..., jax.Array], pass_name: str) -> Callable[..., jax.Array]:
    tiles = importlib.import_module("pallas_kernels.block_sparse_conv.triton.tiles")

    def frugal(spec: ConvSpec, *operands: Any, **options: Any) -> jax.Array:
        found = tiles.frugal_tiles(spec, pass_name, capability())
        return run(spec, *operands, **options, tile=found[0] if found else None)

    return frugal


def _wide(run: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    calls = importlib.import_module("pallas_kernels.block_sparse_conv.triton.calls")
    constants = calls.geometry_constants

    def wide_constants(*arguments: Any, **options: Any) -> dict[str, Any]:
        return constants(*arguments, **options) | {WIDE: True}

    def wide(*operands: Any, **options: Any) -> jax.Array:
        with mock.patch.object(calls, "geometry_constants", wide_constants):
            return run(*operands, **options)

    return wide
