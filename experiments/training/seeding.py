"""Runs under the masks of a finished one, with new weights or with earlier ones of it.

Also what turns a run folder back into its trainer and state.
"""

from typing import Any

import jax

import blocksparse_jax as bsj
from experiments.data import load
from experiments.training import network_size
from experiments.training.config import TrainConfig
from experiments.training.execution import (
    State,
    checkpoint_like,
    dense_shapes,
    is_dense,
    layouts_of,
    masks_of,
    to_form,
)
from experiments.training.length import Length
from experiments.training.loop import Seed, Trainer
from experiments.training.registry import METHODS
from experiments.training.run_folder import RunFolder

# What makes masks those of another network, or of another method.
_SAME = ("model", "width", "stem", "method", "options", "sparsity")


def trainer_for(config: TrainConfig, data: Any) -> Trainer:
    """The trainer of a resolved config on a loaded data set."""
    per_epoch = data.steps_per_epoch(config.batch_size)
    assert config.epochs is not None
    length = Length(per_epoch, per_epoch * config.epochs)
    seed = None if config.masks is None else _seed(config, data)
    return Trainer(config, data.image_shape, data.num_classes, length, seed=seed)


def first_batch(config: TrainConfig, data: Any) -> tuple[Any, Any] | None:
    """What a method looks at before training; None for methods that look at no data."""
    if not METHODS[config.method].needs_batch or config.masks is not None:
        return None
    assert config.options is not None
    batches = data.train_batches(0, config.batch_size, config.seed)
    return config.options.batch(batches, data.num_classes)


def restored(
    folder: RunFolder, config: TrainConfig, data: Any, step: int | None = None
) -> tuple[Trainer, State]:
    """The trainer of a run, and its state at a checkpoint.

    Args:
      folder: of the run.
      config: of the run.
      data: its data set.
      step: of the checkpoint; None takes the last.

    Returns:
      Both, the state in the form that it was saved in.

    Raises:
      ValueError: there is no such checkpoint, or it cannot be read.
    """
    step = folder.latest() if step is None else step
    if step is None:
        raise ValueError(
            f"{folder.path}: has no checkpoint yet; go on with the run: {folder.resume_command}"
        )
    trainer = trainer_for(config, data)
    fresh = trainer.init(first_batch(config, data))
    meta = folder.checkpoints.meta(step)
    like = checkpoint_like(meta["form"], fresh, meta.get("channels"))
    return trainer, folder.checkpoints.restore(step, like)[0]


def _seed(config: TrainConfig, data: Any) -> Seed:
    """What a run takes from the one that `config.masks` names."""
    folder = RunFolder(str(config.masks))
    if not (folder.path / "config.json").exists():
        raise ValueError(f"masks: {folder.path} is no run folder; expected that of a finished run")
    other = folder.config()
    differ = [
        f"{name} {getattr(other, name)!r}, not {getattr(config, name)!r}"
        for name in _SAME
        if getattr(other, name) != getattr(config, name)
    ]
    if differ:
        raise ValueError(
            f"masks: {folder.path} is a run with {'; '.join(differ)}; its masks fit the same "
            "network, and the run is named by the method that made them: leave these flags out"
        )
    if folder.result() is None:
        raise ValueError(
            f"masks: the run in {folder.path} has not ended; finish it first: "
            f"{folder.resume_command}"
        )
    same_data = (other.dataset, other.examples) == (config.dataset, config.examples)
    if not same_data:
        data = load(other.dataset, config.data_dir, examples=other.examples)
    trainer, last = restored(folder, other, data)
    if is_dense(last):
        raise ValueError(f"masks: {folder.path} is a dense run, which has no masks")
    if network_size.parameters(dense_shapes(last)) < network_size.parameters(trainer.shapes):
        raise ValueError(
            f"masks: {folder.path} is a run whose network lost channels, so its masks do not fit a "
            "new one; take a run of a method that removes none"
        )
    layouts = layouts_of(last)
    nodes = jax.tree.leaves(layouts, is_leaf=bsj.is_layout)
    has_layouts = any(isinstance(node, bsj.BlockLayout) for node in nodes)
    masks = {"layouts": layouts} if has_layouts else {"masks": masks_of(last)}
    if config.rewind is None:
        return Seed(masks)
    if not same_data:
        raise ValueError(
            f"rewind: {folder.path} is a run on {other.dataset}, not {config.dataset}; leave "
            "--rewind out to draw new weights, or --dataset"
        )
    if config.rewind == 0:
        return Seed(masks, *trainer.initial())
    if config.rewind not in (steps := folder.checkpoints.steps()):
        raise ValueError(
            f"rewind: {folder.path} has checkpoints of the steps {', '.join(map(str, steps))}, and "
            f"its initial weights as step 0, but none of step {config.rewind}; train it with "
            f"--keep-checkpoint {config.rewind}"
        )
    early = to_form("masked", restored(folder, other, data, config.rewind)[1])
    return Seed(masks, early.params, early.batch_stats)
