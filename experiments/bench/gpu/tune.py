"""Times the candidate tiles of the GPU kernels, and writes the tables that the kernels read.

`python -m experiments.bench.tune --device gpu`. Layer by layer and pass by pass; every timed pass
is one line of the journal, `--minutes 9` stops in time, and the same command continues. The tables
are written at the end of every call, from all lines of the journal.

A tile must give what the default tile gives (which the benchmark's check compares with float64).
One that does not, or does not compile, is named in the journal and left out. The first run of each
tile is a unit of its own: one that hangs or loses the device is left out when the pass is tuned
again.

After its tiles, each convolution of the Triton kernels is timed with a norm in front: while the
input is loaded, and in a pass of its own. The tables say which was faster, and so training runs.

With `--rows FILE`, a report of the kernels' benchmark, it times nothing and needs no GPU: the times
of the report's layers go into the table, by which `implementation=None` chooses.
"""

import dataclasses
import functools
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax

from experiments.bench import command
from experiments.bench.gpu import clock, shapes
from experiments.bench.gpu.fingerprint import backend_fingerprint
from experiments.bench.gpu.journal import Journal, TimeUp
from experiments.bench.gpu.layer_table import write_layers
from experiments.bench.gpu.prologue_times import measure_prologue
from experiments.bench.gpu.tile_times import measure_pass
from experiments.bench.gpu.tiles import Tunable, tunable
from experiments.measuring.environment import tuned_on
from pallas_kernels.block_sparse_conv import PASSES, ConvSpec, tuned_tables
from pallas_kernels.devices import this_gpu

FIRST_RUN_SECONDS = 30  # after which the first run of a tile hangs
RESERVE = 20  # seconds that must be left for a pass
PROLOGUE = "prologue"


@dataclasses.dataclass(frozen=True)
class Config:
    """What is tuned.

    Attributes:
      device: gpu.
      layers: a part of the cases' names; empty for all.
      sparsities: in this order.
      group_size: filters in a group.
      channel_block: the longest runs of channels.
      dtype: of the activations.
      implementations: whose tiles.
      minutes: after so many no pass begins; None: no limit.
      threads: how many programs compile at once.
      repetitions: of each tile.
      journal: JSON-lines file that is continued.
      folder: of the tables; None is the one that the kernels read.
      rows: report of the kernels' benchmark whose layers go into the table; None times tiles.
      quick: a dry run on any device, with two tiny layers and XLA's formulations for tiles; writes
        tables only if `folder` is given.
    """

    device: Literal["gpu"] = "gpu"
    layers: str = ""
    sparsities: tuple[float, ...] = (0.9, 0.8, 0.95)
    group_size: int = 64
    channel_block: int = 16
    dtype: str = "bfloat16"
    implementations: tuple[str, ...] = ("mosaic_gpu", "triton")
    minutes: float | None = None
    threads: int = min(16, os.cpu_count() or 1)
    repetitions: int = 5
    journal: Path = Path("runs/gpu/tune.jsonl")
    folder: Path | None = None
    rows: Path | None = None
    quick: bool = False


class Unit(NamedTuple):
    """One pass of one convolution in one implementation, or `PROLOGUE`."""

    which: Tunable
    spec: ConvSpec
    pass_name: str

    @property
    def group(self) -> str:
        """The kernels that it depends on."""
        return f"{self.which.name} {backend_fingerprint(self.which.name)}"

    @property
    def key(self) -> str:
        """Its key in the journal."""
        table_key = self.which.key(self.spec, self.pass_name)
        return f"tune {this_gpu()} {self.group} {table_key} {self.spec.dtype}"


def main(config: Config) -> bool:
    """Times the tiles that are not in the journal yet, and writes the tables.

    Args:
      config: what to tune.

    Returns:
      Whether all is done.

    Raises:
      ValueError: the device is no GPU, or an unknown layer or implementation.
    """
    if config.rows:
        print(f"wrote {write_layers(config.rows, config.folder)}")
        return True
    clock.require_gpu(config.quick)
    if config.quick:
        config = dataclasses.replace(
            config, implementations=("xla",), sparsities=config.sparsities[:1], repetitions=2
        )
    journal = Journal(config.journal, config.minutes)
    tunables = [tunable(name) for name in config.implementations]
    units = _units(config, tunables)
    try:
        for i, (key, unit) in enumerate(units.items(), 1):
            _tune(config, journal, unit, f"[{i}/{len(units)}] {key}")
            jax.clear_caches()
        return True
    except TimeUp:
        done = sum(key in journal.records for key in units)
        print(f"time is up; {done} of {len(units)} passes are done, the same command continues")
        return False
    finally:
        for which in tunables:
            passes, prologues = _measured(journal, units, which)
            write_table(which, passes, config, prologues)


def _measured(
    journal: Journal, units: dict[str, Unit], which: Tunable
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The journal's results of an implementation: of passes, and of prologues."""
    results: tuple[list[dict[str, Any]], list[dict[str, Any]]] = ([], [])
    for key, unit in units.items():
        if unit.which is which and (result := journal.result(key)):
            results[unit.pass_name == PROLOGUE].append(result)
    return results


def _units(config: Config, tunables: list[Tunable]) -> dict[str, Unit]:
    """The passes to tune by key, each once, in the order in which they are measured."""
    units: dict[str, Unit] = {}
    for sparsity in config.sparsities:
        for case in shapes.cases(config.layers, config.quick):
            spec = shapes.case_spec(
                case,
                sparsity=sparsity,
                group_size=config.group_size,
                channel_block=config.channel_block,
                dtype=config.dtype,
            )
            for which in tunables:
                if reason := which.implementation.supports(spec):
                    print(f"{case.name} {sparsity:.0%}: no {which.name}: {reason}", file=sys.stderr)
                    continue
                timed = (*PASSES, PROLOGUE) if which.implementation.normalises else PASSES
                for pass_name in timed:
                    unit = Unit(which, spec, pass_name)
                    units.setdefault(unit.key, unit)
    return units


def _tune(config: Config, journal: Journal, unit: Unit, title: str) -> None:
    """Times the tiles of one pass, unless the journal has them."""

    def first_run(tile: str, function: Callable[[], float]) -> Any:
        key = f"first {unit.key} {tile}"
        group = f"{unit.group} {tile}"
        result = journal.run(key, function, limit=FIRST_RUN_SECONDS, group=group)
        return journal.error(key) or result

    options: dict[str, Any] = {"threads": config.threads, "repetitions": config.repetitions}
    measure = functools.partial(measure_pass, *unit, first_run=first_run, **options)
    if unit.pass_name == PROLOGUE:
        record = unit.which.implementation
        measure = functools.partial(measure_prologue, record, unit.spec, **options)
    reserve = 0 if config.quick else RESERVE
    result = journal.run(unit.key, measure, reserve=reserve, group=unit.group)
    if result and unit.pass_name == PROLOGUE:
        both = f"{1e3 * result['with']:.1f} us, {1e3 * result['without']:.1f} us without"
        print(f"{title}: {both}", flush=True)
    elif result:
        gain = result["default_milliseconds"] / result["milliseconds"]
        us = 1e3 * result["milliseconds"]
        print(f"{title}: {us:.1f} us, {gain:.2f}x the default", flush=True)


def write_table(
    which: Tunable,
    measured: list[dict[str, Any]],
    config: Config,
    prologues: Sequence[dict[str, Any]] = (),
) -> Path | None:
    """Writes tiles into `tuned_GPU.json`; entries that were not measured here stay.

    Args:
      which: the implementation.
      measured: results of `measure_pass`.
      config: the folder.
      prologues: results of `measure_prologue`.

    Returns:
      The file; None if there is nothing to write.
    """
    if not (measured or prologues) or (config.quick and config.folder is None):
        return None
    path = tuned_tables.path(this_gpu(), config.folder)
    best = {result["key"]: result["best"] for result in measured}
    milliseconds = {
        result["key"]: [result["milliseconds"], result["default_milliseconds"]]
        for result in measured
    }
    tuned_tables.write_tiles(path, which.name, best, milliseconds, tuned_on())
    times = {result["key"]: [result["with"], result["without"]] for result in prologues}
    if times:
        tuned_tables.write_prologues(path, times)
    return path


def cli(arguments: Sequence[str]) -> int:
    """Runs the command.

    Args:
      arguments: without the program's name.

    Returns:
      The exit status.
    """
    clock.record_convolutions()
    config = command.parse(Config, "experiments.bench.tune", __doc__, arguments)
    return command.exit_status(lambda: {"complete": main(config)})
