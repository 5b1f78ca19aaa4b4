"""What result.json says of a run that has ended."""

from collections.abc import Sequence
from typing import Any

from experiments.data.shown_name import shown_name
from experiments.measuring.environment import commit, device, versions
from experiments.measuring.timing import StepTimer, median_iqr
from experiments.training import network_size
from experiments.training.execution import State, dense_shapes, masks_of, to_form
from experiments.training.history import History
from experiments.training.loop import Trainer


def result_of(
    trainer: Trainer,
    state: State,
    history: History,
    timer: StepTimer,
    rows: Sequence[dict[str, Any]],
    seconds: float,
) -> dict[str, Any]:
    """Sums up a run.

    Args:
      trainer: of the run.
      state: after its last step, in any form.
      history: of its masks.
      timer: of its steps in this process.
      rows: of its metrics.jsonl.
      seconds: of its training.

    Returns:
      JSON values; what the method adds to them is not among them.
    """
    config, original = trainer.config, trainer.shapes
    last = [row for row in rows if row["kind"] == "epoch"][-1]
    kind = state.form, network_size.parameters(dense_shapes(state))
    median, iqr = median_iqr(timer.milliseconds(kind))
    params = to_form("masked", state).params
    names = ("method", "dataset", "model", "width", "seed", "sparsity")
    return {name: getattr(config, name) for name in names} | {
        "data": shown_name(config.dataset, config.data_dir, config.examples),
        "density": last["density"],
        "nonzero_pruned": last["nonzero_pruned"],
        # Rows of runs that began with an earlier version have no such columns.
        "nonfinite_values": last.get("nonfinite_values", 0),
        "mask_updates_left_out": last.get("mask_updates_left_out", 0),
        "test_accuracy": last["test_accuracy"],
        "train_loss": last["loss"],
        "kept_flops_fraction": network_size.kept_flops(
            masks_of(state), params, original, history.positions
        ),
        **history.numbers(),
        "parameters": last["parameters"],
        "original_parameters": network_size.parameters(original),
        "step_ms_median": median if median is not None else last["step_ms_median"],
        "step_ms_iqr": iqr if iqr is not None else last["step_ms_iqr"],
        "original_step_ms_median": _original_step_ms(trainer, state, timer, rows),
        "topology_step_ms_median": median_iqr(timer.milliseconds("topology"))[0],
        "epochs": config.epochs,
        "steps": history.steps,
        "batch_size": config.batch_size,
        "execution": config.execution,
        "precision": config.precision,
        "train_seconds": round(seconds, 1),
        "device": device(),
        "versions": versions(),
        "commit": commit(),
    }


def _original_step_ms(
    trainer: Trainer, state: State, timer: StepTimer, rows: Sequence[dict[str, Any]]
) -> float | None:
    """The median step of the network that training began with, before channels went."""
    original = network_size.parameters(trainer.shapes)
    median = median_iqr(timer.milliseconds((state.form, original)))[0]
    epochs = [row for row in rows if row["kind"] == "epoch" and row.get("parameters") == original]
    logged = (row["step_ms_median"] for row in epochs)
    return median or next((ms for ms in logged if ms is not None), None)
