"""A residual network for ImageNet at inference, its batch norms folded into the convolutions.

Runs in the Python that has PyTorch.
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional

from experiments.bench.torch_baseline.job import Job, Tensors, activations, weight


def load(folder: str, stride_in_3x3: bool) -> Job:
    """Loads weights.npz (kernels HWIO, biases) and images.npy (NHWC).

    Args:
      folder: of the arrays.
      stride_in_3x3: whether a bottleneck's stride sits in its 3x3 conv.

    Returns:
      The calls "eager" and, where this PyTorch has it, "frozen" (weights in oneDNN's own order,
      conv and ReLU in one).

    Reference: He et al., "Deep residual learning", CVPR 2016.
    """
    images = activations(np.load(Path(folder) / "images.npy"))
    network = ResNet(dict(np.load(Path(folder) / "weights.npz")), stride_in_3x3).eval()
    networks = {"eager": network}
    if hasattr(torch.jit, "optimize_for_inference"):
        with torch.no_grad():
            traced = torch.jit.trace(network, images)
            networks["frozen"] = torch.jit.optimize_for_inference(torch.jit.freeze(traced))

    def logits_of(network: torch.nn.Module) -> Callable[[], Tensors]:
        def logits() -> Tensors:
            with torch.inference_mode():
                return (network(images),)

        return logits

    return Job(
        {name: logits_of(network) for name, network in networks.items()},
        lambda tensors: [tensor.numpy() for tensor in tensors],
    )


class ResNet(torch.nn.Module):
    """The network; depth and blocks are read from the names, as in "stage1_block1/conv1/kernel"."""

    def __init__(self, weights: dict[str, np.ndarray], stride_in_3x3: bool):
        super().__init__()
        self.names = set(weights)
        self.stride_in_3x3 = stride_in_3x3
        for name, array in weights.items():
            self.register_buffer(name.replace("/", "_"), weight(array))

    def conv(self, name: str, x: torch.Tensor, stride: int = 1) -> torch.Tensor:
        """A conv with bias (the folded batch norm), padded by half its kernel."""
        kernel = getattr(self, f"{name}_kernel")
        bias = getattr(self, f"{name}_bias")
        return functional.conv2d(x, kernel, bias, stride, kernel.shape[-1] // 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Returns the logits of images."""
        x = functional.relu_(self.conv("stem", x, 2))
        x = functional.max_pool2d(x, 3, 2, 1)
        for block in sorted({name.split("/")[0] for name in self.names if "block" in name}):
            x = self.block(block, x)
        return functional.linear(x.mean((2, 3)), self.classifier_kernel, self.classifier_bias)

    def block(self, name: str, x: torch.Tensor) -> torch.Tensor:
        """A residual block: two 3x3 convs, or three convs of a bottleneck."""
        stride = 2 if name.endswith("_block1") and name != "stage1_block1" else 1
        count = sum(f"{name}/conv{i}/kernel" in self.names for i in (1, 2, 3))
        strided = 2 if count == 3 and self.stride_in_3x3 else 1
        y = x
        for i in range(1, count + 1):
            y = self.conv(f"{name}_conv{i}", y, stride if i == strided else 1)
            y = functional.relu_(y) if i < count else y
        if f"{name}/downsample/kernel" in self.names:
            x = self.conv(f"{name}_downsample", x, stride)
        return functional.relu_(y.add_(x))
