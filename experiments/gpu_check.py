"""Correctness before speed: every GPU implementation, dtype and pass against float64 NumPy, on small odd shapes and on real layers."""

import dataclasses
import importlib
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import gpu_shapes, shapes
from pallas_kernels.block_sparse_conv import ConvSpec, Implementation, xla

KINDS = {  # dtype and precision
    "bf16": ("bfloat16", None),
    "fp16": ("float16", None),
    "tf32": ("float32", "tensorfloat32"),
    "fp32": ("float32", "highest"),
}
LIMITS = {"bf16": 4e-3, "fp16": 6e-4, "tf32": 2e-3, "fp32": 2e-5}  # |ours - float64| / |float64|: rounding of operands and result
LARGEST = 16  # no single value may be off by so many times the limit, in root mean squares of the result
WEIGHT_GRADIENT = {"bf16": 2e-4, "fp16": 2e-4, "tf32": 2e-3, "fp32": 5e-5}  # it stays in float32, summed over all positions
PASSES = ("forward", "input gradient", "weight gradient")

BASE = ConvSpec(
    cin=64, height=7, width=6, batch=72, kernel=(3, 3), cout=128, groups=2, kept=24, kept_taps=3, group_size=64,
    padding=((1, 1), (1, 1)), channel_block=8,
)  # fmt: skip
SMALL = {
    "3x3 same": BASE,
    "3x3 stride 2": dataclasses.replace(BASE, strides=(2, 2), padding=((0, 1), (0, 1))),
    "3x3 valid, 40 images": dataclasses.replace(BASE, batch=40, padding=((0, 0), (0, 0))),
    "1x1": dataclasses.replace(BASE, kernel=(1, 1), kept_taps=1, padding=((0, 0), (0, 0))),
    "1x1 stride 2": dataclasses.replace(BASE, kernel=(1, 1), kept_taps=1, padding=((0, 0), (0, 0)), strides=(2, 2)),
    "groups of 8": dataclasses.replace(BASE, groups=16, group_size=8),
    "groups of 32": dataclasses.replace(BASE, groups=4, group_size=32, kept=40, kept_taps=5),
    "one group of 128, all kept": dataclasses.replace(BASE, groups=1, group_size=128, kept=64, kept_taps=9),
    "single channels": dataclasses.replace(BASE, channel_block=1, kept=19),
}
REAL = ("resnet50 256@14", "resnet50 1x1 256-1024@14", "resnet50 1x1 512-256@28/2", "vgg19 512@4 n128", "resnet32x2 32-64@32/2 n128")


def implementations() -> dict[str, Implementation | str]:
    """The implementations that run on this device, XLA's among them.

    Returns:
      Name -> the record, or why it is absent.

    Example:
      >>> implementations()["xla"].name
      'xla'

    Reference: ours.
    """
    found: dict[str, Implementation | str] = {}
    for name in ("mosaic_gpu", "triton"):
        try:
            module = importlib.import_module(f"pallas_kernels.block_sparse_conv.{name}")
            found[name] = module.unavailable() or module.IMPLEMENTATION
        except ImportError as error:
            found[name] = f"does not import: {error}"
    return found | {"xla": xla.IMPLEMENTATION}


def units(quick: bool) -> Iterator[tuple[str, ConvSpec, str]]:
    """What is checked.

    Args:
      quick: few small shapes.

    Yields:
      (shape's name, static sizes, kind of arithmetic), small shapes first.

    Reference: ours.
    """
    small = {"small": dataclasses.replace(BASE, height=4, width=3, batch=3)} if quick else SMALL
    for name, spec in small.items():
        for kind, (dtype, precision) in KINDS.items():
            yield name, dataclasses.replace(spec, dtype=dtype, precision=precision), kind
    for name in () if quick else REAL:
        spec = gpu_shapes.case_spec(gpu_shapes.cases(name)[0], sparsity=0.9)
        for kind, (dtype, precision) in KINDS.items():
            if kind in ("bf16", "tf32"):
                yield name, dataclasses.replace(spec, dtype=dtype, precision=precision), kind


def check(spec: ConvSpec, kind: str, implementation: Implementation) -> dict[str, Any]:
    """Compares the output and both gradients with float64.

    Args:
      spec: the static sizes.
      kind: of `KINDS`.
      implementation: the record.

    Returns:
      {"refused": why} where it cannot serve the shape, else pass -> relative error.

    Raises:
      AssertionError: a pass is wrong.

    Reference: ours.
    """
    if reason := implementation.supports(spec):
        return {"refused": reason}
    x, dy, values, *index = gpu_shapes.operands(spec, seed=len(str(spec)))
    values = values.astype(jnp.float32)  # so that their gradient stays in float32

    @jax.jit
    def run(x, dy, values, *index):
        def conv(x, values):
            return shapes.convolve(spec, implementation, x, values, *index, channel_block=spec.channel_block, precision=spec.precision)

        y, pull = jax.vjp(conv, x, values)
        return y, *pull(dy)

    ours = [np.asarray(a.astype(jnp.float32)) for a in run(x, dy, values, *index)]
    wanted = reference(spec, *(np.asarray(a.astype(jnp.float32), np.float64) for a in (x, dy, values)), *map(np.asarray, index))
    errors = {}
    for name, got, want in zip(PASSES, ours, wanted, strict=True):
        limit = WEIGHT_GRADIENT[kind] if name == "weight gradient" else LIMITS[kind]
        difference, scale = got - want, np.linalg.norm(want)
        error, largest = float(np.linalg.norm(difference) / scale), float(np.abs(difference).max() * want.size**0.5 / scale)
        if not (error <= limit and largest <= LARGEST * limit):
            raise AssertionError(
                f"the {name} differs from float64 by {error:.1e} (limit {limit:.0e}), one value by {largest:.1e}, at {spec}"
            )
        errors[name] = float(f"{error:.2e}")
    return errors


def reference(
    spec: ConvSpec, x: np.ndarray, dy: np.ndarray, values: np.ndarray, filters: np.ndarray, channels: np.ndarray, taps: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The convolution and its gradients by their definition, tap by tap, in NumPy.

    Args:
      spec: the static sizes.
      x, dy, values: float64 operands.
      filters, channels, taps: the index arrays.

    Returns:
      `(y, dx, dvalues)` in float64.

    Reference: ours.
    """
    (top, bottom), (left, right) = spec.padding
    padded = np.pad(x, ((0, 0), (top, bottom), (left, right), (0, 0)))
    y, dpadded, dvalues = np.zeros(spec.out_shape), np.zeros_like(padded), np.zeros(spec.packed_shape)
    for g in range(spec.groups):
        dg = dy[filters[g]].reshape(spec.group_size, -1)
        total = np.zeros_like(dg)
        for t, tap in enumerate(taps[g]):
            ends = [
                slice(i * d, i * d + (n - 1) * s + 1, s)
                for i, d, n, s in zip(divmod(int(tap), spec.kernel[1]), spec.dilation, spec.out_shape[1:3], spec.strides)
            ]
            where = (channels[g][:, None, None], *np.ogrid[ends[0], ends[1]])
            rows = padded[where].reshape(spec.kept, -1)
            total += values[g, :, t].T @ rows
            dvalues[g, :, t] = rows @ dg.T
            dpadded[where] += (values[g, :, t] @ dg).reshape(spec.kept, *spec.out_shape[1:])
        y[filters[g]] = total.reshape(spec.group_size, *spec.out_shape[1:])
    return y, dpadded[:, top : top + spec.height, left : left + spec.width], dvalues
