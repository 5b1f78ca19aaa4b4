"""Spec: what a method publishes about itself, for training loops, layers and reports."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jaxtyping import Array

from blocksparse_jax.patterns import Pattern
from blocksparse_jax.schedules import AnyOf, Never, Schedule

_NEVER = Never()


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Spec:
    """What is fixed about a method: static, so it costs nothing in a jitted step.

    Training loops, layers and reports read it here (`get_spec(state)`) and repeat none of it.

    Attributes:
      method: the method's name, for reports.
      density: target density over the chosen leaves.
      schedule: the steps whose update may change masks.
      gradient_schedule: the steps that need the gradient of the pruned weights too, which a
        block-sparse convolution gives with `kernel_gradient="dense"`.
      pattern: the pattern, for reports; None where masks were given.
      straight_through: the forward pass uses `w * mask`, and gradients pass to all weights
        (`masked`): pruned weights live on.
      rule: weights -> mask, for methods whose mask follows the weights at every step; None = the
        stored masks.
      skips_gradient: a step that changes masks applies no gradient.
      grows_by_gradient: a change of masks reads the gradient of the pruned weights, which masked
        execution leaves at zero.
      resizes: masks change how many weights are kept, so that each new count would compile a
        block-sparse step of its own.
      ahead: a change of masks sets those of the next step. What the network has learned so far
        belongs to the masks before it: test it with these.
      has_layout: masks fit a `BlockLayout`, so that the block-sparse convolution runs them.
      variables: the state was made for Flax nnx variables, as by an `nnx.Optimizer`.
      own_parameters: names of the parameters that the method keeps beside a kernel, in its shape:
        they train with the network and are no weights of it.
      on_proposed: what `keep_zeros` calls with the proposed weights; None where the method acts on
        gradients only. Without `keep_zeros` a method with `ahead` gets the weights before the
        update, with a warning; the others raise.

    Example:
      >>> from blocksparse_jax.schedules import every
      >>> spec = Spec("rigl", 0.1, schedule=every(100, until=1000))
      >>> spec.changes(100), spec.changes(150), spec.dense_gradient(100)
      (True, False, False)
    """

    method: str
    density: float
    schedule: Schedule = _NEVER
    gradient_schedule: Schedule = _NEVER
    pattern: Pattern | None = None
    straight_through: bool = False
    rule: Callable[[Array], Array] | None = None
    skips_gradient: bool = False
    grows_by_gradient: bool = False
    resizes: bool = False
    ahead: bool = False
    has_layout: bool = False
    variables: bool = False
    own_parameters: tuple[str, ...] = ()
    on_proposed: Callable[..., Any] | None = None

    def changes(self, step: int) -> bool:
        """Whether the update of a step, counted from 0, may change masks."""
        return bool(self.schedule(step))

    def dense_gradient(self, step: int) -> bool:
        """Whether a step, counted from 0, needs the gradient of the pruned weights too."""
        return bool(self.gradient_schedule(step))


def merge_specs(specs: Sequence[Spec]) -> Spec:
    """One spec for several methods in a chain: what any of them does, all of them do together.

    What belongs to a single method stays with it: pattern, rule and on_proposed are None.
    """
    if len(specs) == 1:
        return specs[0]
    return Spec(
        method=" + ".join(spec.method for spec in specs),
        density=min(spec.density for spec in specs),
        schedule=AnyOf(tuple(spec.schedule for spec in specs)),
        gradient_schedule=AnyOf(tuple(spec.gradient_schedule for spec in specs)),
        straight_through=any(spec.straight_through for spec in specs),
        skips_gradient=any(spec.skips_gradient for spec in specs),
        grows_by_gradient=any(spec.grows_by_gradient for spec in specs),
        resizes=any(spec.resizes for spec in specs),
        ahead=any(spec.ahead for spec in specs),
        has_layout=any(spec.has_layout for spec in specs),
        variables=any(spec.variables for spec in specs),
        own_parameters=tuple(name for spec in specs for name in spec.own_parameters),
    )
