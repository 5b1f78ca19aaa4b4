"""Runs Python in a new process that imports from where this one does: the clone or the wheel."""

import os
import subprocess
import sys

import jax


def run_python(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """`python *arguments` on the CPU with this run's compilation cache and more environment
    variables; its output is captured.
    """
    paths = os.pathsep.join(path for path in sys.path if path)
    return subprocess.run(
        [sys.executable, *arguments],
        env=os.environ | {"PYTHONPATH": paths, "JAX_PLATFORMS": "cpu"} | cache() | environment,
        capture_output=True,
        text=True,
        check=False,
    )


def host_devices(count: int) -> dict[str, str]:
    """Environment variables for `run_python`: so many host devices, and this run's compiler flags
    and compilation cache.
    """
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={count}"
    return {"XLA_FLAGS": flags} | cache()


def cache() -> dict[str, str]:
    """Environment variables: this run's compilation cache."""
    return {
        "JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
