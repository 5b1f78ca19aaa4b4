"""Named layers of real networks, and random operands for them.

The tuner, the benchmarks and the tests use the same shapes.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from blocksparse_jax import _checks
from pallas_kernels.block_sparse_conv import ConvSpec, Implementation, block_sparse_conv


@dataclasses.dataclass(frozen=True)
class Layer:
    """One conv layer.

    Attributes:
      name: network and place.
      cin, cout: channels.
      size: height and width of the input in pixels.
      stride: step in pixels.
      kernel: side of the conv kernel in taps.

    Reference: VGG-19 and ResNet-32 (width 2) on 32x32 images, as used by Wang et al., "GraSP", ICLR
    2020.
    """

    name: str
    cin: int
    cout: int
    size: int
    stride: int = 1
    kernel: int = 3


VGG19 = (
    Layer("vgg19 64@32", 64, 64, 32),
    Layer("vgg19 64-128@16", 64, 128, 16),
    Layer("vgg19 128@16", 128, 128, 16),
    Layer("vgg19 128-256@8", 128, 256, 8),
    Layer("vgg19 256@8", 256, 256, 8),
    Layer("vgg19 256-512@4", 256, 512, 4),
    Layer("vgg19 512@4", 512, 512, 4),
    Layer("vgg19 512@2", 512, 512, 2),
)
RESNET32 = (
    Layer("resnet32x2 32@32", 32, 32, 32),
    Layer("resnet32x2 32-64@32/2", 32, 64, 32, 2),
    Layer("resnet32x2 64@16", 64, 64, 16),
    Layer("resnet32x2 64-128@16/2", 64, 128, 16, 2),
    Layer("resnet32x2 128@8", 128, 128, 8),
)
# All conv layers of ResNet-50 after the stem, each once; the stride sits in the first 1x1 (v1).
RESNET50 = (
    Layer("resnet50 1x1 64@56", 64, 64, 56, 1, 1),
    Layer("resnet50 64@56", 64, 64, 56),
    Layer("resnet50 1x1 64-256@56", 64, 256, 56, 1, 1),
    Layer("resnet50 1x1 256-64@56", 256, 64, 56, 1, 1),
    Layer("resnet50 1x1 256-128@56/2", 256, 128, 56, 2, 1),
    Layer("resnet50 128@28", 128, 128, 28),
    Layer("resnet50 1x1 128-512@28", 128, 512, 28, 1, 1),
    Layer("resnet50 1x1 256-512@56/2", 256, 512, 56, 2, 1),
    Layer("resnet50 1x1 512-128@28", 512, 128, 28, 1, 1),
    Layer("resnet50 1x1 512-256@28/2", 512, 256, 28, 2, 1),
    Layer("resnet50 256@14", 256, 256, 14),
    Layer("resnet50 1x1 256-1024@14", 256, 1024, 14, 1, 1),
    Layer("resnet50 1x1 512-1024@28/2", 512, 1024, 28, 2, 1),
    Layer("resnet50 1x1 1024-256@14", 1024, 256, 14, 1, 1),
    Layer("resnet50 1x1 1024-512@14/2", 1024, 512, 14, 2, 1),
    Layer("resnet50 512@7", 512, 512, 7),
    Layer("resnet50 1x1 512-2048@7", 512, 2048, 7, 1, 1),
    Layer("resnet50 1x1 1024-2048@14/2", 1024, 2048, 14, 2, 1),
    Layer("resnet50 1x1 2048-512@7", 2048, 512, 7, 1, 1),
)
_RESNET50_BY_NAME = {layer.name.removeprefix("resnet50 "): layer for layer in RESNET50}
OTHERS = (
    Layer("digits 16-32@8", 16, 32, 8),
    Layer("digits 32-64@8/2", 32, 64, 8, 2),
    *(
        _RESNET50_BY_NAME[name]
        for name in (
            "64@56",
            "128@28",
            "512@7",
            "1x1 64-256@56",
            "1x1 512-128@28",
            "1x1 512-2048@7",
            "1x1 512-1024@28/2",
        )
    ),
)
CNN_ON_DIGITS = (  # experiments.models.cnn at 8x8 pixels
    Layer("digits 64-128@8", 64, 128, 8),
    Layer("digits 128@4", 128, 128, 4),
    Layer("digits 128-256@4", 128, 256, 4),
)
INFERENCE = tuple(  # each kernel size at each resolution, channels growing and shrinking
    _RESNET50_BY_NAME[name]
    for name in (
        "1x1 256-64@56",
        "64@56",
        "1x1 64-256@56",
        "1x1 512-128@28",
        "256@14",
        "1x1 256-1024@14",
        "1x1 1024-2048@14/2",
        "1x1 2048-512@7",
        "512@7",
        "1x1 512-2048@7",
    )
)


def layer_spec(
    layer: Layer,
    *,
    sparsity: float,
    batch: int,
    group_size: int = 32,
    kept_taps: int | None = None,
    dtype: str = "float32",
) -> ConvSpec:
    """Returns the convolution of a layer at a sparsity, with SAME padding.

    The number of kept channels follows from the density:
    `kept = round((1 - sparsity) * cin * kernel^2 / kept_taps)`, at least 1.

    Args:
      layer: the layer.
      sparsity: fraction of the weights removed.
      batch: images.
      group_size: filters in a group; a layer of fewer filters has one group.
      kept_taps: taps that each group keeps; None: a third of the kernel (3 of 9), as HRBP.
      dtype: name of the activations' dtype.

    Returns:
      The static sizes.

    Raises:
      ValueError: the sparsity is not in [0, 1), the groups do not divide the filters, or the kernel
        has fewer taps.

    Example:
      >>> layer_spec(VGG19[0], sparsity=0.9, batch=128).packed_shape
      (2, 19, 3, 32)
    """
    _checks.fraction("sparsity", sparsity)
    _checks.positive_int("group_size", group_size)
    group_size = min(group_size, layer.cout)
    if layer.cout % group_size:
        raise ValueError(
            f"group_size: expected a divisor of the {layer.cout} filters of {layer.name!r}, got "
            f"{group_size}"
        )
    area = layer.kernel**2
    kept_taps = max(1, area // 3) if kept_taps is None else kept_taps
    if not 1 <= kept_taps <= area:
        raise ValueError(
            f"kept_taps: expected 1 to {area}, the taps of {layer.name!r}, got {kept_taps}"
        )
    kept = round((1 - sparsity) * layer.cin * area / kept_taps)
    out_size = -(-layer.size // layer.stride)
    padding = max((out_size - 1) * layer.stride + layer.kernel - layer.size, 0)
    sides = (padding // 2, padding - padding // 2)
    return ConvSpec(
        cin=layer.cin,
        height=layer.size,
        width=layer.size,
        batch=batch,
        kernel=(layer.kernel, layer.kernel),
        cout=layer.cout,
        groups=layer.cout // group_size,
        kept=min(layer.cin, max(1, kept)),
        kept_taps=kept_taps,
        group_size=group_size,
        strides=(layer.stride, layer.stride),
        padding=(sides, sides),
        dtype=dtype,
    )


def describe(spec: ConvSpec) -> dict[str, Any]:
    """Returns what a report says of a convolution: its shape, its density and its tile.

    Args:
      spec: the static sizes.

    Returns:
      What JSON can hold.
    """
    return {
        "shape": {
            "input": spec.in_shape,
            "output": spec.out_shape,
            "kernel": spec.kernel,
            "strides": spec.strides,
            "dtype": spec.dtype,
        },
        "density": round(spec.density, 5),
        "tile": {
            "groups": spec.groups,
            "group_size": spec.group_size,
            "kept": spec.kept,
            "kept_taps": spec.kept_taps,
            "channel_block": spec.channel_block,
        },
    }


def random_operands(
    spec: ConvSpec, seed: int = 0
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array, jax.Array, jax.Array]:
    """Draws random operands of a convolution.

    Args:
      spec: the static sizes.
      seed: of NumPy's generator.

    Returns:
      `(x, dy, values, filters, channels, taps)`.

    Example:
      >>> [a.shape for a in random_operands(layer_spec(VGG19[7], sparsity=0.9, batch=2))][2:]
      [(16, 154, 3, 32), (16, 32), (16, 154), (16, 3)]
    """
    rng = np.random.default_rng(seed)

    def subsets(count: int, total: int) -> jax.Array:
        """For each group, `count` of the numbers below `total`, sorted."""
        shuffled = rng.permuted(np.tile(np.arange(total), (spec.groups, 1)), axis=1)
        return jnp.asarray(np.sort(shuffled[:, :count], axis=1).astype(np.int32))

    # NumPy casts them: JAX would compile a program for each shape.
    x, dy, values = (
        jnp.asarray(rng.standard_normal(shape).astype(jnp.dtype(spec.dtype)))
        for shape in (spec.in_shape, spec.out_shape, spec.packed_shape)
    )
    filters = np.sort(rng.permutation(spec.cout).reshape(spec.groups, -1), axis=1)
    filters = filters.astype(np.int32)
    channels = subsets(spec.kept, spec.cin)
    taps = subsets(spec.kept_taps, spec.kernel[0] * spec.kernel[1])
    return x, dy, values, jnp.asarray(filters), channels, taps


def convolve(
    spec: ConvSpec,
    implementation: str | Implementation | None,
    x: jax.Array,
    values: jax.Array,
    *index: jax.Array,
    **epilogue: Any,
) -> jax.Array:
    """Calls `block_sparse_conv` with the geometry of a spec.

    Args:
      spec: the static sizes.
      implementation: as in `block_sparse_conv`.
      x: activations `[cin, h, w, n]`.
      values: packed weights.
      *index: filters, channels, taps.
      **epilogue: other arguments of `block_sparse_conv`: `scale`, `bias`, `residual`, `relu`,
        `channel_block`, `precision`.

    Returns:
      `[cout, ho, wo, n]`.

    Example:
      >>> spec = layer_spec(OTHERS[0], sparsity=0.9, batch=2)
      >>> x, _, values, *index = random_operands(spec)
      >>> convolve(spec, None, x, values, *index).shape
      (32, 8, 8, 2)
    """
    return block_sparse_conv(
        x,
        values,
        *index,
        kernel_shape=(*spec.kernel, spec.cin, spec.cout),
        strides=spec.strides,
        padding=spec.padding,
        dilation=spec.dilation,
        implementation=implementation,
        **epilogue,
    )
