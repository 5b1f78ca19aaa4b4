"""The implementations that have tiles, in one form: which tiles are timed, and which one runs."""

import dataclasses
import functools
import importlib
import itertools
from collections.abc import Callable
from typing import Any

import jax

from experiments.measuring.row_names import PASS_NAMES
from pallas_kernels.block_sparse_conv import PASSES, ConvSpec, Implementation, tuned_tables, xla
from pallas_kernels.block_sparse_conv.xla import tiles as xla_tiles

MOST = 8  # tiles that are timed for a pass
TILED = ("mosaic_gpu", "triton")


@dataclasses.dataclass(frozen=True)
class Tunable:
    """An implementation that has tiles.

    Attributes:
      name: of the implementation.
      implementation: the record.
      candidates: (spec, pass) -> tiles, dataclasses; the default need not be among them.
      default: (spec, pass) -> the tile that runs if no other is tuned.
      rules: (spec, pass) -> the tiles that rules give: one for each method of the pass, and those
        that load least.
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


@dataclasses.dataclass(frozen=True)
class Formulation:
    """The tile of a dry run: a formulation of the XLA implementation."""

    name: str


def tunable(name: str) -> Tunable:
    """Returns an implementation's tiles.

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
    makers = {"mosaic_gpu": _mosaic_gpu, "triton": _triton, "xla": _xla}
    if name not in makers:
        raise ValueError(
            f"implementations: expected mosaic_gpu or triton, those that have tiles, got {name!r}"
        )
    return makers[name]()


def _xla() -> Tunable:
    records = xla.FORMULATIONS
    names = ("rows", "rows_batched", "taps")
    return Tunable(
        name="xla",
        implementation=xla.IMPLEMENTATION,
        candidates=lambda spec, _: [
            Formulation(name) for name in names if records[name].supports(spec) is None
        ],
        default=lambda spec, _: Formulation(xla_tiles.choose(spec)),
        rules=lambda *_: [],
        build=lambda _, tile: records[tile.name],
        key=lambda spec, pass_name: f"{pass_name} {spec.in_shape} {spec.packed_shape}",
    )


def _module(name: str) -> Any:
    """A module of a backend, which is imported only when it is asked for."""
    return importlib.import_module(f"pallas_kernels.block_sparse_conv.{name}")


def _mosaic_gpu() -> Tunable:
    launch, tiles = _module("mosaic_gpu"), _module("mosaic_gpu.tiles")
    return Tunable(
        name="mosaic_gpu",
        implementation=launch.IMPLEMENTATION,
        candidates=tiles.candidate_tiles,
        default=tiles.choose_tile,
        rules=lambda *_: [],
        build=lambda pass_name, tile: launch.implementation(tiles={pass_name: tile}),
        key=tuned_tables.key,
    )


def _triton() -> Tunable:
    tiles = _module("triton.tiles")
    products = _module("triton.products")
    record = _module("triton").IMPLEMENTATION
    default = functools.partial(tiles.choose_tile, capability=capability())

    def build(pass_name: str, tile: Any) -> Implementation:
        run = functools.partial(getattr(record, pass_name), tile=tile)
        return dataclasses.replace(record, **{pass_name: run})

    def rules(spec: ConvSpec, pass_name: str) -> list[Any]:
        methods = products.METHODS if pass_name == "input_gradient" else ()
        by_method = [default(spec, pass_name, method=method) for method in methods]
        return by_method + tiles.frugal_tiles(spec, pass_name, capability())

    return Tunable(
        name="triton",
        implementation=record,
        candidates=functools.partial(tiles.candidate_tiles, capability=capability()),
        default=default,
        rules=rules,
        build=build,
        key=tiles.tuned_key,
    )


def capability() -> int:
    """Returns the GPU's compute capability times ten; 90 (Hopper) where there is no GPU."""
    return int(str(getattr(jax.devices()[0], "compute_capability", "9.0")).replace(".", ""))


def chosen_tiles(name: str, spec: ConvSpec) -> dict[str, dict[str, Any]]:
    """Returns the tiles in which an implementation runs a convolution.

    Args:
      name: of the implementation.
      spec: the static sizes.

    Returns:
      The fields of a tile by pass; empty where there are no tiles.

    Example:
      >>> from experiments.bench.gpu.shapes import case_spec, cases
      >>> chosen_tiles("xla", case_spec(cases("512@2")[0], sparsity=0.9))
      {}
    """
    if name not in TILED:
        return {}
    which = tunable(name)
    if which.implementation.supports(spec) is not None:
        return {}
    return {
        pass_name: dataclasses.asdict(which.default(spec, field))
        for pass_name, field in zip(PASS_NAMES, PASSES, strict=True)
    }


def tiles_to_time(which: Tunable, spec: ConvSpec, pass_name: str) -> list[Any]:
    """Selects the tiles that are timed: the default, those of the rules, and their neighbours.

    Neighbours that differ in few fields come first, and each set of differing fields has its turn.

    Args:
      which: the implementation.
      spec: the static sizes.
      pass_name: one of `PASSES`.

    Returns:
      At most `MOST` tiles, the default first.
    """
    known = list(dict.fromkeys([which.default(spec, pass_name), *which.rules(spec, pass_name)]))
    by_difference: dict[tuple[str, ...], list[Any]] = {}
    for tile in which.candidates(spec, pass_name):
        if tile not in known:
            nearest = min((_differing_fields(tile, other) for other in known), key=len)
            by_difference.setdefault(nearest, []).append(tile)
    lists = [by_difference[fields] for fields in sorted(by_difference, key=len)]
    rounds = itertools.zip_longest(*lists)
    neighbours = [tile for tiles in rounds for tile in tiles if tile is not None]
    return (known + neighbours)[:MOST]


def _differing_fields(tile: Any, other: Any) -> tuple[str, ...]:
    names = [field.name for field in dataclasses.fields(tile)]
    return tuple(name for name in names if getattr(tile, name) != getattr(other, name))
