"""The GPU part of bench_training: whole steps, dense NHWC beside masked, sparse and packed, each a
resumable unit.

The sparse and packed steps run once for each implementation, in each layer that it serves; the
others go to triton, then to dense, and the row says so. Before anything is timed, each convolution
of the step must agree with float64, and the first step as a whole with the masked one. Steps are
dispatched ahead as in training, with one wait behind many. `--minutes 9` stops in time with exit
status 75, and the same command goes on; `--quick` is a dry run on any device.
"""

import dataclasses
import functools
import gc
import json
import sys
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from experiments.bench.environment import origin
from experiments.bench.gpu import check as gpu_check
from experiments.bench.gpu import clock as gpu_clock
from experiments.bench.gpu import layers as gpu_layers
from experiments.bench.gpu import shapes as gpu_shapes
from experiments.bench.gpu import steps as gpu_steps
from experiments.bench.gpu.journal import Journal, TimeUp, exit_status, fingerprint
from experiments.bench.timing import median_iqr, time_in_turn
from experiments.reporting.reports import gpu_training as training_report
from experiments.training.config import TrainConfig, resolve
from experiments.training.execution import masks_of, to_form
from experiments.training.length import Length
from experiments.training.loop import Trainer, stepper
from experiments.training.methods import Hrbp

RESULTS = Path(__file__).parents[2] / "results"
STEP = 1  # its number: no mask update falls on it
RESERVE, LAYER = (
    90,
    60,
)  # seconds: that must be left for a unit; after which the check of a layer hangs
BURST = 300.0  # milliseconds of steps behind which one wait stands


@dataclasses.dataclass(frozen=True)
class Network:
    """A network as it is timed.

    Attributes:
      model: of the zoo.
      batch_size: images per step.
      sparsities: of static HRBP.
      width: factor on the channels.
      dataset: gives classes and stem.
      image_size: pixels.
    """

    model: str
    batch_size: int
    sparsities: tuple[float, ...]
    width: float = 1
    dataset: str = "cifar10"
    image_size: int = 32


NETWORKS = (
    Network("vgg19", 128, (0.9, 0.95)),
    Network("resnet32", 1024, (0.9,), width=2),
    Network("resnet50", 256, (0.8, 0.9), dataset="imagenet2012", image_size=224),
    Network("vgg19", 1024, (0.9, 0.95)),
    Network("resnet32", 128, (0.9,), width=2),
)
QUICK = (Network("cnn", 4, (0.9,), image_size=8),)


@dataclasses.dataclass(frozen=True)
class GpuTrainingConfig:
    """What is timed.

    Attributes:
      device: gpu.
      models: a part of the networks' names; empty is all.
      precision: bfloat16 or float32.
      implementations: of the block-sparse conv, the most wanted first.
      group_size: filters in a group.
      channel_block: runs of channels.
      repetitions: bursts of steps.
      minutes: no unit begins after them; None: no limit.
      journal: JSON-lines file that is gone on with.
      out: JSON file; None is experiments/results/bench_training_gpu.json.
      quick: one tiny network on any device, written nowhere unless `out` is given.
    """

    device: Literal["gpu"] = "gpu"
    models: str = ""
    precision: str = "bfloat16"
    implementations: tuple[str, ...] = ("mosaic_gpu", "triton")
    group_size: int = 64
    channel_block: int = 16
    repetitions: int = 7
    minutes: float | None = None
    journal: Path = Path("runs/gpu/bench_training.jsonl")
    out: Path | None = None
    quick: bool = False


def main(config: GpuTrainingConfig) -> dict[str, Any]:
    """Times the steps that are not in the journal yet, prints the table and writes the report of
    what is there.

    Args:
      config: what is timed.

    Returns:
      The report; "complete" says whether everything is in it.

    Raises:
      ValueError: the device is no GPU, or no such network.
    """
    gpu_clock.require_gpu(config.quick)
    if config.quick:
        config = dataclasses.replace(
            config, repetitions=2, group_size=8, channel_block=1, implementations=("xla",)
        )
    networks = [
        network
        for network in (QUICK if config.quick else NETWORKS)
        if config.models in network.model
    ]
    if not networks:
        raise ValueError(
            f"models: no network's name contains {config.models!r}; e.g. {NETWORKS[0].model!r}"
        )
    journal, complete = Journal(config.journal, config.minutes, unit_seconds=480), False
    units = {unit: _key(config, unit) for unit in _units(config, networks)}
    try:
        for unit, key in units.items():
            masked = journal.result(
                units.get(dataclasses.replace(unit, execution="masked", implementation=""), "")
            )
            measure = functools.partial(
                measure_steps, config, unit, masked and masked["sketch"], journal
            )
            group = (
                f"{unit.implementation} {gpu_layers.sources(unit.implementation)}"
                if unit.implementation
                else ""
            )
            journal.run(key, measure, reserve=0 if config.quick else RESERVE, group=group)
            jax.clear_caches(), gc.collect()
        complete = True
    except TimeUp as unit:
        print(f"time is up before {unit}; the same command goes on", file=sys.stderr)
    finally:
        report = _report(config, journal, units, complete)
        path = config.out or (None if config.quick else RESULTS / "bench_training_gpu.json")
        if path and report["rows"]:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(report, indent=2) + "\n")
    if report["rows"]:
        print(f"<!-- table:bench_training_gpu -->\n{training_report.table(report)}<!-- /table -->")
    return report


@dataclasses.dataclass(frozen=True)
class Unit:
    """One timed step: a network in an execution, the sparse and packed ones in an implementation."""

    network: Network
    execution: str
    sparsity: float = 0.0
    implementation: str = ""


def _units(config: GpuTrainingConfig, networks: list[Network]) -> list[Unit]:
    """First the packed step in the most wanted implementation with what it is compared to, of all
    networks; then the rest.
    """
    present = {
        name for name, one in gpu_check.implementations().items() if not isinstance(one, str)
    }
    names = [name for name in config.implementations if name in present]
    first, rest = [], []
    for network in networks:
        first.append(Unit(network, "dense"))
        for sparsity in network.sparsities:
            own = [
                Unit(network, execution, sparsity, name)
                for execution in ("packed", "sparse")
                for name in names
            ]
            first += [Unit(network, "masked", sparsity), *own[:1]]
            rest += own[1:]
    return first + rest


def _key(config: GpuTrainingConfig, unit: Unit) -> str:
    """Dense and masked steps hold for any kernels; the others for these, in the tiles of the
    network's layers that the benchmark times.
    """
    network, root = unit.network, Path(__file__).parents[3]
    own = fingerprint(
        [
            root / "experiments" / "training" / "loop.py",
            *(root / "experiments" / "models").glob("*.py"),
        ]
    )
    if unit.implementation:
        block = {"group_size": config.group_size, "channel_block": config.channel_block}
        cases = (
            []
            if config.quick
            else [
                case for case in gpu_shapes.cases(network.model) if case.batch == network.batch_size
            ]
        )
        specs = [
            gpu_shapes.case_spec(case, sparsity=unit.sparsity, dtype=config.precision, **block)
            for case in cases
        ]
        names = dict.fromkeys((unit.implementation, "triton"))
        tiles = zlib.crc32(
            str([gpu_layers.tiles(name, spec) for spec in specs for name in names]).encode()
        )
        own += f" {fingerprint((root / 'blocksparse_jax').rglob('*.py'))} {unit.implementation}"
        own += f" {' '.join(gpu_layers.sources(name) for name in names)} {tiles:08x}"
    size = f"{network.width:g} n{network.batch_size} {network.image_size} {config.precision} g{config.group_size} b{config.channel_block}"
    return f"step {gpu_clock.gpu()} jax {jax.__version__} {network.model} {size} {unit.execution} {unit.sparsity:g} {own}"


def measure_steps(
    config: GpuTrainingConfig, unit: Unit, wanted: dict[str, list[float]] | None, journal: Journal
) -> dict[str, Any]:
    """Times the training step of one execution.

    Args:
      config: precision and repetitions.
      unit: which.
      wanted: the sketch of the first step in the masked execution.
      journal: of the checks of the layers, units inside of this one.

    Returns:
      The first loss, milliseconds of a step (median, interquartile range), how many steps stand
      before one wait, and for sparse and packed who served how many layers and how near the first
      step is to the masked one; for masked that step's sketch.

    Raises:
      AssertionError: a layer is wrong, or the first step another.
    """
    if not unit.implementation:
        return _measure(config, unit, None, lambda own: {"sketch": own})
    served = gpu_steps.Fallback(unit.implementation)

    def compare(own: dict[str, list[float]]) -> dict[str, Any]:
        for spec, record in served.specs.items():
            if record.name != "dense":
                key = f"layer {gpu_clock.gpu()} jax {jax.__version__} {record.name} {gpu_layers.sources(record.name, spec)} {spec}"
                if not journal.run(
                    key, functools.partial(gpu_steps.check_layer, spec, record), limit=LAYER
                ):
                    raise AssertionError(
                        f"{unit.execution}, {unit.implementation}: {journal.error(key)}"
                    )
        return {
            "cosine": gpu_steps.agree(
                f"{unit.execution}, {unit.implementation}", own, wanted, config.precision
            )
        }

    with served.registered() as name:
        found = _measure(config, unit, name, compare)
    return found | {"layers": served.layers(), "refused": served.refused}


def _measure(
    config: GpuTrainingConfig,
    unit: Unit,
    implementation: str | None,
    compare: Callable[[Any], dict[str, Any]],
) -> dict[str, Any]:
    network, execution = unit.network, unit.execution
    classes, size = (1000 if network.dataset == "imagenet2012" else 10), network.image_size
    rng = np.random.default_rng(0)
    images = jnp.asarray(rng.normal(size=(network.batch_size, size, size, 3)), jnp.float32)
    labels = jnp.asarray(rng.integers(0, classes, network.batch_size), jnp.int32)
    dense = execution == "dense"
    train = TrainConfig(
        dataset=network.dataset,
        model=network.model,
        method="dense" if dense else "hrbp",
        sparsity=unit.sparsity,
        execution="masked" if dense else execution,
        precision=config.precision,
        width=network.width,
        batch_size=network.batch_size,
        implementation=implementation,
        options=None
        if dense
        else Hrbp(group_size=config.group_size, channel_block=config.channel_block),
    )
    trainer = Trainer(
        resolve(train),
        images.shape[1:],
        classes,
        Length(steps_per_epoch=390, total=390 * 160),
        "NHWC",
    )
    state = trainer.init()
    step = stepper(trainer, state, STEP, images, labels)
    after, metrics = step()
    found: dict[str, Any] = {"loss": float(metrics.loss)}
    if not dense:
        own = gpu_steps.sketch(
            to_form("masked", state).params, to_form("masked", after).params, masks_of(state)
        )
        found |= compare(own)
    del state, after

    def burst(steps: int) -> float:
        start = time.perf_counter()
        for _ in range(steps):
            out = step()
        jax.block_until_ready(out)
        return 1e3 * (time.perf_counter() - start) / steps

    burst(2)
    steps = 2 if config.quick else int(min(100, max(3, BURST / burst(3))))
    timed_steps = {"step": functools.partial(burst, steps)}
    times = time_in_turn(timed_steps, rounds=config.repetitions, burst_ms=0)
    median, iqr = median_iqr(times["step"])
    return found | {
        "step_ms_median": median,
        "step_ms_iqr": iqr,
        "steps": steps,
        "repetitions": config.repetitions,
    }


def _report(
    config: GpuTrainingConfig, journal: Journal, units: dict[Unit, str], complete: bool
) -> dict[str, Any]:
    rows = []
    for unit, key in units.items():
        if not (found := journal.result(key)):
            continue
        dense = journal.result(units[Unit(unit.network, "dense")])
        up = round(dense["step_ms_median"] / found["step_ms_median"], 3) if dense else None
        about = {
            name: value
            for name, value in dataclasses.asdict(unit.network).items()
            if name != "sparsities"
        }
        about |= {
            "sparsity": unit.sparsity,
            "execution": unit.execution,
            "implementation": unit.implementation,
        }
        about |= {
            "precision": config.precision,
            "data_format": "CHWN" if unit.implementation else "NHWC",
            "speed_up_over_dense": up,
        }
        rows.append(about | {name: value for name, value in found.items() if name != "sketch"})
    told = {
        name: value
        for name, value in dataclasses.asdict(config).items()
        if name not in ("journal", "out")
    }
    return {
        "rows": rows,
        **origin(),
        "config": told,
        "complete": complete,
        "failed": {key: error for key in units.values() if (error := journal.error(key))},
        "tiles": {name: gpu_layers.sources(name) for name in ("mosaic_gpu", "triton")},
    }


def run(config: GpuTrainingConfig) -> int:
    """The command.

    Args:
      config: what is timed.

    Returns:
      The exit status: 0, 1 when something failed, 2 for a wrong argument, 70 when the device is
      lost, 75 when time was up.
    """
    return exit_status(lambda: main(config))
