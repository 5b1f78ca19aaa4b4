"""The implementations that have tiles, one like the other: which tiles a tuner times, which runs,
and what the tuned table calls them.
"""

import dataclasses
import functools
import importlib
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from experiments.bench.gpu.journal import fingerprint
from pallas_kernels.block_sparse_conv import ConvSpec, Implementation, tuned_tables, xla
from pallas_kernels.block_sparse_conv.xla import tiles

FOLDER = Path(xla.__file__).parents[1]
PASSES = ("forward", "input_gradient", "weight_gradient")
MOST = 6  # tiles that are timed for a pass


@dataclasses.dataclass(frozen=True)
class Tunable:
    """An implementation that has tiles.

    Attributes:
      name: of the implementation.
      implementation: the record.
      candidates: (spec, pass) -> tiles, dataclasses; the default need not be among them.
      default: (spec, pass) -> the tile that runs if nothing else is tuned.
      rules: (spec, pass) -> the tiles that rules give, one for each way of the pass.
      build: (pass, tile) -> a record that runs the pass in this tile.
      key: (spec, pass) -> what the table calls it.
    """

    name: str
    implementation: Implementation
    candidates: Callable[[ConvSpec, str], list[Any]]
    default: Callable[[ConvSpec, str], Any]
    rules: Callable[[ConvSpec, str], list[Any]]
    build: Callable[[str, Any], Implementation]
    key: Callable[[ConvSpec, str], str]

    @property
    def fingerprint(self) -> str:
        """Of the sources of its kernels."""
        return fingerprint((FOLDER / self.name).glob("*.py"))


@dataclasses.dataclass(frozen=True)
class Formulation:
    """The dry run's tile: a formulation of the XLA path."""

    name: str


def tunable(name: str) -> Tunable:
    """An implementation's tiles.

    Args:
      name: mosaic_gpu, triton, or for dry runs xla.

    Returns:
      How to list, build and name them.

    Raises:
      ValueError: it has no tiles.

    Example:
      >>> tunable("xla").name
      'xla'
    """
    if name == "xla":
        every = xla.FORMULATIONS
        return Tunable(
            name,
            xla.IMPLEMENTATION,
            lambda spec, _: [
                Formulation(other)
                for other in ("rows", "rows_batched", "taps")
                if every[other].supports(spec) is None
            ],
            lambda spec, _: Formulation(tiles.choose(spec)),
            lambda *_: [],
            lambda _, tile: every[tile.name],
            lambda spec, pass_name: f"{pass_name} {spec.in_shape} {spec.packed_shape}",
        )
    if name not in ("mosaic_gpu", "triton"):
        raise ValueError(
            f"implementations: expected mosaic_gpu or triton, those that have tiles, got {name!r}"
        )
    package = "pallas_kernels.block_sparse_conv"
    module, own = (
        importlib.import_module(f"{package}.{name}.{part}") for part in ("launch", "tiles")
    )
    if name == "mosaic_gpu":
        build = lambda pass_name, tile: module.implementation(tiles={pass_name: tile})  # noqa: E731
        return Tunable(
            name,
            module.IMPLEMENTATION,
            own.candidate_tiles,
            own.choose_tile,
            lambda *_: [],
            build,
            tuned_tables.key,
        )

    from pallas_kernels.block_sparse_conv.triton.products import methods

    def with_tile(pass_name: str, tile: Any) -> Implementation:
        run = functools.partial(getattr(module.IMPLEMENTATION, pass_name), tile=tile)
        return dataclasses.replace(module.IMPLEMENTATION, **{pass_name: run})

    candidates, default = (
        functools.partial(f, capability=capability())
        for f in (own.candidate_tiles, own.choose_tile)
    )

    def rules(spec: ConvSpec, pass_name: str) -> list[Any]:
        ways = methods(spec) if pass_name == "input_gradient" else ()
        return [default(spec, pass_name, method=way) for way in ways]

    return Tunable(
        name, module.IMPLEMENTATION, candidates, default, rules, with_tile, own.tuned_key
    )


def capability() -> int:
    """The GPU's compute capability times ten.

    Returns:
      90 for Hopper, and where there is no GPU.
    """
    return int(str(getattr(jax.devices()[0], "compute_capability", "9.0")).replace(".", ""))


def few(which: Tunable, spec: ConvSpec, pass_name: str) -> list[Any]:
    """The tiles that are timed: the default, those of the rules, then those nearest to them, one
    change of each kind first.

    Args:
      which: the implementation.
      spec: the static sizes.
      pass_name: one of `PASSES`.

    Returns:
      At most `MOST` tiles, the default first.
    """
    found = list(dict.fromkeys([which.default(spec, pass_name), *which.rules(spec, pass_name)]))
    kinds: dict[tuple[str, ...], list[Any]] = {}
    for tile in which.candidates(spec, pass_name):
        if tile not in found:
            fields = [
                tuple(
                    f.name
                    for f in dataclasses.fields(tile)
                    if getattr(tile, f.name) != getattr(rule, f.name)
                )
                for rule in found
            ]
            kinds.setdefault(min(fields, key=len), []).append(tile)
    nearest = [kinds[fields] for fields in sorted(kinds, key=len)]
    return (
        found
        + [tile for alike in itertools.zip_longest(*nearest) for tile in alike if tile is not None]
    )[:MOST]
