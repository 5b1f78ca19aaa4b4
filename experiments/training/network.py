"""The network that a config trains: a linen module for each form of the state, and its loss."""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

import blocksparse_jax as bsj
from experiments import models
from experiments.training.config import TrainConfig
from pallas_kernels.block_sparse_conv import fuses_norms


class Network:
    """The network of a config; parameters and statistics are arguments.

    Args:
      config: a resolved config.
      num_classes: of the data set.
      data_format: of the dense convolutions of the masked form, NHWC or CHWN; None is where they
        are faster: CHWN on CPUs that have the native kernels, else NHWC. The other forms are CHWN.
      fused: whether training runs in convolutions between batch norms; None: where the
        implementation has passes for them, in its forms (sparse and packed).
    """

    def __init__(
        self,
        config: TrainConfig,
        num_classes: int,
        data_format: str | None = None,
        fused: bool | None = None,
    ):
        self._config, self._fused = config, fused
        self._create = functools.partial(
            models.create,
            config.model,
            num_classes=num_classes,
            width=config.width,
            stem=str(config.stem),
            dtype=jnp.dtype(config.precision),
        )
        native = bsj.available_implementations()["cpu"] is None
        self._masked_format = data_format or ("CHWN" if native else "NHWC")

    def model(
        self, form: str, dense_gradient: bool = False, widths: Mapping[str, int] | None = None
    ) -> Any:
        """The linen model of a form.

        Args:
          form: masked, sparse or packed.
          dense_gradient: the block-sparse conv also gives the gradient of the pruned weights.
          widths: of the state's network, `widths_of(state)`; None is the one that training begins
            with.

        Returns:
          A module over NHWC images.
        """
        if form == "masked":
            named = None if self._config.implementation == "cpu" else self._config.implementation
            return self._create(
                data_format=self._masked_format,
                implementation=named,
                widths=widths,
                fused=bool(self._fused),
            )
        fused = fuses_norms(self._config.implementation) if self._fused is None else self._fused
        return self._create(
            data_format="CHWN",
            implementation=self._config.implementation,
            kernel_gradient="dense" if dense_gradient else "masked",
            widths=widths,
            fused=fused,
        )

    def with_all_derivatives(self) -> Any:
        """The linen model with XLA's convolutions, which have all derivatives."""
        return self._create(data_format="NHWC")

    def init(self, key: Array, image_shape: tuple[int, ...]) -> tuple[Any, Any]:
        """Draws parameters, dense, and the statistics that belong to them.

        Args:
          key: a random key.
          image_shape: (height, width, channels).
        """
        variables = _init(self.model("masked"), key, image_shape)
        return variables["params"], variables.get("batch_stats", {})

    def loss(
        self, model: Any, variables: Any, images: Array, labels: Array
    ) -> tuple[Array, tuple[Any, Array]]:
        """The mean loss of a batch, and what else training reads of it.

        Args:
          model: of a form.
          variables: in that form, `variables_of`.
          images: NHWC float32 batch.
          labels: int32 classes.

        Returns:
          `(loss, (batch_stats, correct))`: the new statistics, and the number of right answers.
        """
        logits, changed = model.apply(variables, images, train=True, mutable=["batch_stats"])
        classes = jax.nn.one_hot(labels, logits.shape[-1])
        targets = optax.smooth_labels(classes, self._config.label_smoothing)
        loss = optax.softmax_cross_entropy(logits.astype(jnp.float32), targets).mean()
        return loss, (changed.get("batch_stats", {}), jnp.sum(logits.argmax(-1) == labels))


def variables_of(params: Any, batch_stats: Any, layouts: Any) -> dict[str, Any]:
    """What a linen model is applied to; layouts only where there are some."""
    variables = {"params": params, "batch_stats": batch_stats}
    return variables | ({"layouts": layouts} if layouts else {})


@functools.partial(
    jax.jit, static_argnums=(0, 2), compiler_options={"xla_backend_optimization_level": 0}
)  # runs once: compiling counts
def _init(model: Any, key: Array, image_shape: tuple[int, ...]) -> Any:
    return model.init(key, jnp.zeros((1, *image_shape), jnp.float32), train=False)
