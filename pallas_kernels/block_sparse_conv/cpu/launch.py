"""The native CPU implementation: C++ kernels of `cpu_kernels/`, called through `jax.ffi` on XLA's
own thread pool.
"""

import ctypes
import functools
import os
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import jaxlib
import numpy as np

import pallas_kernels
from pallas_kernels.block_sparse_conv.spec import ConvSpec, Implementation

LIBRARY = "libblock_sparse_conv.so"
# forces a variant, for tests: avx512_bf16, avx512, avx2 or portable
VARIABLE = "BLOCKSPARSE_JAX_CPU_VARIANT"
DTYPES = ("float32", "bfloat16")
PASSES = {
    "forward": "BlockSparseConvForward",
    "input_gradient": "BlockSparseConvInputGradient",
    "weight_gradient": "BlockSparseConvWeightGradient",
}


def _interface() -> int:
    """The minor version of XLA's foreign function interface in this jaxlib."""
    header = Path(jax.ffi.include_dir()) / "xla" / "ffi" / "api" / "c_api.h"
    return int(re.search(r"#define XLA_FFI_API_MINOR (\d+)", header.read_text())[1])


@functools.cache
def _library() -> ctypes.CDLL | str:
    """The library with its handlers registered, or the reason why it is absent."""
    found = [
        path for folder in pallas_kernels.__path__ if (path := Path(folder) / LIBRARY).is_file()
    ]
    if not found:
        return "the native library is not built: that takes a C++17 compiler (g++ or clang++); with one, `pip install` this package again"
    try:
        library = ctypes.CDLL(str(found[0]))
        built_for, here = library.BlockSparseConvInterface(), _interface()
        if built_for > here:  # registering it would keep JAX from starting
            return (
                f"the native library was built for a newer jaxlib (interface 0.{built_for}) than "
                f"the one here (0.{here}, jaxlib "
                f"{jaxlib.__version__}); update jaxlib, or `pip install --no-build-isolation` this "
                f"package again"
            )
        for symbol in PASSES.values():
            jax.ffi.register_ffi_target(
                symbol, jax.ffi.pycapsule(getattr(library, symbol)), platform="cpu"
            )
        library.BlockSparseConvVariants.restype = ctypes.c_char_p
    except (OSError, AttributeError) as error:
        return f"the native library does not load ({error}); `pip install` this package again"
    return library


def unavailable() -> str | None:
    """Why the native kernels cannot run here: None where they can.

    Returns:
      None, or the reason.
    """
    library = _library()
    if isinstance(library, str):
        return library
    if jax.default_backend() != "cpu":
        return f"runs on CPUs, and JAX's default device here is {jax.default_backend()!r}"
    return None


def variants() -> list[str]:
    """The variants that this CPU can run, best first.

    Returns:
      Of avx512_bf16, avx512, avx2 and portable; empty where the library is absent.
    """
    library = _library()
    return [] if isinstance(library, str) else library.BlockSparseConvVariants().decode().split(",")


def variant() -> str:
    """The variant that runs: the one that the environment variable `BLOCKSPARSE_JAX_CPU_VARIANT`
    asks for, else the best.

    Returns:
      One of `variants()`.

    Raises:
      ValueError: this CPU cannot run the one that is asked for.
    """
    return _forced() or variants()[0]


def _forced() -> str:
    wanted = os.environ.get(VARIABLE, "")
    if wanted and wanted not in variants():
        raise ValueError(
            f"{VARIABLE}: expected one of {', '.join(variants())}, those that this CPU can run, "
            f"got {wanted!r}"
        )
    return wanted


def instructions(spec: ConvSpec) -> str:
    """What the products of a convolution run on: `variant()`, whose bfloat16 instructions only
    bfloat16 meets.

    Args:
      spec: the static sizes and the dtype.

    Returns:
      avx512_bf16, avx512, avx2 or portable.
    """
    return variant() if spec.dtype == "bfloat16" else variant().removesuffix("_bf16")


def _supports(spec: ConvSpec) -> str | None:
    if reason := unavailable():
        return reason
    return (
        None
        if spec.dtype in DTYPES
        else f"computes in {' and '.join(DTYPES)}, not in {spec.dtype}; cast x, or use 'xla'"
    )


def _call(
    name: str,
    spec: ConvSpec,
    shape: tuple[int, ...],
    dtype: str,
    *operands: jax.Array,
    **attributes: Any,
) -> jax.Array:
    """One pass: operands and the result have the layouts of the C++ handlers."""
    like = jax.typeof(
        operands[0]
    )  # inside shard_map: the result varies over the mesh as the operands do
    out = like.update(shape=shape, dtype=jnp.dtype(dtype), weak_type=False)
    call = jax.ffi.ffi_call(PASSES[name], out, vmap_method="sequential")
    padding = [low for low, _ in spec.padding] + [high for _, high in spec.padding]
    numbers = {
        "kernel": spec.kernel,
        "strides": spec.strides,
        "padding": padding,
        "dilation": spec.dilation,
    }
    attributes |= {key: np.asarray(value, np.int64) for key, value in numbers.items()}
    return call(
        *operands, variant=_forced(), **attributes
    )  # "": the machine that runs it picks, which need not be the one that compiles


def _forward(
    spec: ConvSpec, x, values, filters, channels, taps, scale=None, bias=None, residual=None
):
    absent = {
        "scale": jnp.zeros(0),
        "bias": jnp.zeros(0),
        "residual": jnp.zeros((0, 0, 0, 0), x.dtype),
    }  # no elements: not given
    given = {"scale": scale, "bias": bias, "residual": residual}
    epilogue = [absent[name] if given[name] is None else given[name] for name in absent]
    return _call(
        "forward",
        spec,
        spec.out_shape,
        spec.dtype,
        x,
        values,
        filters,
        channels,
        taps,
        *epilogue,
        relu=spec.relu,
    )


def _input_gradient(spec: ConvSpec, dy, values, filters, channels, taps):
    return _call(
        "input_gradient", spec, spec.in_shape, spec.dtype, dy, values, filters, channels, taps
    )


def _weight_gradient(spec: ConvSpec, x, dy, filters, channels, taps):
    return _call(
        "weight_gradient", spec, spec.packed_shape, "float32", x, dy, filters, channels, taps
    )


IMPLEMENTATION = Implementation(
    "cpu", _supports, _forward, _input_gradient, _weight_gradient, fused=True
)
