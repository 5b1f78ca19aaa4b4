"""NeST: connections and channels grow from a seed, then connections are pruned."""

import dataclasses
import functools
from typing import Any

import jax
import numpy as np

import blocksparse_jax as bsj
from experiments.models.spaces import channel_spaces
from experiments.training.execution import State
from experiments.training.methods.options import AnyPattern, Operation, Setup, between_parts


@dataclasses.dataclass(frozen=True)
class Nest(AnyPattern):
    """Sets of weights that grow from a seed until 3/8 of training and are pruned until 3/4 of it.

    Channels grow from a narrower seed too, in equal portions behind each growth of weights, until
    all are active: those that sparse layers alone make and read.

    Attributes:
      seed: density of the seed, as a multiple of the final one.
      peak: density after the growth, likewise.
      seed_channels: the part of each space's channels that the seed has. None is a half where the
        pattern is single weights, else all: other sets would reach into channels that are not
        there.
      candidates: sets of random kernels from which grown channels take theirs.
      update_every: steps between mask updates; None is 100, or an epoch if that is shorter.
    """

    seed: float = 0.5
    peak: float = 2.0
    seed_channels: float | None = None
    candidates: int = 4
    update_every: int | None = None

    def check(self) -> None:
        """ValueError where the seed's channels and the pattern exclude each other."""
        if self.seed_channels is None:
            return
        if not 0 < self.seed_channels <= 1:
            raise ValueError(
                f"seed_channels: expected a number above 0 and at most 1, got {self.seed_channels}"
            )
        if self.seed_channels < 1 and self.pattern != "unstructured":
            raise ValueError(
                f"seed_channels: channels grow by single weights, got pattern {self.pattern!r}; "
                "leave --nest.seed-channels or --nest.pattern out"
            )

    def arguments(self, setup: Setup) -> dict[str, Any]:
        """All options, the steps of the updates as a schedule."""
        return super().arguments(setup) | {
            "seed": self.seed,
            "peak": self.peak,
            "schedule": self._schedule(setup),
            "key": setup.key,
        }

    def operations(self, setup: Setup) -> dict[int, Operation]:
        """Narrows the seed, then grows channels behind each growth of weights."""
        share = self.seed_channels or (0.5 if self.pattern == "unstructured" else 1.0)
        if share == 1:
            return {}
        schedule = self._schedule(setup)
        middle = (schedule.start + schedule.end) // 2
        steps = [step + 1 for step in range(schedule.start, middle + 1, schedule.every)]

        def narrow(state: State, setup: Setup) -> State:
            """Dormant channels: the last of each space."""
            spaces = channel_spaces(state.params)
            dormant = bsj.dormant_channels(state.params, bsj.get_masks(state.opt_state), spaces)
            kept = {
                space: np.arange(channels.size) < max(1, round(share * channels.size))
                for space, channels in dormant.items()
            }
            masks = jax.tree.map(
                lambda mask, kept: mask & kept if mask.ndim else mask,
                bsj.get_masks(state.opt_state),
                bsj.channel_masks(state.params, spaces, kept),
            )
            return _with_masks(state, state.params, masks)

        def grow(left: int, state: State, setup: Setup) -> State:
            """So many channels that an equal portion comes at each of the steps that are left."""
            spaces, masks = channel_spaces(state.params), bsj.get_masks(state.opt_state)
            dormant = bsj.dormant_channels(state.params, masks, spaces)
            counts = {space: -(-int(ones.sum()) // left) for space, ones in dormant.items()}
            assert setup.loss_fn is not None
            grown = bsj.grow_channels(
                jax.jit(setup.loss_fn),
                state.params,
                setup.batch,
                masks,
                spaces,
                counts,
                candidates=self.candidates,
                key=jax.random.fold_in(setup.key, left),
            )
            return _with_masks(state, *grown)

        growing = {
            step: functools.partial(grow, len(steps) - number) for number, step in enumerate(steps)
        }
        return {0: narrow} | growing

    def _schedule(self, setup: Setup) -> bsj.schedules.Between:
        return between_parts(setup, 0.0, 0.75, self.update_every)


def _with_masks(state: State, params: Any, masks: Any) -> State:
    return dataclasses.replace(
        state,
        params=bsj.apply_masks(params, masks),
        opt_state=bsj.replace_masks(state.opt_state, masks),
    )
