"""What layers read, and the linear problem that each of them solves at sampled positions."""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from blocksparse_jax import _checks
from blocksparse_jax.geometry import Padding, explicit_geometry, with_border


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LayerInput:
    """What a layer read, and how its convolution goes over it.

    Attributes:
      x: activations `[n, h, w, cin]` of a convolution, or `[..., cin]` of a dense layer.
      strides: step in pixels, one integer or two; static, like all that follows.
      padding: in any form that `conv` takes.
      dilation: distance between taps in pixels, one integer or two.

    Example:
      >>> import jax.numpy as jnp
      >>> LayerInput(jnp.ones((1, 8, 8, 16)), strides=2, padding=1).x.shape
      (1, 8, 8, 16)
    """

    x: Float[Array, "..."]
    strides: Any = dataclasses.field(default=1, metadata={"static": True})
    padding: Padding = dataclasses.field(default="SAME", metadata={"static": True})
    dilation: Any = dataclasses.field(default=1, metadata={"static": True})


class Problem(NamedTuple):
    """A layer at sampled positions: `targets = sum over channels of patches * kernel`.

    Attributes:
      patches: float64 `[samples, taps, cin]`, what the layer reads there.
      kernel: float64 `[taps, cin, cout]`.
      targets: float64 `[samples, cout]`, what the layer shall give there, without its bias.
    """

    patches: np.ndarray
    kernel: np.ndarray
    targets: np.ndarray

    def normal_equations(self) -> tuple[np.ndarray, np.ndarray]:
        """Inner products of the channels' contributions `z_c = sum over taps of patch * kernel`.

        Returns:
          `<z_c, z_d>` as `[cin, cin]`, and `<z_c, targets>` as `[cin]`, summed over samples and
          filters.
        """
        samples, taps, channels = self.patches.shape
        rows = self.patches.reshape(samples, -1)
        weights = self.kernel.reshape(taps * channels, -1)
        products = (rows.T @ rows) * (weights @ weights.T)
        with_targets = (rows.T @ self.targets) * weights
        return (
            products.reshape(taps, channels, taps, channels).sum((0, 2)),
            with_targets.reshape(taps, channels, -1).sum((0, 2)),
        )


def problem(
    name: str,
    kernel: Float[Array, "..."],
    given: LayerInput,
    samples: int,
    seed: Sequence[int],
    original: LayerInput | None = None,
) -> Problem:
    """A layer's problem at positions drawn at random from all images.

    Args:
      name: of its kernel, for errors.
      kernel: `[kh, kw, cin, cout]` or `[cin, cout]`.
      given: what the layer reads.
      samples: positions; all where there are fewer.
      seed: of the draw.
      original: what the layer read before anything was pruned, which makes the targets; None is
        `given`.

    Returns:
      The problem; layers of one geometry draw the same positions.
    """
    weights = _checks.concrete(f"params[{name!r}]", kernel).astype(np.float64)
    if weights.ndim == 2:
        weights = weights[None, None]
    if weights.ndim != 4:
        raise ValueError(
            f"params[{name!r}]: expected a kernel [kh, kw, cin, cout] or [cin, cout], got shape "
            f"{weights.shape}"
        )
    kh, kw, cin, cout = weights.shape
    matrix = weights.reshape(kh * kw, cin, cout)
    patches = _patches(name, given, (kh, kw, cin), samples, seed)
    before = patches if original is None else _patches(name, original, (kh, kw, cin), samples, seed)
    targets = before.reshape(len(before), -1) @ matrix.reshape(-1, cout)
    return Problem(patches, matrix, targets)


def _patches(
    name: str, given: LayerInput, size: tuple[int, int, int], samples: int, seed: Sequence[int]
) -> np.ndarray:
    """What the taps see at drawn positions: float64 `[samples, taps, cin]`."""
    kh, kw, cin = size
    x = _checks.concrete(f"inputs[{name!r}]", given.x)
    if x.ndim != 4:
        x = x.reshape(-1, 1, 1, x.shape[-1])
    if x.shape[-1] != cin or not x.size:
        raise ValueError(
            f"inputs[{name!r}]: expected activations [n, h, w, {cin}] or [..., {cin}], got shape "
            f"{np.shape(given.x)}"
        )
    x = np.asarray(with_border(jnp.asarray(x), (kh, kw), given.padding, given.dilation))
    geometry = explicit_geometry(
        x.shape[1:3], (kh, kw), given.strides, given.padding, given.dilation
    )
    x = np.pad(x, ((0, 0), *geometry.padding, (0, 0)))
    (sy, sx), (dy, dx) = geometry.strides, geometry.dilation
    rows = (x.shape[1] - (kh - 1) * dy - 1) // sy + 1
    columns = (x.shape[2] - (kw - 1) * dx - 1) // sx + 1
    positions = len(x) * rows * columns
    if positions < 1:
        raise ValueError(f"inputs[{name!r}]: {x.shape} is smaller than the kernel's reach")
    drawn = np.random.default_rng(seed).choice(positions, min(samples, positions), replace=False)
    image, row, column = np.unravel_index(drawn, (len(x), rows, columns))
    taps = [x[image, row * sy + i * dy, column * sx + j * dx] for i in range(kh) for j in range(kw)]
    return np.stack(taps, axis=1).astype(np.float64)
