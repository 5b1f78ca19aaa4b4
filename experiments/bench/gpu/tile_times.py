"""Times some tiles of one pass on a GPU, each compared with the default tile first."""

import concurrent.futures
import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from experiments.bench.gpu import clock, shapes
from experiments.bench.gpu.estimate import least_milliseconds
from experiments.bench.gpu.tiles import Tunable, tiles_to_time
from pallas_kernels.block_sparse_conv import ConvSpec, Implementation
from pallas_kernels.devices import this_gpu

# How far a tile's result may be from the default tile's, relative to the norm; float32 may be tf32.
TOLERANCES = {"bfloat16": 1e-2, "float16": 2e-3, "float32": 1e-3}
GAIN = 0.98  # a tile replaces the default if it takes less than this share of the default's time
PROGRAM_MS = 10.0  # a timed program takes so long or longer


def measure_pass(
    which: Tunable,
    spec: ConvSpec,
    pass_name: str,
    *,
    threads: int,
    repetitions: int,
    first_run: Callable[[str, Callable[[], float]], float | str],
) -> dict[str, Any]:
    """Times some tiles of one pass.

    Args:
      which: the implementation.
      spec: the static sizes.
      pass_name: one of `PASSES`.
      threads: how many programs compile at once.
      repetitions: of each tile.
      first_run: `(tile's name, function)` -> the function's result, or the text of its error, now
        or in an earlier process.

    Returns:
      The table's key, the best tile, and for each tile milliseconds or an error.

    Raises:
      RuntimeError: the default tile does not run.
    """
    candidates = tiles_to_time(which, spec, pass_name)
    default = candidates[0]
    sets = clock.rotate(functools.partial(_pass_operands, spec, pass_name))
    target = PROGRAM_MS if this_gpu() else None
    count = clock.rounds(least_milliseconds(spec), sets, target)

    def compile_tile(tile: Any) -> clock.Program | str:
        """The program of a tile, or why it does not compile."""
        try:
            run = _pass_function(which.build(pass_name, tile), spec, pass_name)
            return clock.Program(run, sets, count)
        except Exception as error:
            return f"{type(error).__name__}: {error}"[:300]

    with concurrent.futures.ThreadPoolExecutor(max(1, threads)) as pool:
        programs = dict(zip(candidates, pool.map(compile_tile, candidates), strict=True))
    default_program = programs[default]
    if isinstance(default_program, str):
        raise RuntimeError(f"the default tile does not compile: {default_program}")
    expected = default_program.output().astype(jnp.float32)

    right: dict[Any, clock.Program] = {}
    errors: dict[Any, str] = {}
    for tile, program in programs.items():
        if isinstance(program, str):
            errors[tile] = program
            continue
        error = first_run(str(tile), functools.partial(_difference, program, expected))
        if isinstance(error, str):
            errors[tile] = error
        elif error <= TOLERANCES[spec.dtype]:
            right[tile] = program
        else:
            errors[tile] = f"differs from the default tile by {error:.1e}"
    if default not in right:
        raise RuntimeError(f"the default tile does not run: {errors[default]}")

    times = clock.sample({str(tile): program for tile, program in right.items()}, repetitions)
    median_ms = {tile: times[str(tile)]["median"] for tile in right}
    best = min(median_ms, key=median_ms.__getitem__)
    if median_ms[best] > GAIN * median_ms[default]:
        best = default
    timed = [{"tile": dataclasses.asdict(tile), **times[str(tile)]} for tile in right]
    failed = [{"tile": dataclasses.asdict(tile), "error": text} for tile, text in errors.items()]
    return {
        "key": which.key(spec, pass_name),
        "best": dataclasses.asdict(best),
        "milliseconds": median_ms[best],
        "default_milliseconds": median_ms[default],
        **sets.describe(),
        "tiles": timed + failed,
    }


def _difference(program: clock.Program, expected: jax.Array) -> float:
    """How far a program's result is from the expected one, relative to its norm."""
    norm = jnp.linalg.norm(expected.ravel())
    return float(jnp.linalg.norm((program.output() - expected).ravel()) / norm)


def _pass_operands(spec: ConvSpec, pass_name: str, seed: int) -> tuple[jax.Array, ...]:
    x, dy, values, *index = shapes.operands(spec, seed)
    operands = {
        "forward": (x, values),
        "input_gradient": (dy, values),
        "weight_gradient": (x, dy),
    }
    return (*operands[pass_name], *index)


def _pass_function(
    implementation: Implementation, spec: ConvSpec, pass_name: str
) -> Callable[..., jax.Array]:
    spec = dataclasses.replace(spec, gradients=pass_name != "forward")
    return functools.partial(getattr(implementation, pass_name), spec)
