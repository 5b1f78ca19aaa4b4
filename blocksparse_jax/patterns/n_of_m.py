"""N:M: n of each m consecutive weights."""

import dataclasses
import math
import warnings
from collections.abc import Mapping
from typing import ClassVar, Literal

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from blocksparse_jax import _checks
from blocksparse_jax.counts import Units
from blocksparse_jax.layout_nodes import Layout
from blocksparse_jax.patterns._base import Pattern, Shape

Axis = Literal["input", "kernel"]
AXES: tuple[Axis, ...] = ("input", "kernel")


@dataclasses.dataclass(frozen=True)
class NOfM(Pattern):
    """n of each m consecutive weights along the reduction axis: see `n_of_m`."""

    noun: ClassVar[str] = "N:M runs"
    n: int
    m: int
    axis: Axis = "input"

    @property
    def density(self) -> float:
        """N / m."""
        return self.n / self.m

    def sparsity(self, sparsity: float | None) -> float:
        """`1 - n / m`, with a warning where another sparsity was asked for."""
        fixed = 1 - self.density
        if sparsity is not None and abs(super().sparsity(sparsity) - fixed) > 1e-6:
            warnings.warn(
                f"sparsity: {self.n} of {self.m} weights are {fixed:g} by themselves, got "
                f"{sparsity!r}; pass {fixed:g} or None",
                stacklevel=3,
            )
        return fixed

    def _units(self, shape: Shape, label: str) -> Units:
        """A row for each run of m weights."""
        length = shape[2] if self.axis == "input" else math.prod(shape[:3])
        if length % self.m:
            raise ValueError(
                f"{label}: m: {self.m} does not divide the {self.axis} axis of length {length}; "
                "exclude the layer with `where`, or take another m"
            )
        return Units(rows=math.prod(shape) // self.m, sets=self.m, weights=1)

    @property
    def _order(self) -> tuple[int, ...]:
        """The axes of a kernel with the reduction axis last."""
        return (0, 1, 3, 2) if self.axis == "input" else (3, 2, 0, 1)

    def _sets(self, scores: Float[Array, "..."], layout: Layout) -> Float[Array, "rows m"]:
        """The weights, run by run."""
        self._units(scores.shape, "scores")
        return jnp.transpose(scores, self._order).reshape(-1, self.m)

    def _mask(self, kept: Bool[Array, "rows m"], shape: Shape) -> Bool[Array, "..."]:
        """The kept weights in the kernel's shape."""
        rows = kept.reshape([shape[axis] for axis in self._order])
        back = [self._order.index(axis) for axis in range(4)]
        return jnp.transpose(rows, back)

    def counts(self, shapes: Mapping[str, Shape], densities: Mapping[str, float]) -> dict[str, int]:
        """N for every layer."""
        return dict.fromkeys(shapes, self.n)

    def global_counts(
        self, scores: Mapping[str, Float[Array, "..."]], density: float
    ) -> dict[str, int]:
        """Refused: the counts are the same in every layer."""
        raise ValueError(
            "budget: 'global' lets counts differ by layer, and N:M fixes them; use 'uniform'"
        )


def n_of_m(n: int, m: int, axis: Axis = "input") -> NOfM:
    """The N:M pattern: the n highest of each m consecutive weights along the reduction axis.

    Args:
      n: kept weights in a run.
      m: length of a run, a divisor of the axis.
      axis: "input" runs over input channels at one tap and filter; "kernel" over (channel, y, x) of
        one filter, x fastest.

    Returns:
      A pattern for conv kernels and dense kernels, without a layout: it runs masked-dense. It fixes
      its own density n / m.

    Raises:
      ValueError: not 0 < n <= m, or an unknown axis; when it is used, a layer whose axis m does not
        divide.

    Example:
      >>> from blocksparse_jax import masks_from_scores
      >>> scores = {"conv": jnp.arange(8.0).reshape(1, 1, 8, 1)}
      >>> masks_from_scores(scores, None, pattern=n_of_m(2, 4))["conv"].ravel().astype(int).tolist()
      [0, 0, 1, 1, 0, 0, 1, 1]

    Reference: Zhou et al., "Learning N:M fine-grained structured sparse neural networks from
    scratch", ICLR 2021.
    """
    if not 0 < _checks.positive_int("n", n) <= _checks.positive_int("m", m):
        raise ValueError(f"n: expected at most m={m}, got {n}")
    return NOfM(n, m, _checks.choice("axis", axis, AXES))
