"""`python -m experiments.bench.tune --device gpu`: times the candidate tiles of the GPU kernels,
and writes the tables that they read.

Layer by layer and pass by pass; resumable: each timed pass is a line in the journal, `--minutes 9`
stops in time, the same command goes on, and the tables are written at every end from all lines. A
tile must give what the default tile gives (which the benchmark's check compares with float64); one
that does not, or does not compile, is named in the journal and left out. The first run of each tile
is a unit of its own: one that hangs or loses the device is left out when the pass is tuned again.
"""

import concurrent.futures
import dataclasses
import functools
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp

from experiments.bench.environment import tuned_on
from experiments.bench.gpu import clock as gpu_clock
from experiments.bench.gpu import shapes as gpu_shapes
from experiments.bench.gpu.journal import Journal, TimeUp
from experiments.bench.gpu.tiles import PASSES, Tunable, few, tunable
from pallas_kernels.block_sparse_conv import ConvSpec, Implementation, tuned_tables
from pallas_kernels.block_sparse_conv.tuned_tables import FOLDER

AGREE = {
    "bfloat16": 1e-2,
    "float16": 2e-3,
    "float32": 1e-3,
}  # relative to the norm; float32 may be tf32
GAIN = 0.98  # another tile than the default must take less than this share of its time
FIRST, RESERVE = (
    30,
    20,
)  # seconds: of a tile's first run before it hangs; what must be left for a pass
MILLISECONDS = 10.0  # of a timed program, or longer
BYTES, FLOPS, LAUNCH = (
    4.3e12,
    7.9e14,
    2e-3,
)  # what an H200 does in a second at most, and the least milliseconds of a launch


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
      quick: a dry run on any device, two tiny layers and XLA's formulations for tiles; writes no
        table unless `folder` is another one.
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


def measure_pass(
    which: Tunable, spec: ConvSpec, pass_name: str, config: Config, first_run: Callable[..., Any]
) -> dict[str, Any]:
    """Times some tiles of one pass.

    Args:
      which: the implementation.
      spec: the static sizes.
      pass_name: one of `PASSES`.
      config: threads and repetitions.
      first_run: `(tile's name, function) -> the function's result`, or the text of its error, now
        or in an earlier process.

    Returns:
      The table's key, the best tile, and for each tile milliseconds or an error.

    Raises:
      RuntimeError: the default tile does not run.
    """
    candidates = few(which, spec, pass_name)
    default = candidates[0]
    sets = gpu_clock.rotate(functools.partial(_pass_operands, spec, pass_name))
    count = gpu_clock.rounds(estimate(spec), sets, MILLISECONDS if gpu_clock.gpu() else None)

    def prepare(tile: Any) -> gpu_clock.Program | str:
        try:
            return gpu_clock.Program(
                _pass_function(which.build(pass_name, tile), spec, pass_name), sets, count
            )
        except Exception as error:
            return f"{type(error).__name__}: {error}"[:300]

    def differs(program: gpu_clock.Program) -> float:
        return float(
            jnp.linalg.norm((program.output() - wanted).ravel()) / jnp.linalg.norm(wanted.ravel())
        )

    with concurrent.futures.ThreadPoolExecutor(max(1, config.threads)) as pool:
        made = dict(zip(candidates, pool.map(prepare, candidates)))
    if isinstance(made[default], str):
        raise RuntimeError(f"the default tile does not compile: {made[default]}")
    wanted = made[default].output().astype(jnp.float32)
    found, errors = {}, {}
    for tile, program in made.items():
        error = (
            program
            if isinstance(program, str)
            else first_run(str(tile), functools.partial(differs, program))
        )
        if isinstance(error, float) and error <= AGREE[spec.dtype]:
            found[tile] = program
        else:
            errors[tile] = (
                f"differs from the default tile by {error:.1e}"
                if isinstance(error, float)
                else error
            )
    if default not in found:
        raise RuntimeError(f"the default tile does not run: {errors[default]}")
    times = gpu_clock.sample({str(tile): call for tile, call in found.items()}, config.repetitions)
    median = {tile: times[str(tile)]["median"] for tile in found}
    best = min(median, key=median.__getitem__)
    if median[best] > GAIN * median[default]:
        best = default
    timed = [{"tile": dataclasses.asdict(tile), **times[str(tile)]} for tile in found]
    timed += [{"tile": dataclasses.asdict(tile), "error": text} for tile, text in errors.items()]
    return {
        "key": which.key(spec, pass_name),
        "best": dataclasses.asdict(best),
        "milliseconds": median[best],
        "default_milliseconds": median[default],
        **sets.about,
        "tiles": timed,
    }


def estimate(spec: ConvSpec) -> float:
    """The least milliseconds that a pass can take, to size the timed loops; dense or sparse, the
    loops last alike.

    Args:
      spec: the static sizes.

    Returns:
      Milliseconds.
    """
    size = 4 if spec.dtype == "float32" else 2
    activations = sum(a * b * c * d for a, b, c, d in (spec.in_shape, spec.out_shape))
    work = (
        2
        * spec.density
        * spec.kernel[0]
        * spec.kernel[1]
        * spec.cin
        * spec.cout
        * spec.out_height
        * spec.out_width
        * spec.batch
    )
    return max(1e3 * size * activations / BYTES, 1e3 * work / FLOPS, LAUNCH)


def _pass_operands(spec: ConvSpec, pass_name: str, seed: int) -> tuple[jax.Array, ...]:
    x, dy, values, *index = gpu_shapes.operands(spec, seed)
    return {"forward": (x, values), "input_gradient": (dy, values), "weight_gradient": (x, dy)}[
        pass_name
    ] + tuple(index)


def _pass_function(
    implementation: Implementation, spec: ConvSpec, pass_name: str
) -> Callable[..., jax.Array]:
    return functools.partial(
        getattr(implementation, pass_name),
        dataclasses.replace(spec, gradients=pass_name != "forward"),
    )


def main(config: Config) -> bool:
    """Times the tiles that are not in the journal yet, and writes the tables.

    Args:
      config: what to tune.

    Returns:
      Whether all is done.

    Raises:
      ValueError: the device is no GPU, or an unknown layer or implementation.
    """
    gpu_clock.require_gpu(config.quick)
    if config.quick:
        config = dataclasses.replace(
            config, implementations=("xla",), sparsities=config.sparsities[:1], repetitions=2
        )
    journal = Journal(config.journal, config.minutes)
    which = [tunable(name) for name in config.implementations]
    todo, units = gpu_shapes.cases(config.layers, config.quick), {}
    size = {
        "group_size": config.group_size,
        "channel_block": config.channel_block,
        "dtype": config.dtype,
    }
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

    def first_run(key: str, group: str, tile: str, function: Callable[[], float]) -> Any:
        """Of a tile: a unit inside of the pass."""
        result = journal.run(f"first {key} {tile}", function, limit=FIRST, group=f"{group} {tile}")
        return journal.error(f"first {key} {tile}") or result

    try:
        for i, (key, (one, spec, pass_name)) in enumerate(units.items(), 1):
            group = f"{one.name} {one.fingerprint}"
            run = functools.partial(
                measure_pass, one, spec, pass_name, config, functools.partial(first_run, key, group)
            )
            if found := journal.run(key, run, reserve=0 if config.quick else RESERVE, group=group):
                gain = found["default_milliseconds"] / found["milliseconds"]
                print(
                    f"[{i}/{len(units)}] {key}: {1e3 * found['milliseconds']:.1f} us, {gain:.2f}x "
                    f"the default",
                    flush=True,
                )
            jax.clear_caches()
        return True
    except TimeUp:
        print(
            f"time is up; {sum(key in journal.records for key in units)} of {len(units)} passes "
            f"are done, the same command goes on"
        )
        return False
    finally:
        for one in which:
            own = {key: journal.result(key) for key, unit in units.items() if unit[0] is one}
            write_table(one, [found for found in own.values() if found], config)


def write_table(which: Tunable, found: list[dict[str, Any]], config: Config) -> Path | None:
    """Writes `tuned_IMPLEMENTATION_GPU.json`; what the table held before and is not measured here
    stays.

    Args:
      which: the implementation.
      found: results of `measure_pass`.
      config: the folder.

    Returns:
      The file; None where there is nothing to write.
    """
    if not found or (config.quick and config.folder == FOLDER):
        return None
    path = tuned_tables.path(which.name, gpu_clock.gpu(), config.folder)
    tiles = {result["key"]: result["best"] for result in found}
    times = {
        result["key"]: [result["milliseconds"], result["default_milliseconds"]] for result in found
    }
    head = {"environment": tuned_on(), "milliseconds": times}
    lines = ",\n".join(f"{json.dumps(key)}: {json.dumps(tile)}" for key, tile in best.items())
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f'{json.dumps(head)[:-1]},\n"{which.entries}": {{\n{lines}\n}}}}\n')
    return path
