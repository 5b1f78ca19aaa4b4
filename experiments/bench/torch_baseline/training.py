"""Whole training steps of VGG-19 and of ResNets.

Runs in the Python that has PyTorch.
"""

from pathlib import Path

import numpy as np
import torch
from torch.nn import functional

from experiments.bench.torch_baseline.job import Job, Tensors, activations, weight

NORM_MOMENTUM = 0.1  # of the new batch's statistics; flax says the same as momentum 0.9
NORM_EPSILON = 1e-5


def load(folder: str, lr: float, momentum: float, weight_decay: float) -> Job:
    """Loads weights.npz (by the zoo's names, kernels HWIO), images.npy (NHWC) and labels.npy.

    A step is the forward pass with batch norm in training mode, cross entropy, the backward pass,
    and SGD with momentum. Weight decay leaves out vectors, as in the zoo's training.

    Args:
      folder: of the arrays.
      lr: learning rate.
      momentum: of SGD.
      weight_decay: of SGD.

    Returns:
      The call "step", which trains on the same batch over and over and returns its loss.
    """
    images = activations(np.load(Path(folder) / "images.npy"))
    labels = torch.from_numpy(np.load(Path(folder) / "labels.npy").astype(np.int64))
    network = make_network(dict(np.load(Path(folder) / "weights.npz")))
    optimizer = make_optimizer(network, lr, momentum, weight_decay)

    def step() -> Tensors:
        optimizer.zero_grad(set_to_none=True)
        loss = functional.cross_entropy(network(images), labels)
        loss.backward()
        optimizer.step()
        return (loss.detach(),)

    return Job({"step": step}, lambda tensors: [tensor.numpy() for tensor in tensors])


def make_network(weights: dict[str, np.ndarray]) -> "Network":
    """Returns the network that weights belong to, by their names."""
    residual = any("block" in name for name in weights)
    return (ResNet if residual else VGG)(weights)


def make_optimizer(
    network: torch.nn.Module, lr: float, momentum: float, weight_decay: float
) -> torch.optim.Optimizer:
    """Returns SGD with momentum; weight decay leaves out vectors, as in the zoo's training."""
    vectors = [p for p in network.parameters() if p.ndim == 1]
    kernels = [p for p in network.parameters() if p.ndim > 1]
    groups = [{"params": kernels, "weight_decay": weight_decay}, {"params": vectors}]
    return torch.optim.SGD(groups, lr=lr, momentum=momentum, fused=True)


class Network(torch.nn.Module):
    """What the networks share; depth and width are read from the weights."""

    def __init__(self, weights: dict[str, np.ndarray]):
        super().__init__()
        self.names = set(weights)
        for name, array in weights.items():
            self.register_parameter(_attribute(name), torch.nn.Parameter(weight(array)))
            if name.endswith("/scale"):
                norm = _attribute(name.removesuffix("/scale"))
                self.register_buffer(f"{norm}_mean", torch.zeros(len(array)))
                self.register_buffer(f"{norm}_var", torch.ones(len(array)))

    def conv_norm(self, x: torch.Tensor, conv: str, norm: str, stride: int = 1) -> torch.Tensor:
        """A conv without bias, padded by half its kernel, then batch norm over the batch."""
        kernel = getattr(self, _attribute(f"{conv}/kernel"))
        norm = _attribute(norm)
        return functional.batch_norm(
            functional.conv2d(x, kernel, None, stride, kernel.shape[-1] // 2),
            getattr(self, f"{norm}_mean"),
            getattr(self, f"{norm}_var"),
            getattr(self, f"{norm}_scale"),
            getattr(self, f"{norm}_bias"),
            training=True,
            momentum=NORM_MOMENTUM,
            eps=NORM_EPSILON,
        )

    def classifier(self, x: torch.Tensor) -> torch.Tensor:
        """Mean over the image, then the dense layer."""
        return functional.linear(x.mean((2, 3)), self.classifier_kernel, self.classifier_bias)


class VGG(Network):
    """Convs of 3x3 in stages; a 2x2 max pool between stages.

    Reference: the CIFAR form of VGG-19 of Wang et al., "GraSP", ICLR 2020.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Returns the logits of images."""
        stages = {name.split("/")[0] for name in self.names if name.startswith("stage")}
        for conv in ["stem", *sorted(name for name in stages if not name.endswith("_norm"))]:
            if conv.endswith("_conv1"):
                x = functional.max_pool2d(x, 2)
            x = functional.relu_(self.conv_norm(x, conv, f"{conv}_norm"))
        return self.classifier(x)


class ResNet(Network):
    """A stem and residual blocks; every stage but the first halves the image.

    The stem is 3x3, or the 7x7 one of ImageNet's networks with a max pool.

    Reference: He et al., "Deep residual learning", CVPR 2016.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Returns the logits of images."""
        large = self.stem_kernel.shape[-1] == 7
        x = functional.relu_(self.conv_norm(x, "stem", "stem_norm", 2 if large else 1))
        x = functional.max_pool2d(x, 3, 2, 1) if large else x
        for block in sorted({name.split("/")[0] for name in self.names if "block" in name}):
            x = self.block(block, x)
        return self.classifier(x)

    def block(self, name: str, x: torch.Tensor) -> torch.Tensor:
        """A residual block: two 3x3 convs, or the three of a bottleneck; the first is strided."""
        stride = 2 if name.endswith("_block1") and name != "stage1_block1" else 1
        count = sum(f"{name}/conv{i}/kernel" in self.names for i in (1, 2, 3))
        y = functional.relu_(self.conv_norm(x, f"{name}/conv1", f"{name}/norm1", stride))
        for i in range(2, count + 1):
            y = self.conv_norm(y, f"{name}/conv{i}", f"{name}/norm{i}")
            y = functional.relu_(y) if i < count else y
        if f"{name}/downsample/kernel" in self.names:
            x = self.conv_norm(x, f"{name}/downsample", f"{name}/downsample_norm", stride)
        return functional.relu_(y + x)


def _attribute(name: str) -> str:
    return name.replace("/", "_")
