"""PyTorch's dense convolutions on a CPU, as a process that the benchmarks ask for one call at a
time.

PyTorch is the strongest dense baseline that we know on a CPU, and no dependency of this project.
The benchmarks take the path of a Python that has it (and NumPy), in an environment of its own:

    python3 -m venv torchenv && torchenv/bin/python -m pip install torch numpy
    python -m experiments.bench.kernels --device cpu --torch torchenv/bin/python

This file runs in that Python and imports nothing else. It reads one JSON object per line and
answers with one; `torch_process.py` is its other end. It times itself, runs at PyTorch's best
(channels_last, a steady allocator, both ways of waiting: see `torch_process.py`), and answers only
when its threads sleep: while the other side is timed, nothing runs here.
"""

import ctypes
import json
import os
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional

Calls = dict[str, Callable[[], Any]]  # what can be timed, by name; each gives tensors


def main() -> None:
    """Answers requests until standard input ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a library prints is no answer
    warnings.filterwarnings("ignore")
    (
        ctypes.CDLL(None).mallopt(-4, 0),
        ctypes.CDLL(None).mallopt(-1, 2**31 - 1),
    )  # as experiments.bench.measure.steady_memory
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    calls: Calls = {}
    print(json.dumps({"torch": torch.__version__}), file=answers, flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        try:
            answer = DO[request.pop("do")](calls, **request)
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), file=answers, flush=True)


def conv(calls: Calls, folder: str, strides: list[int], padding: list[list[int]]) -> dict[str, Any]:
    """Takes one convolution: x.npy and dy.npy (NHWC), kernel.npy (HWIO).

    PyTorch pads both sides alike. Padding of one more on the far side (SAME, stride 2) is padding
    of one more on the near side of the mirrored image, and there the last zeros are never read.

    Args:
      calls: what can be timed; replaced.
      folder: of the arrays.
      strides: step in pixels (y, x).
      padding: zeros in pixels ((top, bottom), (left, right)).

    Returns:
      The names of the calls: the output, or the output and both gradients.
    """
    mirrored = [axis for axis, (low, high) in enumerate(padding, 1) if low < high]
    zeros = [max(pads) for pads in padding]
    x, dy = (
        _tensor(np.flip(np.load(Path(folder) / f"{name}.npy"), mirrored), (0, 3, 1, 2))
        for name in ("x", "dy")
    )
    kernel = _tensor(
        np.flip(np.load(Path(folder) / "kernel.npy"), [axis - 1 for axis in mirrored]), (3, 2, 0, 1)
    )
    leaves = [
        x.clone(memory_format=torch.channels_last).requires_grad_(),
        kernel.clone(memory_format=torch.channels_last).requires_grad_(),
    ]

    def forward() -> tuple[torch.Tensor, ...]:
        with torch.inference_mode():
            return (functional.conv2d(x, kernel, None, strides, zeros),)

    def training() -> tuple[torch.Tensor, ...]:
        y = functional.conv2d(*leaves, None, strides, zeros)
        return y, *torch.autograd.grad(y, leaves, dy)

    def back(results: tuple[torch.Tensor, ...]) -> list[np.ndarray]:
        orders, axes = (
            ((0, 2, 3, 1), (0, 2, 3, 1), (2, 3, 1, 0)),
            (mirrored, mirrored, [axis - 1 for axis in mirrored]),
        )
        return [
            np.flip(r.detach().numpy().transpose(order), flip)
            for r, order, flip in zip(results, orders, axes)
        ]

    calls.clear()
    calls.update({"forward": forward, "forward + gradients": training, "results": back})
    return {"names": ["forward", "forward + gradients"]}


def resnet(calls: Calls, folder: str, stride_in_3x3: bool) -> dict[str, Any]:
    """Takes a residual network for ImageNet and a batch: weights.npz (kernels HWIO, biases) and
    images.npy (NHWC).

    Args:
      calls: what can be timed; replaced.
      folder: of the arrays.
      stride_in_3x3: a bottleneck's stride sits in its 3x3 conv.

    Returns:
      The names of the calls: "eager", and "frozen" (weights in oneDNN's own order, conv and ReLU in
      one) where this PyTorch has it.

    Reference: He et al., "Deep residual learning", CVPR 2016.
    """
    images = _tensor(np.load(Path(folder) / "images.npy"), (0, 3, 1, 2))
    network = ResNet(dict(np.load(Path(folder) / "weights.npz")), stride_in_3x3).eval()
    networks = {"eager": network}
    if hasattr(torch.jit, "optimize_for_inference"):
        with torch.no_grad():
            networks["frozen"] = torch.jit.optimize_for_inference(
                torch.jit.freeze(torch.jit.trace(network, images))
            )

    def call(network: Any) -> Callable[[], tuple[torch.Tensor]]:
        def logits() -> tuple[torch.Tensor]:
            with torch.inference_mode():
                return (network(images),)

        return logits

    calls.clear()
    calls.update({name: call(network) for name, network in networks.items()})
    calls["results"] = lambda results: [r.numpy() for r in results]
    return {"names": list(networks)}


def run(calls: Calls, name: str) -> dict[str, Any]:
    """Runs one call.

    Args:
      calls: what can be timed.
      name: of the call.

    Returns:
      `{"ms": ...}`, when the threads sleep again.
    """
    start = time.perf_counter()
    calls[name]()
    elapsed = time.perf_counter() - start
    used, before = time.process_time(), -1.0
    while used - before > 2e-4:  # OpenMP's threads wait for more work for some milliseconds
        time.sleep(2e-3)
        before, used = used, time.process_time()
    return {"ms": 1e3 * elapsed}


def results(calls: Calls, name: str, folder: str) -> dict[str, Any]:
    """Runs one call and writes what it gives.

    Args:
      calls: what can be timed.
      name: of the call.
      folder: where 0.npy, 1.npy, ... go: activations NHWC, kernels HWIO.

    Returns:
      `{"count": ...}`.
    """
    arrays = calls["results"](calls[name]())  # type: ignore[call-arg]
    for i, array in enumerate(arrays):
        np.save(Path(folder) / f"{i}.npy", array)
    return {"count": len(arrays)}


def _tensor(array: np.ndarray, order: tuple[int, ...]) -> Any:
    return (
        torch.from_numpy(np.ascontiguousarray(array))
        .permute(order)
        .clone(memory_format=torch.channels_last)
    )


class ResNet(torch.nn.Module):
    """The network; its depth and its blocks are read from the names, "stage1_block1/conv1/kernel"."""

    def __init__(self, weights: dict[str, np.ndarray], stride_in_3x3: bool):
        super().__init__()
        self.names, self.stride_in_3x3 = set(weights), stride_in_3x3
        for name, array in weights.items():
            tensor = (
                _tensor(array, (3, 2, 0, 1))
                if array.ndim == 4
                else torch.from_numpy(np.ascontiguousarray(array.T))
            )
            self.register_buffer(name.replace("/", "_"), tensor)

    def conv(self, name: str, x: torch.Tensor, stride: int = 1) -> torch.Tensor:
        """A conv with bias (the folded batch norm), padded by half its kernel."""
        kernel, bias = getattr(self, f"{name}_kernel"), getattr(self, f"{name}_bias")
        return functional.conv2d(x, kernel, bias, stride, kernel.shape[-1] // 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits of images."""
        x = functional.max_pool2d(functional.relu_(self.conv("stem", x, 2)), 3, 2, 1)
        for block in sorted(
            {name.split("/")[0] for name in self.names if name.startswith("stage")}
        ):
            stride = 2 if block.endswith("_block1") and block != "stage1_block1" else 1
            count = sum(f"{block}/conv{i}/kernel" in self.names for i in (1, 2, 3))
            strided = 2 if count == 3 and self.stride_in_3x3 else 1
            y = x
            for i in range(1, count + 1):
                y = self.conv(f"{block}_conv{i}", y, stride if i == strided else 1)
                y = functional.relu_(y) if i < count else y
            if f"{block}/downsample/kernel" in self.names:
                x = self.conv(f"{block}_downsample", x, stride)
            x = functional.relu_(y.add_(x))
        return functional.linear(x.mean((2, 3)), self.classifier_kernel, self.classifier_bias)


DO: dict[str, Callable[..., dict[str, Any]]] = {
    "conv": conv,
    "resnet": resnet,
    "run": run,
    "results": results,
}


if __name__ == "__main__":
    main()
