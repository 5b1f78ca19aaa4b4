"""Calls a Triton kernel as a foreign function that XLA records into its CUDA graphs.

XLA gathers the kernels of a program in command buffers, which launch them all at once. It leaves
out custom calls of the older kind, which jax-triton 0.3 makes, and every one of them splits the
graph in two. jaxlib also has the call of Triton kernels as a typed foreign function that can be
recorded. So jax-triton 0.3 compiles a kernel here, and the call goes to that function; jax-triton
0.4 uses it by itself.
"""

import dataclasses
import functools
import inspect
import math
import zlib
from importlib import metadata
from typing import Any

import jax

from pallas_kernels.block_sparse_conv.triton import kernel_cache, kernels
from pallas_kernels.block_sparse_conv.triton.fitting import Tile
from pallas_kernels.varying import result_type

TARGET = "triton_kernel_call_ffi"
"""The foreign function's name in jaxlib."""
ALIGNMENT = 16
"""Bytes by which XLA aligns every array at least."""
POINTERS = {"float32": "*fp32", "bfloat16": "*bf16", "float16": "*fp16", "int32": "*i32"}
"""Triton's types of the arrays."""


@dataclasses.dataclass(frozen=True)
class Launch:
    """One kernel call: everything but the operands, all of it static.

    Attributes:
      kernel: name of the function in `kernels.py`.
      programs: how many run.
      constants: the kernel's compile-time arguments, `(name, value)`.
      tile: warps and stages.
      out: shape and dtype of the result, or of each.
      zeroed: whether the (first) result starts as zeros.
    """

    kernel: str
    programs: int
    constants: tuple[tuple[str, Any], ...]
    tile: Tile
    out: jax.ShapeDtypeStruct | tuple[jax.ShapeDtypeStruct, ...]
    zeroed: bool = False

    @property
    def outs(self) -> tuple[jax.ShapeDtypeStruct, ...]:
        """Shape and dtype of each result."""
        return self.out if isinstance(self.out, tuple) else (self.out,)


def call(launch: Launch, capability: int, *operands: jax.Array) -> Any:
    """Calls a kernel.

    Args:
      launch: the call.
      capability: compute capability times ten of the GPU that it is compiled for.
      *operands: the kernel's arrays.

    Returns:
      The result, or a tuple of the results.
    """
    import jax_triton

    if "out_type" in inspect.signature(jax_triton.triton_call).parameters:  # 0.4
        return jax_triton.triton_call(
            *operands,
            kernel=getattr(kernels, launch.kernel),
            out_type=launch.out,
            grid=(launch.programs,),
            name=launch.kernel,
            num_warps=launch.tile.warps,
            num_stages=launch.tile.stages,
            compute_capability=capability,
            backend_options={"enable_fp_fusion": True},
            zeroed_outputs=(0,) if launch.zeroed else (),
            **dict(launch.constants),
        )
    dtypes = tuple(operand.dtype.name for operand in operands)
    results = tuple(result_type(operands[0], out.shape, out.dtype) for out in launch.outs)
    result = results if isinstance(launch.out, tuple) else results[0]
    return jax.ffi.ffi_call(TARGET, result)(
        *operands, name=launch.kernel, opaque=_compiled_call(launch, capability, dtypes)
    )


@functools.cache
def _compiled_call(launch: Launch, capability: int, dtypes: tuple[str, ...]) -> bytes:
    """A call with its compiled kernel, as the foreign function reads it."""
    source = getattr(kernels, launch.kernel).cache_key  # with the functions that it calls
    key = f"{launch} {capability} {dtypes} {source} {_compilers()}"
    return kernel_cache.read_or_make(key, lambda: _compile(launch, capability, dtypes))


@functools.cache
def _compilers() -> str:
    """All that a compiled kernel depends on beside its call and its source."""
    from triton._C.libtriton import get_cache_invalidating_env_vars

    versions = [metadata.version(package) for package in ("jaxlib", "jax-triton", "triton")]
    switches = sorted(get_cache_invalidating_env_vars().items())
    return f"{versions} {switches}"


def _compile(launch: Launch, capability: int, dtypes: tuple[str, ...]) -> bytes:
    from jax._src.lib import gpu_triton
    from jax_triton import triton_lib

    types = [POINTERS[name] for name in (*dtypes, *(out.dtype.name for out in launch.outs))]
    kernel, _ = triton_lib.get_or_create_triton_kernel(
        triton_lib.get_cuda_backend,
        "cuda",
        getattr(kernels, launch.kernel),
        types,
        (),
        num_warps=launch.tile.warps,
        num_stages=launch.tile.stages,
        num_ctas=1,
        compute_capability=capability,
        enable_fp_fusion=True,
        metaparams=dict(sorted(launch.constants)),
        dump=False,
    )
    zeroed = launch.outs[0]
    zeroed_bytes = math.prod(zeroed.shape) * zeroed.dtype.itemsize if launch.zeroed else 0
    arrays = [gpu_triton.create_array_parameter(0, ALIGNMENT) for _ in types]
    arrays[len(dtypes)] = gpu_triton.create_array_parameter(zeroed_bytes, ALIGNMENT)
    kernel_call = gpu_triton.TritonKernelCall(kernel, launch.programs, 1, 1, arrays)
    return zlib.compress(kernel_call.to_proto(launch.kernel, b""))
