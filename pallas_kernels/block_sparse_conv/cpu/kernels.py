"""Loads the native library of `cpu_kernels/` and registers its handlers with JAX."""

import ctypes
import functools
import os
import re
from pathlib import Path

import jax
import jaxlib

import pallas_kernels

LIBRARY = "libblock_sparse_conv.so"
VARIABLE = "BLOCKSPARSE_JAX_CPU_VARIANT"
"""Environment variable that forces a variant, for tests: avx512_bf16, avx512, avx2 or portable."""
TARGETS = {
    "forward": "BlockSparseConvForward",
    "input_gradient": "BlockSparseConvInputGradient",
    "weight_gradient": "BlockSparseConvWeightGradient",
    "norm_act_forward": "NormActForward",
    "norm_act_backward": "NormActBackward",
}
"""The names of the handlers by pass: symbols of the library and targets of `jax.ffi`."""


@functools.cache
def library() -> ctypes.CDLL | str:
    """Loads the library and registers its handlers, once.

    Returns:
      The library, or the reason why it is absent.
    """
    folders = map(Path, pallas_kernels.__path__)
    files = [folder / LIBRARY for folder in folders if (folder / LIBRARY).is_file()]
    if not files:
        return (
            "the native library is not built: that takes a C++17 compiler (g++ or clang++); with "
            "one, `pip install` this package again"
        )
    try:
        loaded = ctypes.CDLL(str(files[0]))
        built_for, present = loaded.BlockSparseConvInterface(), ffi_minor_version()
        if built_for > present:  # registering it would keep JAX from starting
            return (
                f"the native library was built for a newer jaxlib (interface 0.{built_for}) than "
                f"the one here (0.{present}, jaxlib {jaxlib.__version__}); update jaxlib, or `pip "
                f"install --no-build-isolation` this package again"
            )
        for symbol in TARGETS.values():
            handler = jax.ffi.pycapsule(getattr(loaded, symbol))
            jax.ffi.register_ffi_target(symbol, handler, platform="cpu")
        loaded.BlockSparseConvVariants.restype = ctypes.c_char_p
    except (OSError, AttributeError, RuntimeError) as error:
        return f"the native library does not load ({error}); `pip install` this package again"
    return loaded


def ffi_minor_version() -> int:
    """The minor version of XLA's foreign function interface in this jaxlib.

    Returns:
      The version.

    Example:
      >>> ffi_minor_version() > 0
      True
    """
    header = Path(jax.ffi.include_dir()) / "xla" / "ffi" / "api" / "c_api.h"
    match = re.search(r"#define XLA_FFI_API_MINOR (\d+)", header.read_text())
    if match is None:
        raise RuntimeError(f"{header}: expected a line '#define XLA_FFI_API_MINOR number'")
    return int(match[1])


def variants() -> list[str]:
    """The variants that this CPU can run, best first.

    Returns:
      Some of avx512_bf16, avx512, avx2 and portable; empty where the library is absent.
    """
    loaded = library()
    if isinstance(loaded, str):
        return []
    return loaded.BlockSparseConvVariants().decode().split(",")


def variant() -> str:
    """The variant that runs.

    It is the one that the environment variable `BLOCKSPARSE_JAX_CPU_VARIANT` asks for, else the
    best.

    Returns:
      One of `variants()`.

    Raises:
      ValueError: this CPU cannot run the one that is asked for.
    """
    return forced_variant() or variants()[0]


def forced_variant() -> str:
    """The variant that the environment variable `BLOCKSPARSE_JAX_CPU_VARIANT` asks for.

    Returns:
      One of `variants()`; empty where the variable is not set.

    Raises:
      ValueError: this CPU cannot run the one that is asked for.
    """
    name = os.environ.get(VARIABLE, "")
    if name and name not in variants():
        raise ValueError(
            f"{VARIABLE}: expected one of {', '.join(variants())}, those that this CPU can run, "
            f"got {name!r}"
        )
    return name
