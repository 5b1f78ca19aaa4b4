"""The options of the GPU kernel benchmark."""

import dataclasses
import os
from pathlib import Path
from typing import Literal

STAGES = ("gate", "headline", "check", "ceilings", "layers")


@dataclasses.dataclass(frozen=True)
class GpuConfig:
    """What is timed on a GPU.

    Attributes:
      device: gpu.
      stages: of gate, headline, check, ceilings, layers.
      sparsities: fractions of the weights removed, in this order.
      layers: a part of the layers' names; empty for all.
      group_size: filters in a group.
      channel_block: the longest runs of channels.
      dtype: of the activations.
      minutes: after so many no unit begins; None: no limit.
      threads: how many programs compile at once (dense convolutions: one after the other).
      repetitions: of each program of some milliseconds.
      keep_going: time the implementations that are right although others failed their check; the
        exit status is 1 all the same.
      allow_absent: an implementation that cannot run here is no failure.
      journal: JSON-lines file that is continued.
      out: JSON file; None is experiments/results/bench_kernels_gpu.json.
      quick: a dry run of tiny shapes on any device; writes a file only if `out` is given.
    """

    device: Literal["gpu"] = "gpu"
    stages: tuple[str, ...] = STAGES
    sparsities: tuple[float, ...] = (0.9, 0.8, 0.95)
    layers: str = ""
    group_size: int = 64
    channel_block: int = 16
    dtype: str = "bfloat16"
    minutes: float | None = None
    threads: int = min(16, os.cpu_count() or 1)
    repetitions: int = 9
    keep_going: bool = False
    allow_absent: bool = False
    journal: Path = Path("runs/gpu/bench_kernels.jsonl")
    out: Path | None = None
    quick: bool = False
