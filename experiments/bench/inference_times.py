"""Checks and times one network at inference: packed, dense in XLA, and dense in PyTorch."""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.bench import inference_networks as networks
from experiments.bench.torch_baseline.process import TorchProcess
from experiments.measuring.timing import median_iqr, time_in_turn, timed
from experiments.models.flops import conv_positions
from pallas_kernels.dense_conv import taps_up_to

TOLERANCE = 1e-3  # of the logits, relative to the largest
PATTERNS = {  # network -> (FLOPs of the paper, fraction of the channels removed)
    "resnet18": (("1.03G", 60 / 128),),
    "resnet34": (("2.0G", 59 / 128),),
    "resnet50_v1_5": (("2.0G", 66 / 128), ("1.0G", 98.5 / 128)),
}
MOST_TAP_PIXELS = 64  # "taps": a matrix product for each tap up to so many output pixels


class Execution(NamedTuple):
    """What is timed.

    Attributes:
      name: "packed", or the dense form.
      flops: of the pattern, as the paper names them; "" for dense.
      pattern: 1x16, 1x32, or dense.
    """

    name: str
    flops: str = ""
    pattern: str = "dense"


def measure_network(
    name: str,
    *,
    width: float,
    image_size: int,
    batches: tuple[int, ...],
    blocks: tuple[int, ...],
    implementation: str | None,
    seconds: float,
    torch: Mapping[str, TorchProcess],
) -> list[dict[str, Any]]:
    """Times a network in every execution, batch after batch.

    Args:
      name: of `PATTERNS`.
      width: factor on the channels.
      image_size: pixels.
      batches: images at once.
      blocks: N of the 1xN patterns.
      implementation: of the block-sparse conv; None picks.
      seconds: time for each batch.
      torch: PyTorch's processes by policy.

    Returns:
      A row for each batch and execution.

    Raises:
      AssertionError: the logits of two executions differ; nothing was timed.
    """
    image_shape = (image_size, image_size, 3)
    create = functools.partial(networks.create, name, width)
    variables = networks.random_variables(create(), image_shape)
    positions = conv_positions(create(data_format="NHWC"), variables, image_shape)
    packed, with_zeros = {}, {}
    for block in blocks:
        for flops, sparsity in PATTERNS[name]:
            layouts = networks.subp_layouts(variables["params"], block, sparsity, name)
            execution = Execution("packed", flops, f"1x{block}")
            packed[execution], with_zeros[execution] = networks.pack(variables, layouts)
    dense = {
        f"XLA {data_format}": networks.jit_apply(
            create(implementation="dense", data_format=data_format)
        )
        for data_format in ("NHWC", "CHWN")
    }
    sparse = networks.jit_apply(create(implementation=implementation, data_format="CHWN"))
    by_taps = networks.jit_apply(create(data_format="NHWC"))
    dense["XLA NHWC, taps"] = taps_up_to(MOST_TAP_PIXELS)(by_taps)
    rows = []
    for batch in batches:
        rng = np.random.default_rng(0)
        images = jnp.asarray(rng.standard_normal((batch, *image_shape)), jnp.float32)
        calls: dict[Execution, Callable[[], jax.Array]] = {
            Execution(form): functools.partial(network, variables, images)
            for form, network in dense.items()
        }
        logits = np.asarray(dense["XLA NHWC"](variables, images))
        for execution, call in calls.items():
            check_logits(name, execution, np.asarray(call()), logits)
        for execution, values in packed.items():
            calls[execution] = functools.partial(sparse, values, images)
            expected = np.asarray(dense["XLA NHWC"](with_zeros[execution], images))
            check_logits(name, execution, np.asarray(calls[execution]()), expected)
        timers = {execution: timed(call) for execution, call in calls.items()}
        timers |= _torch_calls(name, variables, images, logits, torch)
        times_ms = time_in_turn(timers, seconds=seconds, patience=seconds)
        sizes = {
            execution: _sizes(packed.get(execution, variables), positions) for execution in timers
        }
        rows += [{"model": name, "batch": batch, **row} for row in _rows(times_ms, sizes)]
    jax.clear_caches()
    return rows


def _sizes(variables: dict[str, Any], positions: dict[str, int]) -> dict[str, float]:
    return {
        "weights_mb": networks.megabytes(variables),
        "gflops": networks.gigaflops(variables["params"], positions),
    }


def _torch_calls(
    name: str,
    variables: dict[str, Any],
    images: jax.Array,
    logits: np.ndarray,
    torch: Mapping[str, TorchProcess],
) -> dict[Execution, Callable[[], float]]:
    """PyTorch's dense networks, once their logits agree with ours."""
    calls = {}
    for policy, process in torch.items():
        arrays: dict[str, Any] = {
            "images": np.asarray(images),
            "weights": networks.as_conv_biases(variables["params"]),
        }
        forms = process.load("inference", arrays, stride_in_3x3=name.endswith("v1_5"))
        for form, call in forms.items():
            execution = Execution(f"PyTorch {form}, {policy}")
            check_logits(name, execution, process.results(form)[0], logits)
            calls[execution] = call
    return calls


def check_logits(name: str, execution: Execution, logits: np.ndarray, expected: np.ndarray) -> None:
    """Compares the logits of one execution with the expected ones.

    Args:
      name: of the network.
      execution: which one.
      logits: its logits.
      expected: those of the dense network, with zeros where weights are pruned.

    Raises:
      AssertionError: they differ.
    """
    error = np.abs(logits - expected).max() / np.abs(expected).max()
    if not error <= TOLERANCE:
        raise AssertionError(
            f"nothing was timed: the logits of {name}, {execution.name} {execution.pattern}, "
            f"differ from the dense ones by {error:.1e} of the largest"
        )


def _rows(
    times_ms: dict[Execution, list[float]], sizes: dict[Execution, dict[str, float]]
) -> list[dict[str, Any]]:
    """The rows of one batch."""
    median_ms = {execution: median_iqr(times)[0] or 0.0 for execution, times in times_ms.items()}
    fastest_ms = {
        library: min(
            (ms for execution, ms in median_ms.items() if execution.name.startswith(library)),
            default=None,
        )
        for library in ("XLA", "PyTorch")
    }
    rows = []
    for execution, times in times_ms.items():
        median, iqr = median_iqr(times)
        row: dict[str, Any] = {
            "execution": execution.name,
            "pattern": execution.pattern,
            "flops": execution.flops,
            "ms_median": median,
            "ms_iqr": iqr,
            "repetitions": len(times),
            **sizes[execution],
        }
        for library, dense_ms in fastest_ms.items():
            if dense_ms is not None:
                speed_up = dense_ms / median_ms[execution]
                row[f"speed_up_over_{library.lower()}"] = round(speed_up, 3)
        rows.append(row)
    return rows
