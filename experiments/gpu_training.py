"""The GPU part of bench_training: whole steps, dense NHWC beside masked, sparse and packed, each a resumable unit.

Steps are dispatched ahead as in training, with one wait behind many. The first step's loss must be that of the masked execution before
anything is timed. `--minutes 9` stops in time with exit status 75, and the same command goes on; `--quick` is a dry run on any device.
"""

import dataclasses
import functools
import gc
import json
import os
import sys
import time
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from experiments import gpu_layers, gpu_tables
from experiments.config import TrainConfig, resolve
from experiments.environment import commit, device, versions
from experiments.loop import Trainer, stepper
from experiments.methods import Length
from experiments.timing import median_iqr
from pallas_kernels import gpu_clock
from pallas_kernels.gpu_journal import LOST, STOPPED, DeviceLost, Journal, TimeUp, fingerprint

RESULTS = Path(__file__).parent / "results"
STEP = 1  # its number: no mask update falls on it
AGREE = {"float32": 1e-3, "bfloat16": 2e-2}
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
      implementation: of the block-sparse conv; None picks.
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
    implementation: str | None = None
    group_size: int = 64
    channel_block: int = 16
    repetitions: int = 7
    minutes: float | None = None
    journal: Path = Path("runs/gpu/bench_training.jsonl")
    out: Path | None = None
    quick: bool = False


def main(config: GpuTrainingConfig) -> dict[str, Any]:
    """Times the steps that are not in the journal yet, prints the table and writes the report of what is there.

    Args:
      config: what is timed.

    Returns:
      The report; "complete" says whether everything is in it.

    Raises:
      ValueError: the device is no GPU, or no such network.

    Reference: ours.
    """
    gpu_clock.require_gpu(config.quick)
    if config.quick:
        config = dataclasses.replace(config, repetitions=2, group_size=8, channel_block=1)
    networks = [network for network in (QUICK if config.quick else NETWORKS) if config.models in network.model]
    if not networks:
        raise ValueError(f"models: no network's name contains {config.models!r}; e.g. {NETWORKS[0].model!r}")
    journal, complete, units = Journal(config.journal, config.minutes, unit_seconds=480), False, {}
    for network in networks:
        names = [("dense", 0.0), *((e, s) for s in network.sparsities for e in ("masked", "sparse", "packed"))]
        units |= {(network, execution, sparsity): _key(config, network, execution, sparsity) for execution, sparsity in names}
    try:
        for (network, execution, sparsity), key in units.items():
            masked = journal.result(units.get((network, "masked", sparsity), "")) if execution in ("sparse", "packed") else None
            wanted = masked["loss"] if masked else None
            journal.run(key, functools.partial(measure_steps, config, network, execution, sparsity, wanted))
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
        print(f"<!-- table:bench_training_gpu -->\n{gpu_tables.training(report)}<!-- /table -->")
    return report


def _key(config: GpuTrainingConfig, network: Network, execution: str, sparsity: float) -> str:
    """Dense and masked steps hold for any kernels, the others for these."""
    root = Path(__file__).parents[1]
    models = fingerprint([Path(__file__).parent / "loop.py", *(Path(__file__).parent / "models").glob("*.py")])
    kernels = fingerprint([*(root / "pallas_kernels" / "block_sparse_conv").glob("*"), *(root / "blocksparse_jax").rglob("*.py")])
    own = f"{models} {kernels} {config.implementation}" if execution in ("sparse", "packed") else models
    size = f"{network.width:g} n{network.batch_size} {network.image_size} {config.precision} g{config.group_size} b{config.channel_block}"
    return f"step {gpu_clock.gpu()} jax {jax.__version__} {network.model} {size} {execution} {sparsity:g} {own}"


def measure_steps(config: GpuTrainingConfig, network: Network, execution: str, sparsity: float, wanted: float | None) -> dict[str, Any]:
    """Times the training step of one execution.

    Args:
      config: precision and repetitions.
      network: which.
      execution: dense, masked, sparse or packed.
      sparsity: of HRBP.
      wanted: the loss of the first step in the masked execution.

    Returns:
      The first loss, milliseconds of a step (median, interquartile range), and how many steps stand before one wait.

    Raises:
      AssertionError: the first loss is another.

    Reference: ours.
    """
    classes, size = (1000 if network.dataset == "imagenet2012" else 10), network.image_size
    rng = np.random.default_rng(0)
    images = jnp.asarray(rng.normal(size=(network.batch_size, size, size, 3)), jnp.float32)
    labels = jnp.asarray(rng.integers(0, classes, network.batch_size), jnp.int32)
    dense = execution == "dense"
    train = TrainConfig(
        dataset=network.dataset, model=network.model, method="dense" if dense else "hrbp", sparsity=sparsity,
        execution="masked" if dense else execution, precision=config.precision, width=network.width, batch_size=network.batch_size,
        implementation=config.implementation, group_size=config.group_size, channel_block=config.channel_block,
    )  # fmt: skip
    trainer = Trainer(resolve(train), images.shape[1:], classes, Length(steps_per_epoch=390, total=390 * 160), "NHWC")
    step = stepper(trainer, trainer.init(), STEP, images, labels)
    loss = float(step()[1].loss)
    agree(execution, loss, wanted, config.precision)

    def burst(steps: int) -> float:
        start = time.perf_counter()
        for _ in range(steps):
            out = step()
        jax.block_until_ready(out)
        return 1e3 * (time.perf_counter() - start) / steps

    burst(2)
    steps = 2 if config.quick else int(min(100, max(3, BURST / burst(3))))
    median, iqr = median_iqr([burst(steps) for _ in range(config.repetitions)])
    return {"loss": loss, "step_ms_median": median, "step_ms_iqr": iqr, "steps": steps, "repetitions": config.repetitions}


def agree(execution: str, loss: float, wanted: float | None, precision: str) -> None:
    """Compares the loss of the first step with the masked execution's.

    Args:
      execution: sparse or packed.
      loss: its loss.
      wanted: the masked execution's; None where it was not measured or has no counterpart.
      precision: of the activations.

    Raises:
      AssertionError: they differ.

    Reference: ours.
    """
    if wanted is not None and not abs(loss - wanted) <= AGREE[precision] * abs(wanted):
        raise AssertionError(f"{execution}: the first step's loss is {loss}, that of the masked execution {wanted}; nothing was timed")


def _report(config: GpuTrainingConfig, journal: Journal, units: dict[tuple[Network, str, float], str], complete: bool) -> dict[str, Any]:
    rows = []
    for (network, execution, sparsity), key in units.items():
        if not (found := journal.result(key)):
            continue
        dense = journal.result(units[network, "dense", 0.0])
        up = round(dense["step_ms_median"] / found["step_ms_median"], 3) if dense else None
        about = {name: value for name, value in dataclasses.asdict(network).items() if name != "sparsities"}
        about |= {"sparsity": sparsity, "execution": execution, "precision": config.precision}
        data_format = "NHWC" if execution in ("dense", "masked") else "CHWN"
        rows.append(about | {"data_format": data_format} | found | {"speed_up_over_dense": up})
    told = {name: value for name, value in dataclasses.asdict(config).items() if name not in ("journal", "out")}
    return {
        "rows": rows, "device": device(), "versions": versions(), "commit": commit() or os.environ.get("COMMIT"), "config": told,
        "complete": complete, "failed": {key: error for key in units.values() if (error := journal.error(key))},
        "tiles": {name: gpu_layers.sources(name) for name in ("mosaic_gpu", "triton")},
    }  # fmt: skip


def run(config: GpuTrainingConfig) -> int:
    """The command.

    Args:
      config: what is timed.

    Returns:
      The exit status: 0, 1 when something failed, 2 for a wrong argument, 70 when the device is lost, 75 when time was up.

    Reference: ours.
    """
    try:
        report = main(config)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except DeviceLost as unit:
        print(f"the device is lost at {unit}; the same command goes on behind it", file=sys.stderr)
        return LOST
    if not report["complete"]:
        return STOPPED
    return 1 if report["failed"] else 0
