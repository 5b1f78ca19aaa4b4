"""What a number was measured with: device, versions and commit."""

import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import jax

ROOT = Path(__file__).resolve().parents[2]
_PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy")


def origin() -> dict[str, Any]:
    """Returns what every report says of its origin: `device`, `versions` and `commit`."""
    return {"device": device(), "versions": versions(), "commit": commit()}


def versions() -> dict[str, str]:
    """Returns the versions of Python and of the packages that decide the numbers, by name."""
    return {"python": platform.python_version()} | {
        name: importlib.metadata.version(name) for name in _PACKAGES
    }


def device() -> str:
    """Returns the device that JAX runs on, such as "NVIDIA H200" or "cpu: AMD EPYC, 2 cores"."""
    first = jax.devices()[0]
    if first.platform != "cpu":
        return first.device_kind
    return f"cpu: {_cpu_name()}, {cores()} cores"


def cores() -> int:
    """Returns the number of cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def commit() -> str | None:
    """Returns the commit of this checkout.

    Returns:
      A short hash, with "+" behind it when files differ from the commit. Without a git checkout,
      the environment variable COMMIT, or None if that is not set.
    """
    git = ["git", "-C", str(ROOT)]
    try:
        head = subprocess.run(
            [*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True
        )
        status = subprocess.run(
            [*git, "status", "--porcelain", "--untracked-files=no"], capture_output=True, text=True
        )
    except FileNotFoundError:
        return os.environ.get("COMMIT")
    if head.returncode != 0:
        return os.environ.get("COMMIT")
    changed = "+" if status.stdout.strip() else ""
    return head.stdout.strip() + changed


def tuned_on() -> dict[str, Any]:
    """Returns what the tables of tuned tiles say of the machine on which they were measured.

    `device` is the name of JAX's backend here, by which the reader decides whether a table applies.
    """
    first = jax.devices()[0]
    return {
        "device": jax.default_backend(),
        "device_kind": _cpu_name() if first.platform == "cpu" else first.device_kind,
        "threads": cores(),
        "python": platform.python_version(),
        "jax": jax.__version__,
        "jaxlib": importlib.metadata.version("jaxlib"),
    }


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
