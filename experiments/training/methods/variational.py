"""Sparse variational dropout."""

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import optax

import blocksparse_jax as bsj
from blocksparse_jax import _checks, patterns
from blocksparse_jax.patterns import Pattern
from blocksparse_jax.state import sparse_states
from experiments.training.execution import State
from experiments.training.methods.options import Operation, Options, Setup, Weights


@dataclasses.dataclass(frozen=True)
class VariationalDropout(Options):
    """Noisy weights, of which those of large noise are pruned at each epoch's end.

    Masks serve the evaluation; all weights train on. Without a sparsity (0) the threshold decides
    how many are pruned; with one, those of the largest log alpha are. Our choice: the rate of the
    variances, the warm-up, the divisor of the divergence on small data sets, and the statistics of
    batch norm, which are those of the pruned weights without noise, from a forward pass more in
    each step (noise widens the activations, and a network that is tested without it would be off).

    Attributes:
      threshold: weights of a log alpha above it are pruned.
      initial_log_sigma2: of all weights.
      variance_lr: of the variances, which Adam trains; None lets each log variance move by 40 in
        the run, twice as far as the way from -10 to pruned that small weights have, but by no more
        than 0.1 a step: runs below 400 steps prune less, and train.
      warm_up_start: the divergence counts from this fraction of the run on.
      warm_up_end: it counts in full from this fraction of the run on.
      least_examples: the divergence is divided by the number of training examples, or by this where
        there are fewer: on a small data set it would prune whole layers. The paper's sets have
        50,000 and 60,000.
    """

    default_sparsity: ClassVar[float] = 0.0

    threshold: float = 3.0
    initial_log_sigma2: float = -10.0
    variance_lr: float | None = None
    warm_up_start: float = 0.05
    warm_up_end: float = 0.5
    least_examples: int = 50_000

    def check(self) -> None:
        """The divergence rises over some part of the run."""
        if not 0 <= self.warm_up_start < self.warm_up_end <= 1:
            raise ValueError(
                "warm_up_start: expected fractions of the run with 0 <= warm_up_start < "
                f"warm_up_end <= 1, got {self.warm_up_start} and {self.warm_up_end}"
            )
        _checks.positive_int("least_examples", self.least_examples)
        if self.variance_lr is not None:
            _checks.number("variance_lr", self.variance_lr, low_open=True)

    def make_pattern(self) -> Pattern:
        """Single weights."""
        return patterns.unstructured()

    def arguments(self, setup: Setup) -> dict[str, Any]:
        """The sparsity."""
        return {"sparsity": setup.sparsity}

    def prepare(self, params: Any, batch_stats: Any, sparsity: float) -> tuple[Any, Any]:
        """A variance for each weight."""
        return bsj.with_log_variances(params, initial=self.initial_log_sigma2), batch_stats

    def loss(
        self, network: Callable[[Any], tuple[jax.Array, Any]], weights: Weights, setup: Setup
    ) -> tuple[jax.Array, Any]:
        """The loss of the noisy network, and the divergence per training example.

        Statistics and accuracy are those of the network that is tested.
        """
        count = sparse_states(weights.opt_state)[0].count
        start, end = (
            round(fraction * setup.length.total)
            for fraction in (self.warm_up_start, self.warm_up_end)
        )
        weight = optax.linear_schedule(0.0, 1.0, max(1, end - start), start)(count)
        with bsj.linen.use_variational_dropout(jax.random.fold_in(setup.key, count)):
            loss, _ = network(weights.params)
        rest = network(jax.lax.stop_gradient(weights.masked))[1]
        assert setup.examples is not None
        examples = max(setup.examples, self.least_examples)
        return loss + weight * bsj.variational_dropout_kl(weights.params) / examples, rest

    def step_flops(self, kept: int, dense: int, pruned: int, dense_gradient: bool) -> int:
        """Means of all layers, variances of the noisy ones, and the forward pass without noise.

        Args:
          kept: of the forward pass with the step's masks.
          dense: of the dense network's forward pass.
          pruned: the part of `dense` that the layers with masks have, which are the noisy ones.
          dense_gradient: always that of all weights.
        """
        return 3 * (dense + pruned) + kept

    def combined(
        self,
        method: optax.GradientTransformation,
        optimizer: optax.GradientTransformation,
        setup: Setup,
    ) -> optax.GradientTransformation:
        """Adam for the variances, whose gradients are those of a mean over all examples."""
        rate = self.variance_lr or min(0.1, 40 / setup.length.total)

        def labels(params: Any) -> Any:
            return jax.tree_util.tree_map_with_path(
                lambda path, leaf: "variances" if path[-1].key == "log_sigma2" else "means", params
            )

        transforms = {"means": optimizer, "variances": optax.adam(rate)}
        return bsj.sparse(method, optax.partition(transforms, labels))

    def operations(self, setup: Setup) -> dict[int, Operation]:
        """New masks at each epoch's end."""

        def prune(state: State, setup: Setup) -> State:
            sparsity = setup.sparsity or None
            masks = bsj.variational_masks(state.params, threshold=self.threshold, sparsity=sparsity)
            opt_state = bsj.replace_masks(state.opt_state, masks)
            return dataclasses.replace(state, opt_state=opt_state)

        every = setup.length.steps_per_epoch
        return dict.fromkeys(range(every, (setup.end or setup.length.total) + 1, every), prune)
