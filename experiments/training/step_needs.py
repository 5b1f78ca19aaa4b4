"""What each step of a training needs: a form of the state, new masks, the dense gradient.

Where a step changes masks or needs the gradient of the pruned weights, the packed execution is in
another form: sparse at the mask updates of a dynamic method, masked while a method still changes
how many weights it keeps (SUBP, gradual), since every count would compile a block-sparse step of
its own. The sparse execution runs that phase in the block-sparse conv all the same.
"""

import dataclasses
import functools
from collections.abc import Collection

import blocksparse_jax as bsj


@dataclasses.dataclass(frozen=True)
class StepNeeds:
    """What each step needs, as the method publishes it.

    Attributes:
      execution: masked, sparse or packed.
      total: steps of the run.
      spec: what the method publishes; None where no weights are masked.
      operations: the steps before which the method acts outside of jit.
    """

    execution: str
    total: int
    spec: bsj.Spec | None = None
    operations: Collection[int] = ()

    def form(self, step: int) -> str:
        """The form of the state that a step starts from.

        Args:
          step: from 0.

        Returns:
          masked, sparse or packed.
        """
        if self.execution != "packed" or self.spec is None:
            return self.execution
        # one step longer where the weights are still to be tested with the masks before
        if self.spec.resizes and step <= self._last_change + self.spec.ahead:
            return "masked"
        # packed leaves hold kept weights only, so their masks cannot change
        moves = self.spec.rule is None and self.spec.changes(step)
        return "sparse" if moves or self.spec.dense_gradient(step) else "packed"

    def changes_masks(self, step: int) -> bool:
        """Whether a step's update changes masks; never where they follow the weights (SR-STE)."""
        if step + 1 in self.operations:
            return True
        return self.spec is not None and self.spec.rule is None and self.spec.changes(step)

    def plain(self, step: int) -> bool:
        """Whether a step changes nothing but weights and statistics, so that several may be one."""
        if self.changes_masks(step) or self.form(step + 1) != self.form(step):
            return False
        # masks that follow the weights are counted after each step
        return self.spec is None or not (self.spec.rule or self.spec.dense_gradient(step))

    def dense_gradient(self, step: int) -> bool:
        """Whether the method reads the gradient of the pruned weights."""
        return self.spec is not None and self.spec.dense_gradient(step)

    @functools.cached_property
    def _last_change(self) -> int:
        assert self.spec is not None
        steps = range(self.total - 1, -1, -1)
        return next((step for step in steps if self.spec.changes(step)), -1)
