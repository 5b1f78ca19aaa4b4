"""What a number was measured with: versions, device and commit."""

import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path

import jax

_PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy")


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that decide the numbers.

    Returns:
      Package name -> version.
    """
    return {"python": platform.python_version()} | {
        name: importlib.metadata.version(name) for name in _PACKAGES
    }


def device() -> str:
    """The device that jax runs on, in words.

    Returns:
      For example "NVIDIA H200" or "cpu: Intel(R) Xeon(R), 2 cores".
    """
    first = jax.devices()[0]
    if first.platform != "cpu":
        return first.device_kind
    info = Path("/proc/cpuinfo")
    names = (
        [
            line.split(":", 1)[1].strip()
            for line in info.read_text().splitlines()
            if line.startswith("model name")
        ]
        if info.exists()
        else []
    )
    return f"cpu: {names[0] if names else platform.machine()}, {len(os.sched_getaffinity(0))} cores"


def commit() -> str | None:
    """The commit of this checkout, "+" behind it when files differ from it.

    Returns:
      A short hash, or None outside of a git checkout.
    """
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        head = subprocess.run(
            [*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True
        )
        status = subprocess.run(
            [*git, "status", "--porcelain", "--untracked-files=no"], capture_output=True, text=True
        )
    except FileNotFoundError:
        return None
    return head.stdout.strip() + "+" * bool(status.stdout.strip()) if head.returncode == 0 else None
