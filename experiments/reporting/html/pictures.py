"""Pictures of masks, as PNG inside of the page."""

import base64
import io

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image

import blocksparse_jax as bsj
from experiments.reporting.html.layers import Layer
from experiments.training.plots import kernel_slices

_LARGEST, _SMALLEST = 512, 192  # pixels of the longer side
_RED = (214, 39, 40)


def mask_picture(layer: Layer) -> str:
    """Draws the kernel slices that a layer keeps, the filters of a group side by side.

    Args:
      layer: a convolution with a mask.

    Returns:
      The address of a PNG, a row for each filter and a column for each input channel: white keeps
      no tap, black keeps all. Red lines separate the groups, where there is room for them.
    """
    assert layer.mask is not None
    kernels = kernel_slices(layer.mask, layer.layout)
    zoom = max(1, _SMALLEST // max(kernels.shape))
    fractions = np.kron(_reduced(kernels), np.ones((zoom, zoom)))
    pixels = np.repeat(np.uint8(255 - np.round(255 * fractions))[..., None], 3, axis=2)
    if isinstance(layer.layout, bsj.BlockLayout):
        _separate(pixels, layer.layout.filters.shape[0])
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


def _reduced(kernels: Float[np.ndarray, "rows columns"]) -> Float[np.ndarray, "rows columns"]:
    """Means over squares, where there are more rows or columns than a picture has."""
    for axis, size in enumerate(kernels.shape):
        if size > _LARGEST:
            edges = np.linspace(0, size, _LARGEST, endpoint=False).astype(int)
            counts = np.diff(np.append(edges, size))
            shape = (-1, 1) if axis == 0 else (1, -1)
            kernels = np.add.reduceat(kernels, edges, axis=axis) / counts.reshape(shape)
    return kernels


def _separate(pixels: UInt8[np.ndarray, "rows columns 3"], groups: int) -> None:
    """Draws a line between groups of equal size."""
    if len(pixels) >= 6 * groups:
        for group in range(1, groups):
            pixels[round(group * len(pixels) / groups)] = _RED
