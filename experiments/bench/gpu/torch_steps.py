"""PyTorch's dense training step on the same GPU: what a sparse step has to beat."""

from typing import Any

import jax
import numpy as np

from blocksparse_jax.tree import path_name
from experiments.bench.gpu.step_setup import LENGTH, STEP, set_up
from experiments.bench.gpu.step_times import steps_in_burst
from experiments.bench.gpu.training_units import StepOptions, Unit
from experiments.bench.torch_baseline.process import TorchProcess
from experiments.measuring.timing import median_iqr
from experiments.training.optimizer import learning_rate

TOLERANCES = {"float32": 1e-3, "bfloat16": 2e-2}  # of the first loss, relative


def measure_torch_steps(
    options: StepOptions, unit: Unit, python: str, dense: dict[str, Any] | None
) -> dict[str, Any]:
    """Times PyTorch's dense step: channels_last, autocast, the whole step in one CUDA graph.

    It starts from the weights and the batch of the zoo's dense step, with the same optimizer.

    Args:
      options: of all steps.
      unit: the step.
      python: path of a Python that has PyTorch.
      dense: what the zoo's dense step gave.

    Returns:
      As `measure_steps` for a dense step; also PyTorch's version, and whether a graph was captured.

    Raises:
      AssertionError: there is no dense step, or the first losses differ.
    """
    if not dense:
        raise AssertionError("PyTorch: there is no dense step to compare with; nothing was timed")
    trainer, state, images, labels = set_up(options, unit, None)
    leaves = jax.tree_util.tree_leaves_with_path(state.params)
    arrays: dict[str, Any] = {
        "weights": {path_name(path): np.asarray(leaf) for path, leaf in leaves},
        "images": np.asarray(images),
        "labels": np.asarray(labels),
    }
    config = trainer.config
    steps = steps_in_burst(dense["step_ms_median"], options)
    with TorchProcess(python) as process:
        calls = process.load(
            "gpu_training",
            arrays,
            steps=steps,
            half=options.precision == "bfloat16",
            label_smoothing=config.label_smoothing,
            lr=float(learning_rate(config, LENGTH)(STEP)),
            momentum=config.momentum,
            weight_decay=config.weight_decay,
        )
        loss, captured = (float(array) for array in process.results("first"))
        if not abs(loss - dense["loss"]) <= TOLERANCES[options.precision] * abs(dense["loss"]):
            raise AssertionError(
                f"PyTorch's first loss is {loss:.4f} and the dense step's {dense['loss']:.4f}; "
                "nothing was timed"
            )
        calls["steps"]()
        times_ms = [calls["steps"]() / steps for _ in range(options.repetitions)]
        version = process.version
    median, iqr = median_iqr(times_ms)
    return {
        "loss": loss,
        "step_ms_median": median,
        "step_ms_iqr": iqr,
        "steps": steps,
        "repetitions": options.repetitions,
        "torch": version,
        "captured": bool(captured),
    }
