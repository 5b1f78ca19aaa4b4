"""Measuring: alternating repetitions, warm-up excluded, and a memory allocator that does not get in
the way.
"""

import ctypes
import importlib.metadata
import os
import platform
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax

from pallas_kernels.block_sparse_conv import cpu_times as tiles


def steady_memory() -> bool:
    """Tells glibc to keep freed memory, so that page faults on large buffers are not counted as the
    kernels' time.

    By default glibc returns every buffer above 32 MB to the kernel and pays a page fault for each 4
    KB of it at the next call: on a virtual machine this can cost more than the convolution itself.
    One training step runs in one buffer, and would not pay it per layer.

    Returns:
      Whether the allocator took the settings (False outside of glibc).

    Example:
      >>> steady_memory() in (True, False)
      True

    Reference: mallopt(3): M_ARENA_MAX, M_MMAP_MAX, M_TRIM_THRESHOLD.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return False
    return all([mallopt(-8, 1), mallopt(-4, 0), mallopt(-1, 2**31 - 1)])


def alternate(
    calls: Mapping[str, Callable[[], Any]], *, seconds: float, rounds: int = 5
) -> dict[str, list[float]]:
    """Times calls in alternation (a, b, c, a, b, c, ...), so that a slow spell of the machine hits
    all alike.

    Args:
      calls: functions without arguments, by name; each returns jax arrays. The first call
        (compilation) is not counted; a call that takes longer than `seconds` is timed once.
      seconds: time to spend after warm-up, about.
      rounds: the least number of rounds.

    Returns:
      Times in milliseconds by name, in order.

    Example:
      >>> sorted(alternate({"a": lambda: jax.numpy.ones(3), "b": lambda: jax.numpy.ones(4)}, seconds=0.01))
      ['a', 'b']
    """

    def once(call: Callable[[], Any]) -> float:
        start = time.perf_counter()
        jax.block_until_ready(call())
        return time.perf_counter() - start

    first = {}
    for name, call in calls.items():
        once(call)
        first[name] = once(call)
    times: dict[str, list[float]] = {name: [t] if t > seconds else [] for name, t in first.items()}
    quick = [name for name, t in first.items() if t <= seconds]
    for _ in range(
        max(rounds, int(seconds / max(sum(first[name] for name in quick), 1e-6))) if quick else 0
    ):
        for name in quick:
            times[name].append(once(calls[name]))
    return {name: [1e3 * t for t in taken] for name, taken in times.items()}


def programs(conv: Callable[..., jax.Array]) -> dict[str, Callable[..., tuple[jax.Array, ...]]]:
    """The programs that are timed: the convolution alone, and with both gradients as in training.

    Args:
      conv: `(x, weights, *index) -> y`.

    Returns:
      Jitted functions `(x, weights, dy, *index) -> (y,)` or `(y, dx, dweights)`, by the names of
      `tiles.MODES`.

    Example:
      >>> one = jax.numpy.ones(())
      >>> [len(program(one, one, one)) for program in programs(lambda x, w: x * w).values()]
      [1, 3]
    """

    def forward(
        x: jax.Array, weights: jax.Array, dy: jax.Array, *index: jax.Array
    ) -> tuple[jax.Array, ...]:
        return (conv(x, weights, *index),)

    def training(
        x: jax.Array, weights: jax.Array, dy: jax.Array, *index: jax.Array
    ) -> tuple[jax.Array, ...]:
        y, pullback = jax.vjp(lambda x, weights: conv(x, weights, *index), x, weights)
        return y, *pullback(dy)

    return dict(zip(tiles.MODES, (jax.jit(forward), jax.jit(training))))


def environment() -> dict[str, Any]:
    """Where a table was measured: device, machine and versions.

    Returns:
      A flat dictionary of strings and integers.

    Example:
      >>> environment()["device"] == jax.default_backend()
      True
    """
    device = jax.devices()[0]
    return {
        "device": jax.default_backend(),
        "device_kind": _cpu_name() if device.platform == "cpu" else device.device_kind,
        "threads": len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count(),
        "python": platform.python_version(),
        "jax": jax.__version__,
        "jaxlib": importlib.metadata.version("jaxlib"),
    }


def _cpu_name() -> str:
    try:
        names = [
            line.split(":", 1)[1].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ]
    except OSError:
        names = []
    return names[0] if names else platform.machine()
