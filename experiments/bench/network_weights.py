"""Weights of the zoo's networks whose channel orders are measured: random, clustered, trained."""

import tempfile
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from blocksparse_jax.tree import conv_kernels, path_name
from experiments.models import create
from experiments.models.spaces import channel_spaces
from experiments.training.config import TrainConfig
from experiments.training.run import Run

CLUSTERS = 8  # of filters and of channels, in the clustered weights
MOST_CHANNELS = 4096


def draw(network: str, epochs: int) -> dict[str, Any]:
    """Makes the parameters of a network of the zoo.

    Args:
      network: model:weights. Weights are "random" (fresh ones), "clustered" (fresh ones times a
        factor for each pair of a filter cluster and a channel cluster) or "trained" (the CNN after
        a dense training on digits).
      epochs: of the training.

    Returns:
      A tree of arrays.

    Raises:
      ValueError: an unknown model or kind of weights.
    """
    model, _, kind = network.partition(":")
    if kind not in ("random", "clustered", "trained") or (kind == "trained" and model != "cnn"):
        raise ValueError(
            f"networks: expected MODEL:random, MODEL:clustered or cnn:trained, got {network!r}"
        )
    if kind == "trained":
        return _trained(model, epochs)
    images = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
    shapes = jax.eval_shape(create(model, num_classes=10).init, jax.random.key(0), images)["params"]
    rng = np.random.default_rng(0)
    clusters = _channel_clusters(shapes, rng)

    def values(path: tuple[Any, ...], leaf: Any) -> np.ndarray:
        name = path_name(path)
        array = rng.normal(size=leaf.shape).astype(np.float32)
        if not conv_kernels(name, leaf):
            return array
        kh, kw, cin, cout = leaf.shape
        array *= np.sqrt(2 / (kh * kw * cout))  # He, fan-out
        if kind == "clustered":
            factors = 0.3 + rng.normal(size=(CLUSTERS, CLUSTERS)).astype(np.float32) ** 2
            filter_clusters = rng.integers(0, CLUSTERS, cout)
            array *= factors[clusters[name][:cin, None], filter_clusters]
        return array

    return jax.tree.map_with_path(values, shapes)


def _channel_clusters(shapes: Any, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """The cluster of each input channel, by kernel; all readers of a space see the same ones."""
    clusters: dict[str, np.ndarray] = {}
    for entries in channel_spaces(shapes).values():
        labels = rng.integers(0, CLUSTERS, MOST_CHANNELS)
        clusters |= {name: labels for name, axis in entries if axis == 2}
    return clusters


def _trained(model: str, epochs: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        run = Run(TrainConfig(model=model, method="dense", epochs=epochs, out=folder))
        run.train()
        return jax.tree.map(np.asarray, run.state.params)
