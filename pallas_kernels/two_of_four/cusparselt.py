"""cuSPARSELt through `jax.ffi`: finds it, loads the handler of cusparselt.cc and calls that.

Importing this module opens no library.
"""

import ctypes
import functools
import os
from pathlib import Path

import jax
from jaxtyping import Array, Float

from pallas_kernels.two_of_four import handler
from pallas_kernels.varying import result_type

TARGET = "TwoOfFourMatmul"
VARIABLE = "CUSPARSELT_LIBRARY"
"""Environment variable with the path of cuSPARSELt, where the loader does not find it."""
FILE = "libcusparseLt.so.0"
OLDEST_CAPABILITY = 80
"""Ampere's compute capability, times ten."""
DTYPES = ("bfloat16", "float16")
WEIGHT_MULTIPLE = 16
"""Both sizes of the weights, in 16 bits, are multiples of this."""
COLUMN_MULTIPLE = 8
"""The columns of the activations, in 16 bits, are a multiple of this."""


def library() -> str:
    """Where cuSPARSELt is.

    That is what `$CUSPARSELT_LIBRARY` names, else a file in NVIDIA's wheels, else wherever the
    loader finds it.

    Returns:
      A path or a bare name for the loader.

    Example:
      >>> library().endswith(".so.0") or VARIABLE in os.environ
      True
    """
    if path := os.environ.get(VARIABLE):
        return path
    wheels = (folder / "lib" / FILE for folder in handler.nvidia_folders())
    return str(next(filter(Path.is_file, wheels), FILE))


def load(path: Path) -> ctypes.CDLL:
    """Loads the handler's library; opens neither cuSPARSELt nor a device.

    Args:
      path: of the library that `handler.build` made.

    Returns:
      The library.

    Raises:
      OSError: it does not load.
    """
    library = ctypes.CDLL(str(path))
    library.TwoOfFourOpen.argtypes = [ctypes.c_char_p]
    library.TwoOfFourOpen.restype = ctypes.c_char_p
    library.TwoOfFourVersion.restype = ctypes.c_char_p
    sizes = [ctypes.c_int64] * 3
    flags = [ctypes.c_bool] * 3
    arrays = [ctypes.c_void_p] * 3
    library.TwoOfFourRun.argtypes = [*sizes, *flags, *arrays]
    library.TwoOfFourRun.restype = ctypes.c_char_p
    return library


def register(loaded: ctypes.CDLL) -> None:
    """Tells JAX where the handler is.

    Args:
      loaded: what `load` returned.
    """
    jax.ffi.register_ffi_target(TARGET, jax.ffi.pycapsule(loaded.TwoOfFourMatmul), platform="CUDA")


def unavailable() -> str | None:
    """Why the products cannot run on sparse tensor cores here.

    The first call on a GPU opens cuSPARSELt.

    Returns:
      None where they can, else the reason.

    Example:
      >>> unavailable() is None or len(unavailable()) > 0
      True
    """
    opened = _opened()
    return opened if isinstance(opened, str) else None


def version() -> str | None:
    """The version of cuSPARSELt.

    Returns:
      As in "0.10.0"; None where the products cannot run.
    """
    opened = _opened()
    return None if isinstance(opened, str) else opened.TwoOfFourVersion().decode()


@functools.cache
def _opened() -> ctypes.CDLL | str:
    """The handler, registered, with cuSPARSELt open; or the reason why not."""
    device = jax.devices()[0]
    capability = str(getattr(device, "compute_capability", "")).replace(".", "")
    if device.platform != "gpu" or not capability.isdigit():
        return f"runs on NVIDIA GPUs, and JAX's default device here is {device.platform!r}"
    if int(capability) < OLDEST_CAPABILITY:
        return (
            f"takes a GPU of compute capability 8.0 (Ampere) or newer, and this one "
            f"({device.device_kind}) has {device.compute_capability}"
        )
    if not handler.LIBRARY.is_file():
        return "the handler is not built: python -m pallas_kernels.two_of_four.build"
    try:
        loaded = load(handler.LIBRARY)
    except (OSError, AttributeError) as error:
        return f"the handler does not load ({error}); python -m pallas_kernels.two_of_four.build"
    if reason := loaded.TwoOfFourOpen(library().encode()).decode():
        return (
            f"cuSPARSELt does not open ({reason}); pip install nvidia-cusparselt-cu13, or name its "
            f"file in ${VARIABLE}"
        )
    register(loaded)
    return loaded


def limits(k: int, m: int, n: int, dtype: str) -> str | None:
    """Why cuSPARSELt cannot run a product on any GPU.

    Args:
      k: inputs, the contracted axis.
      m: outputs.
      n: columns of activations.
      dtype: of the activations.

    Returns:
      None, or the reason.

    Example:
      >>> limits(64, 1000, 256, "bfloat16")
      'takes weights whose sizes are multiples of 16, got [64, 1000]'
    """
    if dtype not in DTYPES:
        return f"computes in {' and '.join(DTYPES)}, not in {dtype}"
    if k % WEIGHT_MULTIPLE or m % WEIGHT_MULTIPLE or not k or not m:
        return f"takes weights whose sizes are multiples of {WEIGHT_MULTIPLE}, got [{k}, {m}]"
    if n % COLUMN_MULTIPLE or not n:
        return f"takes a multiple of {COLUMN_MULTIPLE} columns of activations, got {n}"
    return None


def product(
    weights: Float[Array, "k m"],
    x: Float[Array, "a b"],
    *,
    channel_major: bool,
    search: bool = False,
) -> Float[Array, "c d"]:
    """Calls the handler: it compresses the weights and multiplies.

    Args:
      weights: `[k, m]`, at most two of each four along k other than 0.
      x: `[k, n]` where the channels come first, else `[n, k]`.
      channel_major: whether the channels come first.
      search: time all algorithms at the first call of a shape and keep the fastest; else the
        library's first choice.

    Returns:
      `[m, n]` or `[n, m]`.
    """
    m = weights.shape[1]
    shape = (m, x.shape[1]) if channel_major else (x.shape[0], m)
    call = jax.ffi.ffi_call(TARGET, result_type(x, shape, x.dtype), vmap_method="sequential")
    return call(weights, x, channel_major=channel_major, search=search)
