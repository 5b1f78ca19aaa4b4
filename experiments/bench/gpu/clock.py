"""Device times of GPU programs without a host synchronization for each launch: many launches in one
jitted loop.

A loop of known length runs on the device without the host looking in between. Its body calls the
function once on each of several sets of operands, chained by optimization barriers: a call waits
for the one before, nothing is hoisted out of the loop, merged or left out, and the outputs stay
alive. One synchronization stands behind hundreds of launches. What the program does once, before
and after the loop (zeros where the outputs will be, operands into the layout that the loop
prefers), is in the time, so a program must be long: `rounds` counts from the least time that a
launch can take, and `build` makes a program that turns out short anew. Sets that together exceed
the L2 cache begin cold, as in a training step; small ones are warm, and the report says so.
"""

import concurrent.futures
import dataclasses
import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from experiments.bench.timing import time_in_turn, time_record
from pallas_kernels.block_sparse_conv.devices import this_gpu

L2 = 60 << 20  # bytes, of an H200
MOST_SETS = 4
MILLISECONDS = 30.0  # a timed program takes so long or longer
DRY = 0.3  # the same, where there is no GPU and the numbers say nothing
LONGEST = 20_000  # rounds


@dataclasses.dataclass(frozen=True)
class Sets:
    """Operands to rotate through.

    Attributes:
      operands: sets of equal shapes.
      nbytes: of all of them.
    """

    operands: tuple[tuple[jax.Array, ...], ...]
    nbytes: int

    @property
    def about(self) -> dict[str, Any]:
        """For the report: how many sets, their megabytes, and whether a set is out of the L2 cache
        when its turn comes again.
        """
        return {
            "sets": len(self.operands),
            "megabytes": round(self.nbytes / 1e6, 1),
            "l2": "cold" if self.nbytes >= 2 * L2 else "warm",
        }


def rotate(make: Callable[[int], tuple[jax.Array, ...]], most: int = MOST_SETS) -> Sets:
    """As many sets of operands as exceed the L2 cache twice.

    Args:
      make: seed -> one set.
      most: sets at most.

    Returns:
      The sets.

    Example:
      >>> rotate(lambda seed: (jnp.ones(3),)).about
      {'sets': 4, 'megabytes': 0.0, 'l2': 'warm'}
    """
    sets = [make(0)]
    each = sum(a.nbytes for a in sets[0])
    sets += [make(seed) for seed in range(1, min(most, -(-2 * L2 // max(each, 1))))]
    return Sets(tuple(sets), len(sets) * each)


def chained(function: Callable[..., Any], count: int) -> Callable[..., Any]:
    """The program that is timed: `count` rounds of one call for each set.

    Args:
      function: of one set of operands; returns arrays.
      count: rounds; static, so that the loop needs no look at a condition.

    Returns:
      A jitted function of the sets; returns the last outputs of each.

    Example:
      >>> one = jnp.ones(2)
      >>> [a.tolist() for a in chained(lambda a, b: a + 2 * b, 3)((one, one), (one, one))]
      [[3.0, 3.0], [3.0, 3.0]]
    """

    def program(*sets: tuple[jax.Array, ...]) -> Any:
        def body(_: Any, carry: Any) -> Any:
            token, outs = carry[0], list(carry[1])
            for i, operands in enumerate(sets):
                before = outs[i - 1]  # of the round before where i = 0
                operands, token, outs[i - 1] = lax.optimization_barrier((operands, token, before))
                outs[i] = function(*operands)
            return token, tuple(outs)

        like = jax.eval_shape(function, *sets[0])
        start = tuple(jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), like) for _ in sets)
        return lax.fori_loop(0, count, body, (jnp.zeros((), jnp.int32), start))[1]

    return jax.jit(program)


class Program:
    """A compiled chain; calling it returns the milliseconds of one launch.

    Args:
      function: of one set of operands; returns arrays.
      sets: the operands.
      count: rounds.
    """

    def __init__(self, function: Callable[..., Any], sets: Sets, count: int):
        self._run = chained(function, count).lower(*sets.operands).compile()
        self._sets, self._launches = sets, count * len(sets.operands)

    def __call__(self) -> float:
        """Runs all launches, waits once."""
        start = time.perf_counter()
        jax.block_until_ready(self._run(*self._sets.operands))
        return 1e3 * (time.perf_counter() - start) / self._launches

    def output(self) -> Any:
        """What the timed program leaves behind for the first set."""
        return self._run(*self._sets.operands)[0]


def build(
    functions: Mapping[str, Callable[..., Any]], sets: Sets, count: int, threads: int = 1
) -> dict[str, Program]:
    """Compiles programs, several at once, and runs each, so that none is short.

    Args:
      functions: by name.
      sets: operands of all.
      count: rounds, or more.
      threads: compile at once; 1 where the compiler times algorithms on the device (dense
        convolutions), which must not be disturbed.

    Returns:
      Programs by name, for `sample`.
    """

    def made(function: Callable[..., Any], count: int) -> Program:
        return Program(function, sets, count)

    with concurrent.futures.ThreadPoolExecutor(max(1, threads)) as pool:
        programs = dict(
            zip(functions, pool.map(made, functions.values(), [count] * len(functions)))
        )
        better = {
            name: rounds(min(program(), program()), sets) for name, program in programs.items()
        }
        short = {name: more for name, more in better.items() if more > 3 * count}
        return programs | dict(
            zip(short, pool.map(made, (functions[name] for name in short), short.values()))
        )


def rounds(milliseconds: float, sets: Sets, target: float | None = None) -> int:
    """How many rounds make a program of the target's length.

    Args:
      milliseconds: of one launch; a floor makes the program longer than that, never shorter.
      sets: of a round.
      target: milliseconds; None: `MILLISECONDS`, without a GPU `DRY`.

    Returns:
      1 to `LONGEST`.

    Example:
      >>> rounds(0.1, rotate(lambda seed: (jnp.ones(3),)), 4.0)
      10
    """
    target = target or (MILLISECONDS if gpu() else DRY)
    return int(min(LONGEST, max(1, round(target / (len(sets.operands) * max(milliseconds, 1e-3))))))


def sample(
    calls: Mapping[str, Callable[[], float]], repetitions: int = 9
) -> dict[str, dict[str, float]]:
    """Times calls in turn, each round in an order of its own; the first call of each does not
    count.

    Args:
      calls: return the milliseconds of one launch.
      repetitions: that count.

    Returns:
      Name -> {"median", "iqr", "repetitions"}, milliseconds.

    Example:
      >>> sample({"a": lambda: 1.0}, repetitions=3)
      {'a': {'median': 1.0, 'iqr': 0.0, 'repetitions': 3}}
    """
    times = time_in_turn(calls, rounds=repetitions, burst_ms=0)
    return {name: time_record(times_ms, digits=6) for name, times_ms in times.items()}


def gpu() -> str | None:
    """The GPU's name as in the names of tuned tables.

    Returns:
      "h200" for "NVIDIA H200"; None where JAX's default device is no GPU.

    Example:
      >>> gpu() is None or gpu().islower()
      True
    """
    return this_gpu()


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
            f"jax[cuda13] on a machine that has one, "
            "or take --quick for a dry run of tiny shapes, whose numbers say nothing"
        )


def asks_for_gpu(arguments: Sequence[str]) -> bool:
    """Whether a command line says `--device gpu`.

    Args:
      arguments: without the program's name.

    Returns:
      True where it does; the command then has other options.

    Example:
      >>> asks_for_gpu(["--device", "gpu", "--quick"]), asks_for_gpu(["--device=cpu"])
      (True, False)
    """
    return "--device=gpu" in arguments or any(
        pair == ("--device", "gpu") for pair in itertools.pairwise(arguments)
    )
