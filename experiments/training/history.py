"""What the masks of a run were over time: the FLOPs of its steps, and the weights ever active."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import blocksparse_jax as bsj
from blocksparse_jax import tree
from experiments.models.flops import conv_positions
from experiments.training import network_size
from experiments.training.execution import State, dense_shapes, masks_of, to_form
from experiments.training.loop import Trainer


@dataclasses.dataclass
class _Spell:
    """Steps with the same masks.

    Attributes:
      counts: of the kept weights of each leaf, on the device; 1 where no mask prunes it.
      sizes: how many weights each leaf has.
      masked: whether a mask prunes each leaf.
      steps: without and with the dense gradient.
    """

    counts: Any
    sizes: dict[str, int]
    masked: list[bool]
    steps: list[int] = dataclasses.field(default_factory=lambda: [0, 0])

    def kept(self) -> dict[str, int]:
        """How many weights each leaf keeps, once the counts are fetched."""
        leaves = zip(self.sizes.items(), self.masked, self.counts, strict=True)
        return {name: int(count) if masked else size for (name, size), masked, count in leaves}


class History:
    """Counts, step by step, what a training with changing masks costs and explores.

    The kept weights of each layer stay on the device until `fetch`, so that no step waits.

    Args:
      trainer: of the run.
      state: before the first step, in any form.
      image_shape: (height, width, channels).

    Attributes:
      ever: a tree of masks, of the weights that were active at some step.
      flops: of the training so far, in multiplications of one image's forward pass: an exact int.
      steps: so far.
      dense_flops: of one dense forward pass.
      positions: kernel name -> how often each of its weights is used for one image.
    """

    def __init__(self, trainer: Trainer, state: State, image_shape: tuple[int, ...]):
        self._spec = trainer.spec
        assert trainer.config.options is not None
        self._step_flops = trainer.config.options.step_flops
        self._needs = trainer.needs
        dense = jax.eval_shape(functools.partial(to_form, "masked"), state)
        variables = {"params": dense.params, "batch_stats": dense.batch_stats}
        self.positions = conv_positions(trainer.network.model("masked"), variables, image_shape)
        sizes = _sizes(state)
        self.dense_flops = sum(sizes[name] * n for name, n in self.positions.items())
        self._pruned_flops = sum(
            sizes[name] * self.positions.get(name, 0)
            for name, mask in zip(sizes, jax.tree.leaves(masks_of(state)), strict=True)
            if jnp.ndim(mask)
        )
        self._original = trainer.shapes
        self.restart(state, masks_of(state), flops=0, steps=0)

    def restart(self, state: State, ever: Any, *, flops: int, steps: int) -> None:
        """Goes on from a checkpoint: the state in any form, and the attributes as they were."""
        self.ever, self.flops, self.steps = ever, flops, steps
        masks = jax.device_get(masks_of(state))
        counts = np.stack([np.sum(mask, dtype=np.int32) for mask in jax.tree.leaves(masks)])
        self._pending = [_Spell(counts, _sizes(state), _masked(masks))]

    def step(self, step: int, state: State) -> None:
        """Counts a step.

        Args:
          step: its number, from 0.
          state: after it.
        """
        self._pending[-1].steps[self._needs.dense_gradient(step)] += 1
        self.steps += 1
        follows = self._spec is not None and self._spec.rule is not None
        if follows or self._needs.changes_masks(step):
            masks = masks_of(state)
            self.ever, counts = _join(self.ever, masks)
            self._pending.append(_Spell(counts, _sizes(state), _masked(masks)))

    def fetch(self) -> None:
        """Adds up the FLOPs of the steps since the last call."""
        fetched = jax.device_get([spell.counts for spell in self._pending])
        for spell, counts in zip(self._pending, fetched, strict=True):
            spell.counts = counts
            left = spell.kept()
            kept = sum(left[name] * n for name, n in self.positions.items())
            for dense_gradient, steps in enumerate(spell.steps):
                self.flops += steps * self._step_flops(
                    kept, self.dense_flops, self._pruned_flops, bool(dense_gradient)
                )
        self._pending = [dataclasses.replace(self._pending[-1], steps=[0, 0])]

    def numbers(self) -> dict[str, float]:
        """What the rows of metrics and the result say of the steps so far, after `fetch`.

        Returns:
          The fraction of a dense training's FLOPs, and the in-time over-parameterization rate.
        """
        return {
            "training_flops_fraction": self.flops / (3 * self.dense_flops * self.steps),
            "itop": float(bsj.metrics.itop(self.ever)),
        }

    def sparse(self) -> list[str]:
        """The layers that masks prune, those too whose channels are all gone by now."""
        leaves = jax.tree.leaves_with_path(self.ever)
        return [tree.path_name(path) for path, mask in leaves if jnp.ndim(mask)]

    def density(self) -> float:
        """The kept fraction of the sparse layers' weights, as of `fetch`, without the device.

        `network_size.density` says the same of masks; removed channels are not kept.
        """
        return network_size.kept_fraction(self._pending[0].kept(), self._original, self.sparse())


def _masked(masks: Any) -> list[bool]:
    """Whether a mask prunes each leaf."""
    return [jnp.ndim(mask) > 0 for mask in jax.tree.leaves(masks)]


def _sizes(state: State) -> dict[str, int]:
    """How many weights each leaf of the network has, the pruned ones too."""
    leaves = jax.tree.leaves_with_path(dense_shapes(state))
    return {tree.path_name(path): leaf.size for path, leaf in leaves}


@jax.jit
def _join(ever: Any, masks: Any) -> tuple[Any, jax.Array]:
    """The weights ever active with these masks too, and the kept weights of each.

    Where channels were removed, the weights ever active stay those of the larger network.
    """
    counts = [mask.sum(dtype=jnp.int32) for mask in jax.tree.leaves(masks)]
    if jax.tree.map(jnp.shape, masks) == jax.tree.map(jnp.shape, ever):
        ever = bsj.metrics.ever_active(ever, masks)
    return ever, jnp.stack(counts)
