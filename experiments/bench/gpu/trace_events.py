"""The GPU kernels of a profile that JAX's profiler wrote, summed by name."""

import gzip
import json
from pathlib import Path
from typing import Any


def gpu_kernels(folder: Path, steps: int) -> dict[str, Any]:
    """Reads a profile of some equal steps.

    Args:
      folder: that `jax.profiler.trace(..., create_perfetto_trace=True)` filled.
      steps: how many the profile holds.

    Returns:
      For one step: "busy_ms", the sum of all kernels' times; "span_ms" from the first kernel's
      begin to the last one's end; "kernels", `[launches, microseconds]` by name.

    Raises:
      ValueError: there is no profile, or no GPU kernel in it.
    """
    files = sorted(folder.rglob("perfetto_trace.json.gz"))
    if not files:
        raise ValueError(f"folder: expected a profile in {folder}, got none")
    with gzip.open(files[-1]) as file:
        read = json.load(file)
    events = read["traceEvents"] if isinstance(read, dict) else read
    names = _names(events)
    running = [event for event in events if _is_kernel(event, names)]
    if not running:
        raise ValueError(f"folder: the profile in {folder} holds no GPU kernel")
    begin = min(event["ts"] for event in running)
    end = max(event["ts"] + event["dur"] for event in running)
    sums: dict[str, list[float]] = {}
    for event in running:
        both = sums.setdefault(event["name"], [0, 0.0])
        both[0] += 1 / steps
        both[1] += event["dur"] / steps
    longest_first = sorted(sums.items(), key=lambda item: -item[1][1])
    return {
        "busy_ms": sum(us for _, us in sums.values()) / 1e3,
        "span_ms": (end - begin) / steps / 1e3,
        "kernels": {name: [round(n, 3), round(us, 3)] for name, (n, us) in longest_first},
    }


def _names(events: list[dict[str, Any]]) -> dict[tuple[Any, ...], str]:
    """The names of processes, by (pid,), and of threads, by (pid, tid)."""
    names: dict[tuple[Any, ...], str] = {}
    for event in events:
        if event.get("ph") == "M" and event.get("name") == "process_name":
            names[event["pid"],] = event["args"]["name"]
        elif event.get("ph") == "M" and event.get("name") == "thread_name":
            names[event["pid"], event["tid"]] = event["args"]["name"]
    return names


def _is_kernel(event: dict[str, Any], names: dict[tuple[Any, ...], str]) -> bool:
    on_gpu = "GPU" in names.get((event.get("pid"),), "")
    on_stream = "Stream" in names.get((event.get("pid"), event.get("tid")), "")
    return event.get("ph") == "X" and on_gpu and on_stream
