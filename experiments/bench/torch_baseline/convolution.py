"""One dense convolution, forward and with both gradients.

Runs in the Python that has PyTorch.
"""

from pathlib import Path

import numpy as np
import torch
from torch.nn import functional

from experiments.bench.torch_baseline.job import Job, Tensors, activations, conv_kernel


def load(folder: str, strides: list[int], padding: list[list[int]]) -> Job:
    """Loads x.npy and dy.npy (NHWC) and kernel.npy (HWIO).

    PyTorch pads both sides alike. Padding that is larger by one on the far side (SAME at stride 2)
    is padding that is larger on the near side of the mirrored image, and there the last zeros are
    never read.

    Args:
      folder: of the arrays.
      strides: step in pixels (y, x).
      padding: zeros in pixels ((top, bottom), (left, right)).

    Returns:
      The calls "forward" and "forward + gradients".
    """
    mirrored = tuple(axis for axis, (low, high) in enumerate(padding, 1) if low < high)
    mirrored_kernel = tuple(axis - 1 for axis in mirrored)
    pads = [max(sides) for sides in padding]
    arrays = {name: np.load(Path(folder) / f"{name}.npy") for name in ("x", "dy", "kernel")}
    x, dy = (activations(np.flip(arrays[name], mirrored)) for name in ("x", "dy"))
    kernel = conv_kernel(np.flip(arrays["kernel"], mirrored_kernel))
    leaves = [
        tensor.clone(memory_format=torch.channels_last).requires_grad_() for tensor in (x, kernel)
    ]

    def forward() -> Tensors:
        with torch.inference_mode():
            return (functional.conv2d(x, kernel, None, strides, pads),)

    def forward_and_gradients() -> Tensors:
        y = functional.conv2d(*leaves, None, strides, pads)
        return y, *torch.autograd.grad(y, leaves, dy)

    def to_arrays(tensors: Tensors) -> list[np.ndarray]:
        orders = ((0, 2, 3, 1), (0, 2, 3, 1), (2, 3, 1, 0))
        flips = (mirrored, mirrored, mirrored_kernel)
        return [
            np.flip(tensor.detach().numpy().transpose(order), flip)
            for tensor, order, flip in zip(tensors, orders, flips)
        ]

    return Job({"forward": forward, "forward + gradients": forward_and_gradients}, to_arrays)
