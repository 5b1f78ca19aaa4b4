"""Deep Compression."""

import dataclasses
from pathlib import Path
from typing import Any

import optax

import blocksparse_jax as bsj
from blocksparse_jax import _checks, patterns
from blocksparse_jax.patterns import Pattern
from experiments.training.execution import State, masks_of
from experiments.training.methods.options import Operation, Options, Setup


@dataclasses.dataclass(frozen=True)
class DeepCompression(Options):
    """Pruning, retraining, shared weights whose centroids train, and Huffman codes.

    The coded network, with its batch statistics, is `network.bsjc` in the run folder; result.json
    has its compression rate. Our choice: the parts of the run.

    Attributes:
      prune_until: fraction of the run at which the sparsity is reached; then weights retrain.
      share_at: fraction of the run at which weights take shared values; then centroids train.
      conv_bits: bits of a weight of a convolution; all kernels share, the dense stem too.
      dense_bits: bits of a weight of a dense layer.
      update_every: steps between pruning steps; None is 100, or an epoch if that is shorter.
      budget: how the layers share the density: uniform, erk, er or global.
    """

    prune_until: float = 0.5
    share_at: float = 0.75
    conv_bits: int = 8
    dense_bits: int = 5
    update_every: int | None = None
    budget: str = "uniform"

    def check(self) -> None:
        """First pruned, then shared."""
        if not 0 < self.prune_until < self.share_at <= 1:
            raise ValueError(
                "prune_until: expected fractions of the run with 0 < prune_until < share_at <= 1, "
                f"got {self.prune_until} and {self.share_at}"
            )
        for name in ("conv_bits", "dense_bits"):
            if _checks.positive_int(name, getattr(self, name)) > 16:
                raise ValueError(f"{name}: expected 1 to 16 bits, got {getattr(self, name)}")

    def make_pattern(self) -> Pattern:
        """Single weights."""
        return patterns.unstructured()

    def arguments(self, setup: Setup) -> dict[str, Any]:
        """The sparsity, the budget, and the pruning steps."""
        end = max(1, round(self.prune_until * setup.length.total))
        every = setup.every(self.update_every)
        return {
            "sparsity": setup.sparsity,
            "schedule": bsj.between(0, end, every=every),
            "budget": self.budget,
        }

    def combined(
        self,
        method: optax.GradientTransformation,
        optimizer: optax.GradientTransformation,
        setup: Setup,
    ) -> optax.GradientTransformation:
        """The run's own optimizer, for centroids once weights share them."""
        bits = max(self.conv_bits, self.dense_bits)
        return bsj.sparse(method, bsj.shared_weights(optimizer, bits=bits))

    def operations(self, setup: Setup) -> dict[int, Operation]:
        """The step that shares weights, after the last pruning step."""

        def share(state: State, setup: Setup) -> State:
            shared = bsj.share_weights(
                state.params,
                masks_of(state),
                conv_bits=self.conv_bits,
                dense_bits=self.dense_bits,
            )
            opt_state = bsj.set_clusters(state.opt_state, shared.clusters)
            return dataclasses.replace(state, params=shared.params, opt_state=opt_state)

        last = self.arguments(setup)["schedule"].end
        return {max(last + 1, round(self.share_at * setup.length.total)): share}

    def finish(self, state: State, folder: Path) -> dict[str, Any]:
        """Writes the coded network; its rate, and its bits by part."""
        network = {"params": state.params, "batch_stats": state.batch_stats}
        compressed = bsj.compress(network)
        (folder / "network.bsjc").write_bytes(compressed.data)
        return {
            "compression_rate": compressed.rate,
            "compressed_bits": compressed.bits,
            "uncompressed_bits": compressed.bits_before,
        }
