"""The convolution and its gradients in float64, and how far a result may be from them."""

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.block_sparse_conv import ConvSpec

# Kinds of arithmetic: dtype of the activations, and precision of the products.
KINDS = {
    "bf16": ("bfloat16", None),
    "fp16": ("float16", None),
    "tf32": ("float32", "tensorfloat32"),
    "fp32": ("float32", "highest"),
}
# Limits of |result - float64| / |float64|: the rounding of operands and result.
LIMITS = {"bf16": 4e-3, "fp16": 6e-4, "tf32": 2e-3, "fp32": 2e-5}
# The weight gradient stays in float32, summed over all positions.
WEIGHT_GRADIENT_LIMITS = {"bf16": 2e-4, "fp16": 2e-4, "tf32": 2e-3, "fp32": 5e-5}
# No single value may be off by so many times the limit, in root mean squares of the result.
LARGEST = 16


def kind_of(dtype: str) -> str:
    """Returns the kind of arithmetic that is timed for a dtype.

    Args:
      dtype: of the activations.

    Returns:
      A key of `KINDS`; float32 means tf32, as a GPU's users run it.

    Example:
      >>> kind_of("bfloat16"), kind_of("float32")
      ('bf16', 'tf32')
    """
    return next(kind for kind, (kind_dtype, _) in KINDS.items() if kind_dtype == dtype)


def as_float64(array: jax.Array) -> np.ndarray:
    """Returns an array of any float dtype in NumPy's float64."""
    return np.asarray(array.astype(jnp.float32), np.float64)


def check_error(
    pass_name: str, result: np.ndarray, expected: np.ndarray, kind: str, spec: ConvSpec
) -> float:
    """Compares the result of a pass with float64.

    Args:
      pass_name: one of `PASS_NAMES`.
      result: of the pass.
      expected: in float64.
      kind: of `KINDS`, for the limit.
      spec: the static sizes, for the message.

    Returns:
      The relative error of the whole result, two digits.

    Raises:
      AssertionError: it is above the limit, or a single value is far off.
    """
    limits = WEIGHT_GRADIENT_LIMITS if pass_name == "weight gradient" else LIMITS
    limit = limits[kind]
    norm = np.linalg.norm(expected)
    difference = result - expected
    error = float(np.linalg.norm(difference) / norm)
    largest = float(np.abs(difference).max() * expected.size**0.5 / norm)
    if not (error <= limit and largest <= LARGEST * limit):
        raise AssertionError(
            f"the {pass_name} differs from float64 by {error:.1e} (limit {limit:.0e}), one value "
            f"by {largest:.1e}, at {spec}"
        )
    return float(f"{error:.2e}")


def reference(
    spec: ConvSpec,
    x: np.ndarray,
    dy: np.ndarray,
    values: np.ndarray,
    filters: np.ndarray,
    channels: np.ndarray,
    taps: np.ndarray,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Computes the convolution and its gradients by their definition, tap by tap, in NumPy.

    Args:
      spec: the static sizes.
      x, dy, values: float64 operands.
      filters, channels, taps: the index arrays.

    Returns:
      `(y, dx, dvalues)` in float64.
    """
    (top, bottom), (left, right) = spec.padding
    padded = np.pad(x, ((0, 0), (top, bottom), (left, right), (0, 0)))
    y = np.zeros(spec.out_shape)
    dpadded = np.zeros_like(padded)
    dvalues = np.zeros(spec.packed_shape)
    for g in range(spec.groups):
        dy_group = dy[filters[g]].reshape(spec.group_size, -1)
        y_group = np.zeros_like(dy_group)
        for t, tap in enumerate(taps[g]):
            pixels = np.ogrid[_window(spec, int(tap))]
            read = (channels[g][:, None, None], *pixels)
            rows = padded[read].reshape(spec.kept, -1)
            weights = values[g, :, t]
            y_group += weights.T @ rows
            dvalues[g, :, t] = rows @ dy_group.T
            dpadded[read] += (weights @ dy_group).reshape(spec.kept, *spec.out_shape[1:])
        y[filters[g]] = y_group.reshape(spec.group_size, *spec.out_shape[1:])
    return y, dpadded[:, top : top + spec.height, left : left + spec.width], dvalues


def _window(spec: ConvSpec, tap: int) -> tuple[slice, slice]:
    """The pixels of the padded image that a tap reads, rows and columns."""
    offsets = divmod(tap, spec.kernel[1])
    sizes = spec.out_shape[1:3]
    rows, columns = (
        slice(offset * dilation, offset * dilation + (size - 1) * stride + 1, stride)
        for offset, dilation, size, stride in zip(
            offsets, spec.dilation, sizes, spec.strides, strict=True
        )
    )
    return rows, columns
