"""`python -m pallas_kernels.tune --device gpu`: times the candidate tiles of the GPU kernels, and writes the tables that they read.

Layer by layer and pass by pass; resumable: each timed pass is a line in the journal, `--minutes 9` stops in time, the same command goes on,
and the tables are written at every end from all lines. A tile must give what the default tile gives (which the benchmark's check compares
with float64); one that does not, or does not compile, is named in the journal and left out.
"""

import concurrent.futures
import dataclasses
import functools
import importlib
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp

from pallas_kernels import gpu_clock, gpu_shapes, measure
from pallas_kernels.block_sparse_conv import ConvSpec, Implementation, tiles, xla
from pallas_kernels.gpu_journal import STOPPED, Journal, TimeUp, fingerprint

FOLDER = Path(xla.__file__).parent
PASSES = ("forward", "input_gradient", "weight_gradient")
AGREE = {"bfloat16": 1e-2, "float16": 2e-3, "float32": 1e-3}  # relative to the norm; float32 may be tf32
GAIN = 0.98  # another tile than the default must take less than this share of its time


@dataclasses.dataclass(frozen=True)
class Config:
    """What is tuned.

    Attributes:
      device: gpu.
      layers: a part of the cases' names; empty is all.
      sparsities: in this order.
      group_size: filters in a group.
      channel_block: the longest runs of channels.
      dtype: of the activations.
      implementations: whose tiles.
      minutes: no pass begins after them; None: no limit.
      threads: compile at once.
      repetitions: of each tile.
      journal: JSON-lines file that is gone on with.
      folder: of the tables.
      quick: a dry run on any device, two tiny layers and XLA's formulations for tiles; writes no table unless `folder` is another one.
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
    folder: Path = FOLDER
    quick: bool = False


@dataclasses.dataclass(frozen=True)
class Tunable:
    """An implementation that has tiles.

    Attributes:
      name: of the implementation.
      entries: the table's key in its JSON file.
      implementation: the record.
      candidates: (spec, pass) -> tiles, dataclasses; the default need not be among them.
      default: (spec, pass) -> the tile that the rule gives.
      build: (pass, tile) -> a record that runs the pass in this tile.
      key: (spec, pass) -> what the table calls it.
    """

    name: str
    entries: str
    implementation: Implementation
    candidates: Callable[[ConvSpec, str], list[Any]]
    default: Callable[[ConvSpec, str], Any]
    build: Callable[[str, Any], Implementation]
    key: Callable[[ConvSpec, str], str]

    @property
    def fingerprint(self) -> str:
        """Of the sources of its kernels."""
        return fingerprint(FOLDER.glob(f"{self.name}*.py"))


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
      >>> tunable("xla").entries
      'tiles'

    Reference: ours.
    """
    if name == "xla":
        every = xla.FORMULATIONS
        return Tunable(
            name, "tiles", xla.IMPLEMENTATION,
            lambda spec, _: [Formulation(other) for other in ("rows", "rows_batched", "taps") if every[other].supports(spec) is None],
            lambda spec, _: Formulation(tiles.choose(spec)),
            lambda _, tile: every[tile.name],
            lambda spec, pass_name: f"{pass_name} {spec.in_shape} {spec.packed_shape}",
        )  # fmt: skip
    if name not in ("mosaic_gpu", "triton"):
        raise ValueError(f"implementations: expected mosaic_gpu or triton, those that have tiles, got {name!r}")
    package = "pallas_kernels.block_sparse_conv"
    module, own = (importlib.import_module(f"{package}.{part}") for part in (name, f"{name}_tiles"))
    if name == "mosaic_gpu":
        build = lambda pass_name, tile: module.implementation(tiles={pass_name: tile})  # noqa: E731
        return Tunable(name, "entries", module.IMPLEMENTATION, own.candidate_tiles, own.choose_tile, build, own.key)

    def with_tile(pass_name: str, tile: Any) -> Implementation:
        run = functools.partial(getattr(module.IMPLEMENTATION, pass_name), tile=tile)
        return dataclasses.replace(module.IMPLEMENTATION, **{pass_name: run})

    candidates, default = (functools.partial(f, capability=capability()) for f in (own.candidate_tiles, own.choose_tile))
    return Tunable(name, "tiles", module.IMPLEMENTATION, candidates, default, with_tile, own.key)


def capability() -> int:
    """The GPU's compute capability times ten.

    Returns:
      90 for Hopper, and where there is no GPU.

    Reference: ours.
    """
    return int(str(getattr(jax.devices()[0], "compute_capability", "9.0")).replace(".", ""))


def measure_pass(which: Tunable, spec: ConvSpec, pass_name: str, config: Config) -> dict[str, Any]:
    """Times every tile of one pass.

    Args:
      which: the implementation.
      spec: the static sizes.
      pass_name: one of `PASSES`.
      config: threads and repetitions.

    Returns:
      The table's key, the best tile, and for each tile milliseconds or an error.

    Raises:
      RuntimeError: the default tile does not run.

    Reference: ours.
    """
    default = which.default(spec, pass_name)
    candidates = list(dict.fromkeys([default, *which.candidates(spec, pass_name)]))
    sets = gpu_clock.rotate(functools.partial(_pass_operands, spec, pass_name))
    count = gpu_clock.rounds(estimate(spec), sets, 2.0)

    def prepare(tile: Any) -> gpu_clock.Program | str:
        try:
            return gpu_clock.Program(_pass_function(which.build(pass_name, tile), spec, pass_name), sets, count)
        except Exception as error:
            if tile == default:
                raise RuntimeError(f"the default tile does not compile: {error}") from error
            return f"{type(error).__name__}: {error}"[:300]

    with concurrent.futures.ThreadPoolExecutor(max(1, config.threads)) as pool:
        made = dict(zip(candidates, pool.map(prepare, candidates)))
    wanted = made[default].output().astype(jnp.float32)
    found, errors = {}, {}
    for tile, program in made.items():
        if isinstance(program, str):
            errors[tile] = program
            continue
        error = float(jnp.linalg.norm((program.output() - wanted).ravel()) / jnp.linalg.norm(wanted.ravel()))
        if error <= AGREE[spec.dtype]:
            found[tile] = program
        else:
            errors[tile] = f"differs from the default tile by {error:.1e}"
    times = gpu_clock.sample({str(tile): call for tile, call in found.items()}, config.repetitions)
    median = {tile: times[str(tile)]["median"] for tile in found}
    best = min(median, key=median.__getitem__)
    if median[best] > GAIN * median[default]:
        best = default
    timed = [{"tile": dataclasses.asdict(tile), **times[str(tile)]} for tile in found]
    timed += [{"tile": dataclasses.asdict(tile), "error": text} for tile, text in errors.items()]
    return {
        "key": which.key(spec, pass_name), "best": dataclasses.asdict(best), "milliseconds": median[best],
        "default_milliseconds": median[default], **sets.about, "tiles": timed,
    }  # fmt: skip


def estimate(spec: ConvSpec) -> float:
    """A guess at the milliseconds of a pass, just to size the timed loops.

    Args:
      spec: the static sizes.

    Returns:
      Milliseconds.

    Reference: ours.
    """
    size = 4 if spec.dtype == "float32" else 2
    activations = sum(a * b * c * d for a, b, c, d in (spec.in_shape, spec.out_shape))
    work = 2 * spec.density * spec.kernel[0] * spec.kernel[1] * spec.cin * spec.cout * spec.out_height * spec.out_width * spec.batch
    return 1e3 * (2 * size * activations / 3e12 + work / 2e14) + 0.01


def _pass_operands(spec: ConvSpec, pass_name: str, seed: int) -> tuple[jax.Array, ...]:
    x, dy, values, *index = gpu_shapes.operands(spec, seed)
    return {"forward": (x, values), "input_gradient": (dy, values), "weight_gradient": (x, dy)}[pass_name] + tuple(index)


def _pass_function(implementation: Implementation, spec: ConvSpec, pass_name: str) -> Callable[..., jax.Array]:
    return functools.partial(getattr(implementation, pass_name), dataclasses.replace(spec, gradients=pass_name != "forward"))


def main(config: Config) -> bool:
    """Times the tiles that are not in the journal yet, and writes the tables.

    Args:
      config: what to tune.

    Returns:
      Whether all is done.

    Raises:
      ValueError: the device is no GPU, or an unknown layer or implementation.

    Reference: ours.
    """
    gpu_clock.require_gpu(config.quick)
    if config.quick:
        config = dataclasses.replace(config, implementations=("xla",), sparsities=config.sparsities[:1], repetitions=2)
    journal = Journal(config.journal, config.minutes)
    which = [tunable(name) for name in config.implementations]
    todo, units = gpu_shapes.cases(config.layers, config.quick), {}
    size = {"group_size": config.group_size, "channel_block": config.channel_block, "dtype": config.dtype}
    for sparsity in config.sparsities:
        for case in todo:
            spec = gpu_shapes.case_spec(case, sparsity=sparsity, **size)
            for one in which:
                if reason := one.implementation.supports(spec):
                    print(f"{case.name} {sparsity:.0%}: no {one.name}: {reason}", file=sys.stderr)
                    continue
                for pass_name in PASSES:
                    key = f"tune {gpu_clock.gpu()} {one.name} {one.fingerprint} {one.key(spec, pass_name)} {spec.dtype}"
                    units.setdefault(key, (one, spec, pass_name))
    try:
        for i, (key, (one, spec, pass_name)) in enumerate(units.items(), 1):
            if found := journal.run(key, functools.partial(measure_pass, one, spec, pass_name, config)):
                gain = found["default_milliseconds"] / found["milliseconds"]
                print(f"[{i}/{len(units)}] {key}: {1e3 * found['milliseconds']:.1f} us, {gain:.2f}x the default", flush=True)
            jax.clear_caches()
        return True
    except TimeUp:
        print(f"time is up; {sum(key in journal.records for key in units)} of {len(units)} passes are done, the same command goes on")
        return False
    finally:
        for one in which:
            own = {key: journal.result(key) for key, unit in units.items() if unit[0] is one}
            write_table(one, [found for found in own.values() if found], config)


def write_table(which: Tunable, found: list[dict[str, Any]], config: Config) -> Path | None:
    """Writes `tuned_IMPLEMENTATION_GPU.json`; what the table held before and is not measured here stays.

    Args:
      which: the implementation.
      found: results of `measure_pass`.
      config: the folder.

    Returns:
      The file; None where there is nothing to write.

    Reference: ours.
    """
    if not found or (config.quick and config.folder == FOLDER):
        return None
    path = config.folder / f"tuned_{which.name}_{gpu_clock.gpu() or 'none'}.json"
    old = json.loads(path.read_text()) if path.exists() else {}
    best = old.get(which.entries, {}) | {result["key"]: result["best"] for result in found}
    times = old.get("milliseconds", {}) | {result["key"]: [result["milliseconds"], result["default_milliseconds"]] for result in found}
    head = {"environment": measure.environment(), "milliseconds": times}
    lines = ",\n".join(f"{json.dumps(key)}: {json.dumps(tile)}" for key, tile in best.items())
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f'{json.dumps(head)[:-1]},\n"{which.entries}": {{\n{lines}\n}}}}\n')
    return path


def exit_status(finished: bool) -> int:
    """What the command returns to the shell.

    Args:
      finished: whether all is done.

    Returns:
      0, or `STOPPED`.

    Example:
      >>> exit_status(True)
      0

    Reference: ours.
    """
    return 0 if finished else STOPPED
