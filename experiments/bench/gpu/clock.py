"""Device times of GPU programs, with one synchronization for many launches.

A loop of known length runs on the device without the host looking in between. Its body calls the
function once on each of several sets of operands. Optimization barriers chain the calls: each waits
for the one before, nothing is hoisted out of the loop, merged or dropped, and the outputs stay
alive.

The time includes what the program does once, before and after the loop (zeros where the outputs
will be, operands into the layout that the loop prefers), so a program must be long: `rounds` counts
from the least time that a launch can take, and `build` repeats a program that turns out too short.
Sets that together exceed the L2 cache are read from memory, as in a training step; small ones stay
in the cache, and the report says so.
"""

import concurrent.futures
import dataclasses
import os
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from experiments.measuring.timing import time_in_turn, time_record, timed
from pallas_kernels.devices import this_device, this_gpu

MOST_SETS = 4
RECORD_CONVOLUTIONS = "--xla_gpu_enable_command_buffer=+CONVOLUTION"
PROGRAM_MS = 30.0  # a timed program takes so long or longer
DRY_RUN_MS = 0.3  # the same where there is no GPU and the numbers mean nothing
MOST_ROUNDS = 20_000


@dataclasses.dataclass(frozen=True)
class Sets:
    """Operands to rotate through.

    Attributes:
      operands: sets of equal shapes.
      nbytes: of all of them.
    """

    operands: tuple[tuple[jax.Array, ...], ...]
    nbytes: int

    def describe(self) -> dict[str, Any]:
        """Returns what a report says: how many sets, their size, and whether L2 holds them."""
        return {
            "sets": len(self.operands),
            "megabytes": round(self.nbytes / 1e6, 1),
            "l2": "cold" if self.nbytes >= 2 * this_device().l2_bytes else "warm",
        }


def rotate(make: Callable[[int], tuple[jax.Array, ...]], most: int = MOST_SETS) -> Sets:
    """Makes as many sets of operands as fill the L2 cache twice.

    Args:
      make: seed -> one set.
      most: sets at most.

    Returns:
      The sets.

    Example:
      >>> rotate(lambda seed: (jnp.ones(3),)).describe()
      {'sets': 4, 'megabytes': 0.0, 'l2': 'warm'}
    """
    sets = [make(0)]
    nbytes = sum(array.nbytes for array in sets[0])
    count = -(-2 * this_device().l2_bytes // max(nbytes, 1))
    sets += [make(seed) for seed in range(1, min(most, count))]
    return Sets(tuple(sets), len(sets) * nbytes)


def chained(function: Callable[..., Any], count: int) -> Any:
    """Returns the program that is timed: `count` rounds of one call for each set.

    Args:
      function: of one set of operands; returns arrays.
      count: rounds; static, so that the loop need not test a condition.

    Returns:
      A jitted function of the sets; returns the last outputs of each.

    Example:
      >>> one = jnp.ones(2)
      >>> [a.tolist() for a in chained(lambda a, b: a + 2 * b, 3)((one, one), (one, one))]
      [[3.0, 3.0], [3.0, 3.0]]
    """

    def program(*sets: tuple[jax.Array, ...]) -> Any:
        def body(_: Any, carry: Any) -> Any:
            token, outputs = carry[0], list(carry[1])
            for i, operands in enumerate(sets):
                before = outputs[i - 1]  # for i = 0 of the round before
                barrier = lax.optimization_barrier((operands, token, before))
                operands, token, outputs[i - 1] = barrier
                outputs[i] = function(*operands)
            return token, tuple(outputs)

        shapes = jax.eval_shape(function, *sets[0])
        zeros = tuple(jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), shapes) for _ in sets)
        return lax.fori_loop(0, count, body, (jnp.zeros((), jnp.int32), zeros))[1]

    return jax.jit(program)


class Program:
    """A compiled chain of launches; calling it returns the milliseconds of one launch.

    Args:
      function: of one set of operands; returns arrays.
      sets: the operands.
      count: rounds.
    """

    def __init__(self, function: Callable[..., Any], sets: Sets, count: int):
        self._run = chained(function, count).lower(*sets.operands).compile()
        self._sets = sets
        self._launches = count * len(sets.operands)

    def __call__(self) -> float:
        """Runs all launches and waits once."""
        return timed(lambda: self._run(*self._sets.operands))() / self._launches

    def output(self) -> Any:
        """Returns what the timed program computes from the first set."""
        return self._run(*self._sets.operands)[0]


def build(
    functions: Mapping[Any, Callable[..., Any]], sets: Sets, count: int, threads: int = 1
) -> dict[Any, Program]:
    """Compiles programs, several at once, and repeats those that turn out too short.

    Args:
      functions: by name.
      sets: operands of all.
      count: rounds, or more.
      threads: how many compile at once; 1 where the compiler times algorithms on the device (dense
        convolutions), which must not be disturbed.

    Returns:
      Programs by name, for `sample`.
    """

    def compile_all(counts: Mapping[Any, int]) -> dict[Any, Program]:
        def compile_one(name: Any) -> Program:
            return Program(functions[name], sets, counts[name])

        return dict(zip(counts, pool.map(compile_one, counts), strict=True))

    with concurrent.futures.ThreadPoolExecutor(max(1, threads)) as pool:
        programs = compile_all(dict.fromkeys(functions, count))
        needed = {
            name: rounds(min(program(), program()), sets) for name, program in programs.items()
        }
        return programs | compile_all({name: n for name, n in needed.items() if n > 3 * count})


def rounds(milliseconds: float, sets: Sets, target: float | None = None) -> int:
    """Returns how many rounds make a program of the target's length.

    Args:
      milliseconds: of one launch; an estimate that is too low makes the program longer, never
        shorter.
      sets: of a round.
      target: milliseconds of the program; None: `PROGRAM_MS`, without a GPU `DRY_RUN_MS`.

    Returns:
      1 to `MOST_ROUNDS`.

    Example:
      >>> rounds(0.1, rotate(lambda seed: (jnp.ones(3),)), 4.0)
      10
    """
    target = target or (PROGRAM_MS if this_gpu() else DRY_RUN_MS)
    count = round(target / (len(sets.operands) * max(milliseconds, 1e-3)))
    return min(MOST_ROUNDS, max(1, count))


def sample(
    programs: Mapping[Any, Callable[[], float]], repetitions: int = 9
) -> dict[Any, dict[str, float]]:
    """Times programs in turn.

    Args:
      programs: return the milliseconds of one launch.
      repetitions: of each program.

    Returns:
      {"median", "iqr", "repetitions"} by name, in milliseconds.

    Example:
      >>> sample({"a": lambda: 1.0}, repetitions=3)
      {'a': {'median': 1.0, 'iqr': 0.0, 'repetitions': 3}}
    """
    times_ms = time_in_turn(programs, rounds=repetitions, burst_ms=0)
    return {name: time_record(times, digits=6) for name, times in times_ms.items()}


def record_convolutions() -> None:
    """Makes XLA record cuDNN's convolutions into its CUDA graphs, as it records other kernels.

    By default each convolution splits a graph in two, and a dense step would wait for the launches
    between. For a process that has computed nothing yet: XLA reads its flags once.
    """
    flags = os.environ.get("XLA_FLAGS", "")
    if "xla_gpu_enable_command_buffer" not in flags:
        os.environ["XLA_FLAGS"] = f"{flags} {RECORD_CONVOLUTIONS}".strip()


def require_gpu(quick: bool) -> None:
    """Refuses to measure on another device, unless it is a dry run.

    Args:
      quick: a dry run of tiny shapes.

    Raises:
      ValueError: JAX's default device is no GPU.
    """
    try:
        platform = jax.devices()[0].platform
    except RuntimeError as error:
        platform = str(error)
    if platform != "gpu" and not quick:
        raise ValueError(
            f"device: expected an NVIDIA GPU, got {platform!r}, what JAX runs on here; install "
            "jax[cuda13] on a machine that has one, or pass --quick for a dry run of tiny shapes, "
            "whose numbers mean nothing"
        )
