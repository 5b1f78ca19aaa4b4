"""Compiled kernels on disk, in the folder of JAX's persistent compilation cache where there is one.

JAX finds a program there by its text, which holds the compiled kernels: without them a process that
finds all its programs would still compile every kernel.
"""

import hashlib
import os
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax


def read_or_make(key: str, make: Callable[[], bytes]) -> bytes:
    """Reads what was made for a key before, here or in another process, or makes and keeps it.

    Args:
      key: all that the result depends on.
      make: gives the result.

    Returns:
      The result.
    """
    folder = _folder()
    if folder is None:
        return make()
    path = folder / hashlib.sha256(key.encode()).hexdigest()
    try:
        return path.read_bytes()
    except FileNotFoundError:
        made = make()
    except OSError as error:
        warnings.warn(f"jax_compilation_cache_dir: cannot read {path} ({error})", stacklevel=2)
        return make()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder, delete=False) as file:
            file.write(made)
        os.replace(file.name, path)  # whole or not at all
    except OSError as error:
        warnings.warn(f"jax_compilation_cache_dir: cannot write {path} ({error})", stacklevel=2)
    return made


def _folder() -> Path | None:
    """Where compiled kernels lie; None without a cache on a local disk."""
    config: Any = jax.config
    folder = config.jax_compilation_cache_dir
    if not folder or not config.jax_enable_compilation_cache or "://" in folder:
        return None
    return Path(folder) / "triton_kernels"
