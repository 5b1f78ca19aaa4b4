"""What the server can time: the calls of one job, and how tensors and arrays turn into each other.

Runs in the Python that has PyTorch.
"""

import dataclasses
from collections.abc import Callable

import numpy as np
import torch

Tensors = tuple[torch.Tensor, ...]


@dataclasses.dataclass(frozen=True)
class Job:
    """The calls that can be timed on the arrays that were loaded.

    Attributes:
      calls: by name.
      to_arrays: turns what a call returns into the arrays that the other end compares: activations
        NHWC, kernels HWIO.
    """

    calls: dict[str, Callable[[], Tensors]]
    to_arrays: Callable[[Tensors], list[np.ndarray]]


def activations(array: np.ndarray) -> torch.Tensor:
    """Returns NHWC activations as a tensor in PyTorch's channels_last format."""
    return _channels_last(array, (0, 3, 1, 2))


def conv_kernel(array: np.ndarray) -> torch.Tensor:
    """Returns an HWIO kernel as a tensor in PyTorch's channels_last format."""
    return _channels_last(array, (3, 2, 0, 1))


def weight(array: np.ndarray) -> torch.Tensor:
    """Returns a conv kernel, a dense kernel `[in, out]` or a vector as PyTorch stores it."""
    if array.ndim == 4:
        return conv_kernel(array)
    return torch.from_numpy(np.ascontiguousarray(array.T))


def _channels_last(array: np.ndarray, order: tuple[int, ...]) -> torch.Tensor:
    tensor = torch.from_numpy(np.ascontiguousarray(array)).permute(order)
    return tensor.clone(memory_format=torch.channels_last)
