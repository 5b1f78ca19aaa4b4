"""ResNets for ImageNet under SUBP's patterns, as they are timed at inference."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import blocksparse_jax as bsj
from blocksparse_jax.tree import conv_kernels, path_name
from experiments import models

CLASSES = 1000


def create(name: str, width: float, **options: Any) -> Any:
    """Returns a network of the zoo with the stem and the classes of ImageNet."""
    return models.create(name, num_classes=CLASSES, width=width, stem="imagenet", **options)


def jit_apply(model: Any) -> Callable[[Any, jax.Array], jax.Array]:
    """Returns the compiled network, `(variables, images) -> logits`."""
    return jax.jit(lambda variables, images: model.apply(variables, images, train=False))


def random_variables(model: Any, image_shape: tuple[int, ...]) -> dict[str, Any]:
    """Draws kernels and shifts; the norms have mean 0, variance 1 and gain 1.

    Such a norm only shifts, so that PyTorch's network can hold it as the bias of the convolution.

    Args:
      model: of the zoo.
      image_shape: (height, width, channels).

    Returns:
      The network's variables.
    """
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, *image_shape)))
    rng = np.random.default_rng(0)
    norm_values = {"scale": 1.0, "var": 1.0 - 1e-5, "mean": 0.0}

    def draw(path: Any, shape: Any) -> jax.Array:
        kind = path_name(path).rsplit("/", 1)[-1]
        if kind in norm_values:
            return jnp.full(shape.shape, norm_values[kind])
        variance = 1.0 if kind == "bias" else 2.0 / np.prod(shape.shape[:-1])
        return jnp.asarray(variance**0.5 * rng.standard_normal(shape.shape), jnp.float32)

    return jax.tree_util.tree_map_with_path(draw, shapes)


def subp_layouts(params: Any, block: int, sparsity: float, name: str) -> Any:
    """Draws a layout of SUBP's pattern for each sparse conv kernel.

    Stem, classifier and, but in ResNet-50, the shortcuts stay dense, as in the paper.

    Args:
      params: of the network.
      block: N of the 1xN pattern.
      sparsity: fraction of the channels removed.
      name: of the network.

    Returns:
      A tree of layouts.
    """
    rng = np.random.default_rng(1)

    def layout(path: Any, kernel: Any) -> Any:
        leaf = path_name(path)
        dense_shortcut = "downsample" in leaf and not name.startswith("resnet50")
        if dense_shortcut or not conv_kernels(leaf, kernel):
            return bsj.Dense()
        kh, kw, cin, cout = kernel.shape
        groups = cout // block
        kept = cin - int(sparsity * cin)
        shuffled = rng.permuted(np.tile(np.arange(cin), (groups, 1)), axis=1)
        return bsj.BlockLayout(
            filters=jnp.arange(cout, dtype=jnp.int32).reshape(groups, block),
            channels=jnp.asarray(np.sort(shuffled[:, :kept], axis=1), jnp.int32),
            taps=jnp.tile(jnp.arange(kh * kw, dtype=jnp.int32), (groups, 1)),
            shape=kernel.shape,
        )

    return jax.tree_util.tree_map_with_path(layout, params)


def pack(variables: dict[str, Any], layouts: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Prunes a network.

    Args:
      variables: of the dense network.
      layouts: of its parameters.

    Returns:
      The packed variables with their layouts, and the dense variables with zeros.
    """
    values = convert_sparse(bsj.pack, variables["params"], layouts)
    zeros = convert_sparse(bsj.unpack, values, layouts)
    return variables | {"params": values, "layouts": layouts}, variables | {"params": zeros}


@functools.partial(jax.jit, static_argnums=0)
def convert_sparse(convert: Callable[..., jax.Array], params: Any, layouts: Any) -> Any:
    """Applies `convert(leaf, layout)` to the sparse leaves."""
    return jax.tree.map(
        lambda leaf, layout: convert(leaf, layout) if isinstance(layout, bsj.BlockLayout) else leaf,
        params,
        layouts,
    )


def as_conv_biases(params: Any) -> dict[str, np.ndarray]:
    """Returns the parameters as convs with bias, by names such as "stage1_block1/conv1/bias".

    Args:
      params: of `random_variables`: the norms' gains are 1, so their shifts are the biases.

    Returns:
      Kernels and biases.
    """
    arrays = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        *scopes, module, kind = path_name(path).split("/")
        if module.endswith("_norm"):
            module = module.removesuffix("_norm")
        else:
            module = module.replace("norm", "conv")
        if kind != "scale":
            arrays["/".join((*scopes, module, kind))] = np.asarray(leaf)
    return arrays


def megabytes(variables: dict[str, Any]) -> float:
    """Returns the size of the parameters with the index arrays of their layouts."""
    leaves = jax.tree.leaves((variables["params"], variables.get("layouts", {})))
    return round(sum(leaf.nbytes for leaf in leaves) / 1e6, 2)


def gigaflops(params: Any, positions: dict[str, int]) -> float:
    """Returns the multiply-adds for one image, as the papers count FLOPs, in units of 10^9.

    Args:
      params: dense or packed.
      positions: how often each kernel is applied to an image.
    """
    leaves = jax.tree_util.tree_leaves_with_path(params)
    total = sum(leaf.size * positions.get(path_name(path), 0) for path, leaf in leaves)
    return round(total / 1e9, 3)
