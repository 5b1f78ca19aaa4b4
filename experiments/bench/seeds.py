"""Times three ways to train several seeds of a small network.

`python -m experiments.bench.seeds` takes about three minutes on 2 CPU cores. One step of every
seed: in turn, each with the whole machine; side by side, a process a seed with a share of the
cores; at once, one program with `vmap` over the seeds. Packed steps are not timed at once: every
seed has its own layouts there.
"""

import dataclasses
import multiprocessing
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.bench import command
from experiments.measuring.environment import origin
from experiments.measuring.memory import steady_memory
from experiments.measuring.timing import call_and_time, median_iqr, time_in_turn, timed
from experiments.reporting import markdown, results
from experiments.reporting.reports import seeds as report_tables
from experiments.training.config import TrainConfig, resolve
from experiments.training.length import Length
from experiments.training.loop import Trainer
from experiments.training.stepper import stepper, stepper_of_seeds

SHAPE, CLASSES = (32, 32, 3), 10
LENGTH = Length(steps_per_epoch=390, total=390 * 160)
STEP = 1  # the number that every timed step has: the masks do not change there


class Case(NamedTuple):
    """What is trained.

    Attributes:
      model: of the zoo.
      width: factor on its channels.
      method: of `experiments.train`.
      batch_size: images in a step.
    """

    model: str
    width: float
    method: str
    batch_size: int


CASES = tuple(
    Case(model, width, method, 64)
    for model, width in (("cnn", 0.25), ("resnet20", 1), ("vgg19", 0.25))
    for method in ("random", "hrbp")
)
QUICK_CASES = (Case("cnn", 0.125, "random", 4), Case("cnn", 0.125, "hrbp", 4))


@dataclasses.dataclass(frozen=True)
class Config:
    """What is timed.

    Attributes:
      seeds: how many are trained.
      rounds: how often each way has its turn.
      out: JSON file; None is experiments/results/bench_seeds_BACKEND.json.
      quick: one narrow network, few steps; writes a file only if `out` is given.
    """

    seeds: int = 2
    rounds: int = 7
    out: str | None = None
    quick: bool = False


def main(config: Config) -> dict[str, Any]:
    """Times the ways, prints the table and writes the JSON file.

    Args:
      config: what is timed.

    Returns:
      The report: a row for each case, device, versions and commit.
    """
    if config.quick:
        config = dataclasses.replace(config, rounds=2)
    steady_memory()
    report = origin() | {"config": results.settings(config)}
    cases = QUICK_CASES if config.quick else CASES
    report["rows"] = [_time(case, config) for case in cases]
    markdown.show(report_tables.table(report))
    if config.out or not config.quick:
        name = f"bench_seeds_{jax.default_backend()}.json"
        results.write(report, config.out or results.RESULTS / name)
    return report


def _time(case: Case, config: Config) -> dict[str, Any]:
    seeds = range(config.seeds)
    trainers = [_trainer(case, seed) for seed in seeds]
    batches = [_batch(case, seed) for seed in seeds]
    states = [trainer.init(batch) for trainer, batch in zip(trainers, batches, strict=True)]
    singles = [
        stepper(trainer, state, STEP, *batch)
        for trainer, state, batch in zip(trainers, states, batches, strict=True)
    ]
    calls = {"in_turn": timed(lambda: [single() for single in singles])}
    if trainers[0].config.execution == "masked":
        images, labels = map(jnp.stack, zip(*batches, strict=True))
        calls["at_once"] = timed(stepper_of_seeds(trainers[0], states, images, labels))
    with ExitStack() as stack:
        if jax.default_backend() == "cpu":  # processes cannot share a GPU's memory by default
            calls["side_by_side"] = stack.enter_context(_side_by_side(case, config.seeds))
        times = time_in_turn(calls, rounds=config.rounds)
    row = case._asdict() | {"execution": trainers[0].config.execution, "seeds": config.seeds}
    for name in ("in_turn", "side_by_side", "at_once"):
        row[f"{name}_ms"], row[f"{name}_ms_iqr"] = median_iqr(times.get(name, ()))
    return row


@contextmanager
def _side_by_side(case: Case, seeds: int) -> Iterator[Callable[[], float]]:
    """A process for each seed: a function that lets all of them make a step, in milliseconds."""
    context = multiprocessing.get_context("spawn")  # a forked JAX hangs
    cores = sorted(os.sched_getaffinity(0))
    shares = [cores[seed::seeds] or cores for seed in range(seeds)]
    pipes, children = [], []
    for seed, share in enumerate(shares):
        ours, theirs = context.Pipe()
        pipes.append(ours)
        children.append(
            context.Process(target=_child, args=(theirs, case, seed, share), daemon=True)
        )
        children[-1].start()
        theirs.close()

    def step() -> float:
        for pipe in pipes:
            pipe.send(True)
        return max(pipe.recv() for pipe in pipes)

    try:
        for pipe in pipes:
            pipe.recv()  # it is ready
        yield step
    finally:
        for pipe in pipes:
            pipe.close()
        for child in children:
            child.join()


def _child(pipe: Connection, case: Case, seed: int, cores: Sequence[int]) -> None:
    os.sched_setaffinity(0, cores)  # before JAX counts them
    steady_memory()
    trainer, batch = _trainer(case, seed), _batch(case, seed)
    step = stepper(trainer, trainer.init(batch), STEP, *batch)
    pipe.send(call_and_time(step)[1])
    try:
        while pipe.recv():
            pipe.send(call_and_time(step)[1])
    except EOFError:
        return


def _trainer(case: Case, seed: int) -> Trainer:
    config = TrainConfig(
        dataset="cifar10",
        model=case.model,
        width=case.width,
        method=case.method,
        sparsity=0.9,
        batch_size=case.batch_size,
        seed=seed,
    )
    return Trainer(resolve(config), SHAPE, CLASSES, LENGTH)


def _batch(case: Case, seed: int) -> tuple[Any, Any]:
    rng = np.random.default_rng(seed)
    images = rng.normal(size=(case.batch_size, *SHAPE))
    labels = rng.integers(0, CLASSES, case.batch_size)
    return jnp.asarray(images, jnp.float32), jnp.asarray(labels, jnp.int32)


def cli(arguments: Sequence[str]) -> int:
    """Runs the command.

    Args:
      arguments: without the program's name.

    Returns:
      The exit status.
    """
    return command.run(Config, main, "experiments.bench.seeds", __doc__, arguments)


if __name__ == "__main__":
    raise SystemExit(cli(sys.argv[1:]))
