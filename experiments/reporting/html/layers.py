"""The layers of a run's network: what is kept of each, and how densely its blocks are filled."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import blocksparse_jax as bsj
from blocksparse_jax import tree
from experiments.data import load
from experiments.models.flops import conv_positions
from experiments.training.config import TrainConfig
from experiments.training.execution import State, layouts_of, masks_of, to_form, widths_of
from experiments.training.loop import Trainer
from experiments.training.run_folder import RunFolder
from experiments.training.seeding import restored


@dataclasses.dataclass(frozen=True)
class Layer:
    """A convolution or dense layer.

    Attributes:
      name: of its kernel.
      shape: of the dense kernel.
      kept: weights that are kept.
      positions: how often each weight is used for one image.
      pattern: the pattern in words.
      mask: bool, in the kernel's shape; None where the layer is dense.
      layout: `BlockLayout` or `Dense`.
      fill: of the blocks, in the forward pass and the input gradient; None without a layout.
    """

    name: str
    shape: tuple[int, ...]
    kept: int
    positions: int
    pattern: str
    mask: np.ndarray | None
    layout: Any
    fill: tuple[float, float] | None

    @property
    def weights(self) -> int:
        """How many there are, the pruned ones too."""
        return int(np.prod(self.shape))

    @property
    def density(self) -> float:
        """The kept fraction of the weights: of the multiplications too."""
        return self.kept / max(1, self.weights)


@dataclasses.dataclass(frozen=True)
class Network:
    """The network of a run at its last checkpoint.

    Attributes:
      step: of the checkpoint.
      layers: in the order in which they run.
      trainer: of the run.
      state: at the checkpoint.
      image_shape: (height, width, channels).
    """

    step: int
    layers: tuple[Layer, ...]
    trainer: Trainer
    state: State
    image_shape: tuple[int, ...]


def network_of(folder: RunFolder, config: TrainConfig) -> Network:
    """Restores the last checkpoint of a run and looks at its layers.

    Args:
      folder: of the run.
      config: of the run, resolved.

    Returns:
      The network.

    Raises:
      ValueError: there is no checkpoint, or it cannot be read.
      OSError: the data set is not prepared, or the checkpoint cannot be read.
    """
    data = load(config.dataset, config.data_dir)
    step = folder.latest()
    trainer, state = restored(folder, config, data, step)
    assert step is not None
    layers = tuple(_layers(trainer, state, data.image_shape))
    return Network(step, layers, trainer, state, data.image_shape)


def _layers(trainer: Trainer, state: State, image_shape: tuple[int, ...]) -> list[Layer]:
    dense = to_form("masked", state)
    variables = {"params": dense.params, "batch_stats": dense.batch_stats}
    model = trainer.network.model("masked", widths=widths_of(state))
    positions = conv_positions(model, variables, image_shape)
    patterns = {}
    if trainer.spec is not None:
        summary = bsj.summarize(dense.params, dense.opt_state)
        patterns = {row.name: row.pattern for row in summary.rows}
    masks = {name: mask for name, mask in _named(masks_of(state)).items() if jnp.ndim(mask)}
    layouts = _named(layouts_of(state) or {}, is_leaf=bsj.is_layout)
    layers = []
    kernels = _named(dense.params)
    for name, count in positions.items():  # in the order of the network
        kernel = kernels[name]
        mask = np.asarray(masks[name]) if name in masks else None
        layout = layouts.get(name, bsj.Dense())
        layers.append(
            Layer(
                name=name,
                shape=kernel.shape,
                kept=kernel.size if mask is None else int(mask.sum()),
                positions=count,
                pattern=patterns.get(name, "dense"),
                mask=mask,
                layout=layout,
                fill=_fill(layout),
            )
        )
    return layers


def _fill(layout: Any) -> tuple[float, float] | None:
    """How densely the blocks are filled; None where there are none."""
    if not isinstance(layout, bsj.BlockLayout) or not jnp.size(layout.channels):
        return None
    return bsj.block_fill(layout)


def _named(leaves: Any, is_leaf: Any = None) -> dict[str, Any]:
    paths = jax.tree.leaves_with_path(leaves, is_leaf=is_leaf)
    return {tree.path_name(path): leaf for path, leaf in paths}
