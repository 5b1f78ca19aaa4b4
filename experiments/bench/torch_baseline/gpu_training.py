"""Whole training steps on a GPU: channels_last, autocast, one CUDA graph for each step.

Runs in the Python that has PyTorch. Without a GPU it does the same on the CPU, without a graph.
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional

from experiments.bench.torch_baseline.job import Job, Tensors, activations
from experiments.bench.torch_baseline.training import make_network, make_optimizer

WARM_UP = 3  # steps before the capture, in which cuDNN times its algorithms


def load(
    folder: str,
    steps: int,
    half: bool,
    label_smoothing: float,
    lr: float,
    momentum: float,
    weight_decay: float,
) -> Job:
    """Loads weights.npz (by the zoo's names, kernels HWIO), images.npy (NHWC) and labels.npy.

    Args:
      folder: of the arrays.
      steps: in the call "steps", with one wait at its end.
      half: whether autocast computes in bfloat16.
      label_smoothing: mass spread over all classes.
      lr: learning rate.
      momentum: of SGD.
      weight_decay: of SGD; vectors are left out.

    Returns:
      The calls "first", which returns the first step's loss and whether a graph was captured, and
      "steps".
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.backends.cudnn.benchmark = True
    images = activations(np.load(Path(folder) / "images.npy")).to(device)
    labels = torch.from_numpy(np.load(Path(folder) / "labels.npy").astype(np.int64)).to(device)
    network = make_network(dict(np.load(Path(folder) / "weights.npz"))).to(device)
    optimizer = make_optimizer(network, lr, momentum, weight_decay)

    def step() -> torch.Tensor:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(device.type, torch.bfloat16, enabled=half, cache_enabled=False):
            logits = network(images)
        loss = functional.cross_entropy(logits.float(), labels, label_smoothing=label_smoothing)
        loss.backward()
        optimizer.step()
        return loss.detach()

    first_loss = step().float().cpu()
    run = step
    if device.type == "cuda":
        run = _captured(step)

    def many() -> Tensors:
        for _ in range(steps):
            loss = run()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return (loss,)

    captured = torch.tensor(float(device.type == "cuda"))
    return Job(
        {"first": lambda: (first_loss, captured), "steps": many},
        lambda tensors: [tensor.float().cpu().numpy() for tensor in tensors],
    )


def _captured(step: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
    """The step as a CUDA graph, which does not wait for its end."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(WARM_UP):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = step()

    def replay() -> torch.Tensor:
        graph.replay()
        return loss

    return replay
