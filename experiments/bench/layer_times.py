"""Checks and times one convolution on a CPU: block-sparse, masked-dense, dense, and PyTorch's."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.bench import shapes
from experiments.bench.dense_forms import COMMON_DENSE, DENSE, axes, run_dense
from experiments.bench.programs import training_programs
from experiments.bench.torch_baseline.process import TorchProcess
from experiments.measuring.row_names import CHOSEN, MASKED, PASS_NAMES
from experiments.measuring.timing import time_in_turn, time_record, timed
from pallas_kernels.block_sparse_conv import (
    ConvSpec,
    Index,
    available_implementations,
    choose_implementation,
    xla,
)
from pallas_kernels.block_sparse_conv.cpu_times import MODES
from pallas_kernels.dense_conv import choose_formulation

TOLERANCE = 1e-5  # relative to the largest value


class Candidate(NamedTuple):
    """One convolution that is timed.

    Attributes:
      conv: `(x, weights, *index) -> y`.
      operands: `(x, weights, dy, *index)`.
    """

    conv: Callable[..., jax.Array]
    operands: tuple[jax.Array, ...]


def measure_layer(
    spec: ConvSpec, *, seconds: float, formulations: bool, torch: Mapping[str, TorchProcess]
) -> list[dict[str, Any]]:
    """Times a convolution, once everything that is timed agrees.

    Args:
      spec: the static sizes.
      seconds: time for each mode, after compilation.
      formulations: also time each formulation of the XLA implementation.
      torch: PyTorch's processes by policy.

    Returns:
      A row for each of `MODES`: times, the fastest implementation, and what is lost to it by
      the one that `implementation=None` picks.

    Raises:
      AssertionError: the results of two of them differ; nothing was timed.
    """
    x, dy, values, *index = shapes.random_operands(spec)
    # Small whole numbers: their sums are exact in any order.
    x, dy, values = (jnp.round(array) for array in (x, dy, values))
    kept = Index(*map(np.asarray, index))
    kernel, mask = _dense_kernel(spec, values, kept)
    x_nhwc, dy_nhwc = (array.transpose(axes("CHWN", "NHWC")) for array in (x, dy))
    sparse = _sparse_candidates(spec, (x, values, dy, *index), formulations)
    candidates = sparse | _dense_candidates(spec, x_nhwc, dy_nhwc, kernel, mask)
    programs = {name: training_programs(candidate.conv) for name, candidate in candidates.items()}
    arrays = {"x": np.asarray(x_nhwc), "dy": np.asarray(dy_nhwc), "kernel": np.asarray(kernel)}
    torch = {f"PyTorch dense, {policy}": process for policy, process in torch.items()}
    torch_calls = {
        name: process.load("convolution", arrays, strides=spec.strides, padding=spec.padding)
        for name, process in torch.items()
    }

    rows = []
    for mode, gradients in MODES.items():
        calls = {
            name: functools.partial(programs[name][mode], *candidate.operands)
            for name, candidate in candidates.items()
        }
        results = {name: [np.asarray(array) for array in call()] for name, call in calls.items()}
        results |= {name: process.results(mode) for name, process in torch.items()}
        _check(spec, results, sparse, kept)
        timers = {name: timed(call) for name, call in calls.items()}
        timers |= {name: torch_calls[name][mode] for name in torch}
        times_ms = time_in_turn(timers, seconds=seconds, patience=seconds)
        chosen = choose_implementation(dataclasses.replace(spec, gradients=gradients))
        times_ms[CHOSEN] = times_ms[chosen.implementation]
        rows.append({"mode": mode, **_row(times_ms, [n for n in sparse if ":" not in n], torch)})
    return rows


def _sparse_candidates(
    spec: ConvSpec, operands: tuple[jax.Array, ...], formulations: bool
) -> dict[str, Candidate]:
    """The block-sparse implementations that serve the convolution here."""
    x, values, _, *index = operands
    convs: dict[str, Any] = {
        name: name
        for name, reason in available_implementations().items()
        if reason is None and name != "dense" and _serves(spec, name, x, values, *index)
    }
    if formulations:
        convs |= {
            f"xla:{name}": record
            for name, record in xla.FORMULATIONS.items()
            if record.supports(spec) is None
        }
    return {
        name: Candidate(functools.partial(shapes.convolve, spec, implementation), operands)
        for name, implementation in convs.items()
    }


def _serves(spec: ConvSpec, name: str, *operands: jax.Array) -> bool:
    """Whether an implementation takes the convolution; others are left out of its rows."""
    try:
        jax.eval_shape(functools.partial(shapes.convolve, spec, name), *operands)
    except NotImplementedError:
        return False
    return True


def _dense_candidates(
    spec: ConvSpec, x: jax.Array, dy: jax.Array, kernel: jax.Array, mask: jax.Array
) -> dict[str, Candidate]:
    """Every dense form, and the masked one in the form that the zoo would take."""
    candidates = {}
    for name, layout in DENSE.items():
        images, gradient = (array.transpose(axes("NHWC", layout)) for array in (x, dy))
        conv = functools.partial(run_dense, spec, name)
        candidates[name] = Candidate(conv, (images, kernel, gradient))
    formulation = choose_formulation(kernel.shape, spec.out_height * spec.out_width, "NHWC")
    form = "dense taps NHWC" if formulation == "taps" else "dense NHWC"

    def masked(x: jax.Array, kernel: jax.Array, mask: jax.Array) -> jax.Array:
        return run_dense(spec, form, x, jnp.where(mask, kernel, 0))

    return candidates | {MASKED: Candidate(masked, (x, kernel, dy, mask))}


def _row(
    times_ms: dict[str, list[float]], implementations: list[str], torch: Mapping[str, Any]
) -> dict[str, Any]:
    """What a report says of the times of one mode."""
    records = {name: time_record(times) for name, times in times_ms.items()}
    median = {name: record["median"] for name, record in records.items()}
    best = min(implementations, key=median.__getitem__)
    dense = min(DENSE, key=median.__getitem__)
    chosen_ms = median[CHOSEN]
    row = {
        "ms": records,
        "best": best,
        "regret": round(chosen_ms / median[best] - 1, 3),
        "best_dense": dense,
        "speed_up_over_dense": round(median[dense] / chosen_ms, 3),
        "speed_up_over_convolution": round(
            min(median[name] for name in COMMON_DENSE) / chosen_ms, 3
        ),
        "speed_up_over_masked": round(median[MASKED] / chosen_ms, 3),
    }
    if torch:
        row["speed_up_over_torch"] = round(min(median[name] for name in torch) / chosen_ms, 3)
    return row


def _dense_kernel(spec: ConvSpec, values: jax.Array, index: Index) -> tuple[jax.Array, jax.Array]:
    """The packed values in a dense kernel that is random elsewhere, and the mask."""
    shape = (spec.kernel[0] * spec.kernel[1], spec.cin, spec.cout)
    kernel = np.round(np.random.default_rng(1).standard_normal(shape)).astype(np.float32)
    kernel[index.positions()] = np.asarray(values)
    mask = np.zeros(shape, bool)
    mask[index.positions()] = True
    return (
        jnp.asarray(kernel.reshape(spec.kernel_shape)),
        jnp.asarray(mask.reshape(spec.kernel_shape)),
    )


def _check(
    spec: ConvSpec,
    results: dict[str, list[np.ndarray]],
    sparse: Mapping[str, Candidate],
    index: Index,
) -> None:
    """Compares outputs and gradients: block-sparse with masked dense, dense with dense NHWC."""
    for name, arrays in results.items():
        is_sparse = name in sparse
        reference = MASKED if is_sparse else "dense NHWC"
        if name in (MASKED, "dense NHWC"):
            continue
        layout = "CHWN" if is_sparse else DENSE.get(name, "NHWC")
        names = ("output", *PASS_NAMES[1:])[: len(arrays)]
        for i, (pass_name, array) in enumerate(zip(names, arrays, strict=True)):
            expected = results[reference][i]
            if pass_name != "weight gradient":
                array = array.transpose(axes(layout, "NHWC"))
            elif is_sparse:
                expected = expected.reshape(-1, spec.cin, spec.cout)[index.positions()]
            error = np.abs(array - expected).max() / np.abs(expected).max()
            if not error <= TOLERANCE:
                raise AssertionError(
                    f"{name}: the {pass_name} differs from {reference} by {error:.2e} of its "
                    f"largest value, at {spec}"
                )
