"""Runs Triton kernels in Triton's interpreter, in a process of its own.

Triton decides at import whether it interprets, so `test_triton.py` starts this file with
TRITON_INTERPRET=1. It reads pickled kernel calls from standard input and writes the results of
each, or the text of its error, to standard output.

Three things differ from a GPU: an address outside of the operands is an error, results begin as NaN
unless they are zeroed, and NumPy arrays stand in for tensors.
"""

import os
import pickle
import sys
from typing import Any

import ml_dtypes
import numpy as np
import triton.language as tl
from triton.runtime import interpreter

from pallas_kernels.block_sparse_conv.triton import kernels

TYPES = {
    "float32": tl.float32,
    "bfloat16": tl.bfloat16,
    "float16": tl.float16,
    "int32": tl.int32,
}
OPERANDS: list[np.ndarray] = []
"""The arrays of the call that is running."""


class Tensor:
    """As much of a tensor as the interpreter asks for."""

    def __init__(self, array: np.ndarray):
        self.array = array
        self.dtype = TYPES[array.dtype.name]

    def data_ptr(self):
        return self.array.ctypes.data

    def cpu(self):
        return self

    def copy_(self, other):
        pass

    def untyped_storage(self):
        return self

    def new_empty(self, *_, **__):
        return Tensor(self.array)

    def set_(self, storage, *_):
        self.array = storage.array
        return self

    def storage_offset(self):
        return 0

    def size(self):
        return self.array.shape

    def stride(self):
        return self.array.strides


def guard(name: str, mask_argument: int) -> None:
    """Makes a memory operation of the interpreter check its addresses."""
    plain = getattr(interpreter.InterpreterBuilder, name)

    def checked(self, *args):
        pointers = next(a.data for a in args if isinstance(a, interpreter.TensorHandle))
        mask = np.broadcast_to(np.asarray(args[mask_argument].data, bool), np.shape(pointers))
        addresses = np.asarray(pointers)[mask].astype(np.int64)
        inside = np.zeros(addresses.shape, bool)
        for array in OPERANDS:
            start = array.ctypes.data
            inside |= (addresses >= start) & (addresses < start + array.nbytes)
        outside = f"{(~inside).sum()} of {addresses.size} addresses lie outside of the operands"
        assert inside.all(), f"{name}: {outside}"
        return plain(self, *args)

    setattr(interpreter.InterpreterBuilder, name, checked)


def dot(self, a, b, d, *_):
    """A product in float32; the interpreter multiplies the bits of bfloat16 as integers."""

    def floats(operand):
        data = np.asarray(operand.data)
        is_bfloat16 = operand.dtype.scalar == tl.bfloat16
        return (data.view(ml_dtypes.bfloat16) if is_bfloat16 else data).astype(np.float32)

    return interpreter.TensorHandle(floats(a) @ floats(b) + d.data, d.dtype.scalar)


def index_as_scalar() -> None:
    """Lets a tensor be an index: Triton 3.6 calls `int([n])`, which NumPy 2.5 refuses."""
    plain = interpreter._patch_lang_tensor

    def patched(tensor, *scope):
        plain(tensor, *scope)
        tensor.__index__ = lambda self: int(np.asarray(self.handle.data).item())

    interpreter._patch_lang_tensor = patched


def answer(call: tuple[Any, ...]) -> list[np.ndarray] | str:
    """The results of a kernel call, or the text of its error."""
    kernel, programs, constants, results, zeroed, arrays = call
    outs = [np.full(shape, 0 if zeroed else np.nan, dtype) for shape, dtype in results]
    OPERANDS[:] = [*arrays, *outs]
    try:
        getattr(kernels, kernel)[(programs,)](*map(Tensor, OPERANDS), **constants)
    except Exception as error:
        return repr(error)
    return outs


def main() -> None:
    """Answers calls until the process is killed."""
    guard("create_masked_load", 1)
    guard("create_masked_store", 2)
    guard("create_atomic_rmw", 3)
    interpreter.InterpreterBuilder.create_dot = dot
    index_as_scalar()
    pipe = os.fdopen(os.dup(1), "wb")
    sys.stdout = sys.stderr
    while True:
        pickle.dump(answer(pickle.load(sys.stdin.buffer)), pipe)
        pipe.flush()


if __name__ == "__main__":
    main()
