"""Correctness before speed: every GPU implementation, dtype and pass against float64 NumPy, on
small odd shapes and on real layers.
"""

import dataclasses
import functools
import importlib
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

from experiments.bench import shapes
from experiments.bench.gpu import shapes as gpu_shapes
from experiments.bench.programs import PASSES
from pallas_kernels.block_sparse_conv import ConvSpec, Implementation
from pallas_kernels.block_sparse_conv.xla import kernels as xla

KINDS = {  # dtype and precision
    "bf16": ("bfloat16", None),
    "fp16": ("float16", None),
    "tf32": ("float32", "tensorfloat32"),
    "fp32": ("float32", "highest"),
}
LIMITS = {
    "bf16": 4e-3,
    "fp16": 6e-4,
    "tf32": 2e-3,
    "fp32": 2e-5,
}  # |ours - float64| / |float64|: rounding of operands and result
LARGEST = (
    16  # no single value may be off by so many times the limit, in root mean squares of the result
)
WEIGHT_GRADIENT = {
    "bf16": 2e-4,
    "fp16": 2e-4,
    "tf32": 2e-3,
    "fp32": 5e-5,
}  # it stays in float32, summed over all positions
BASE = ConvSpec(
    cin=64,
    height=7,
    width=6,
    batch=72,
    kernel=(3, 3),
    cout=128,
    groups=2,
    kept=24,
    kept_taps=3,
    group_size=64,
    padding=((1, 1), (1, 1)),
    channel_block=8,
)
SMALL = {
    "3x3 same": BASE,
    "3x3 stride 2": dataclasses.replace(BASE, strides=(2, 2), padding=((0, 1), (0, 1))),
    "3x3 valid, 40 images": dataclasses.replace(BASE, batch=40, padding=((0, 0), (0, 0))),
    "1x1": dataclasses.replace(BASE, kernel=(1, 1), kept_taps=1, padding=((0, 0), (0, 0))),
    "1x1 stride 2": dataclasses.replace(
        BASE, kernel=(1, 1), kept_taps=1, padding=((0, 0), (0, 0)), strides=(2, 2)
    ),
    "groups of 8": dataclasses.replace(BASE, groups=16, group_size=8),
    "groups of 32": dataclasses.replace(BASE, groups=4, group_size=32, kept=40, kept_taps=5),
    "one group of 128, all kept": dataclasses.replace(
        BASE, groups=1, group_size=128, kept=64, kept_taps=9
    ),
    "single channels": dataclasses.replace(BASE, channel_block=1, kept=19),
    "37 images": dataclasses.replace(BASE, batch=37),
    "runs of 32": dataclasses.replace(BASE, channel_block=32, kept=32),
    "dilation 2, padding 5": dataclasses.replace(BASE, dilation=(2, 2), padding=((5, 4), (5, 6))),
}
EVERYTHING = ("scale", "bias", "residual")
EPILOGUES = (
    ("3x3 same", EVERYTHING, True),
    ("groups of 32", EVERYTHING, True),
    ("1x1", ("residual",), False),
)
# of the Triton kernels: each own way of the input gradient, and 64-bit offsets, which only huge
# arrays need
VARIANTS = (
    *(
        (shape, way)
        for shape in ("3x3 same", "3x3 stride 2", "groups of 32", "runs of 32")
        for way in ("transposed", "scatter")
    ),
    ("1x1 stride 2", "scatter"),
    ("single channels", "scatter"),
    ("3x3 stride 2", "wide"),
    ("1x1", "wide"),
)
REAL = (
    "resnet50 256@14",
    "resnet50 1x1 256-1024@14",
    "resnet50 1x1 512-256@28/2",
    "vgg19 512@4 n128",
    "resnet32x2 32-64@32/2 n128",
)


@dataclasses.dataclass(frozen=True)
class Unit:
    """One check: all passes of a convolution.

    Attributes:
      name: of the shape, and what is special.
      spec: static sizes.
      kind: of `KINDS`.
      epilogue: of scale, bias, residual; `spec.relu` says whether a ReLU follows.
      variant: of the Triton kernels: a way of the input gradient, or "wide"; "": as they are.
      seconds: after which it hangs.
    """

    name: str
    spec: ConvSpec
    kind: str
    epilogue: tuple[str, ...] = ()
    variant: str = ""
    seconds: float = 40


def implementations() -> dict[str, Implementation | str]:
    """The implementations that run on this device, XLA's among them.

    Returns:
      Name -> the record, or why it is absent.

    Example:
      >>> implementations()["xla"].name
      'xla'
    """
    found: dict[str, Implementation | str] = {}
    for name in ("mosaic_gpu", "triton"):
        try:
            module = importlib.import_module(f"pallas_kernels.block_sparse_conv.{name}")
            found[name] = module.unavailable() or module.IMPLEMENTATION
        except ImportError as error:
            found[name] = f"does not import: {error}"
    return found | {"xla": xla.IMPLEMENTATION}


def units(quick: bool, name: str) -> Iterator[Unit]:
    """What is checked of an implementation.

    Args:
      quick: few small shapes.
      name: of the implementation.

    Yields:
      Units, small shapes first.
    """
    small = {"3x3 same": dataclasses.replace(BASE, height=4, width=3, batch=3)} if quick else SMALL
    every = [Unit(shape, spec, kind) for shape, spec in small.items() for kind in KINDS]
    for shape, parts, relu in EPILOGUES:
        if spec := small.get(shape):
            every += [
                Unit(
                    f"{shape} + {' '.join(parts)}",
                    dataclasses.replace(spec, relu=relu),
                    kind,
                    parts,
                )
                for kind in KINDS
            ]
    if name == "triton" and not quick:
        every += [
            Unit(f"{shape} {way}", SMALL[shape], kind, (), way)
            for shape, way in VARIANTS
            for kind in ("bf16", "tf32", "fp32")
        ]
    for shape in () if quick else REAL:
        spec = gpu_shapes.case_spec(gpu_shapes.cases(shape)[0], sparsity=0.9)
        every += [Unit(shape, spec, kind, seconds=90) for kind in ("bf16", "tf32")]
    for unit in every:
        dtype, precision = KINDS[unit.kind]
        yield dataclasses.replace(
            unit, spec=dataclasses.replace(unit.spec, dtype=dtype, precision=precision)
        )


def variant(implementation: Implementation, name: str) -> Implementation:
    """The Triton implementation with one thing forced.

    Args:
      implementation: the record.
      name: of a way of the input gradient, or "wide": 64-bit offsets; "": nothing.

    Returns:
      The record that does so.
    """
    if name == "wide":
        passes = ("forward", "input_gradient", "weight_gradient")
        return dataclasses.replace(
            implementation, **{one: _wide(getattr(implementation, one)) for one in passes}
        )
    if name:
        return dataclasses.replace(
            implementation,
            input_gradient=functools.partial(implementation.input_gradient, method=name),
        )
    return implementation


def _wide(run: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    calls = importlib.import_module("pallas_kernels.block_sparse_conv.triton.calls")
    constants = calls.geometry_constants

    def wide(*operands: Any) -> jax.Array:
        with mock.patch.object(
            calls, "geometry_constants", lambda *a, **k: constants(*a, **k) | {"wide": True}
        ):
            return run(*operands)

    return wide


def check(unit: Unit, implementation: Implementation) -> dict[str, Any]:
    """Compares the output and both gradients with float64.

    Args:
      unit: what is checked.
      implementation: the record.

    Returns:
      {"refused": why} where it cannot serve the shape, else pass -> relative error.

    Raises:
      AssertionError: a pass is wrong.
    """
    spec, kind = unit.spec, unit.kind
    if reason := implementation.supports(spec):
        return {"refused": reason}
    implementation = variant(implementation, unit.variant)
    x, dy, values, *index = gpu_shapes.operands(spec, seed=len(str(spec)))
    values = values.astype(jnp.float32)  # so that their gradient stays in float32
    keys = jax.random.split(jax.random.key(1), 3)
    every = {
        "scale": jax.random.uniform(keys[0], (spec.cout,), minval=0.5, maxval=1.5),
        "bias": 5 * jax.random.normal(keys[1], (spec.cout,)),
        "residual": 5 * jax.random.normal(keys[2], spec.out_shape, spec.dtype),
    }
    epilogue = {name: every[name] for name in unit.epilogue}

    @jax.jit
    def run(x, dy, values, epilogue, *index):
        def conv(x, values):
            more = {
                **epilogue,
                "relu": spec.relu,
                "channel_block": spec.channel_block,
                "precision": spec.precision,
            }
            return shapes.convolve(spec, implementation, x, values, *index, **more)

        y, pull = jax.vjp(conv, x, values)
        return y, *pull(dy)

    def host(a: jax.Array) -> np.ndarray:
        return np.asarray(a.astype(jnp.float32), np.float64)

    ours = [host(a) for a in run(x, dy, values, epilogue, *index)]
    dy = host(dy) * (ours[0] > 0) if spec.relu else host(dy)  # where our own output is positive
    filters = np.asarray(index[0])
    more = {name: host(a) for name, a in epilogue.items()}
    scale = more.get("scale", np.ones(spec.cout))
    factor = scale[filters][:, None, None, :]
    y, dx, dvalues = reference(spec, host(x), dy, host(values), *map(np.asarray, index))
    if "scale" in more:
        _, dx, _ = reference(spec, host(x), dy, host(values) * factor, *map(np.asarray, index))
    y = (
        y * scale[:, None, None, None]
        + more.get("bias", np.zeros(spec.cout))[:, None, None, None]
        + more.get("residual", 0)
    )
    errors = {}
    for name, got, want in zip(
        PASSES, ours, (np.maximum(y, 0) if spec.relu else y, dx, dvalues * factor), strict=True
    ):
        limit = WEIGHT_GRADIENT[kind] if name == "weight gradient" else LIMITS[kind]
        difference, size = got - want, np.linalg.norm(want)
        error, largest = (
            float(np.linalg.norm(difference) / size),
            float(np.abs(difference).max() * want.size**0.5 / size),
        )
        if not (error <= limit and largest <= LARGEST * limit):
            raise AssertionError(
                f"the {name} differs from float64 by {error:.1e} (limit {limit:.0e}), one value by "
                f"{largest:.1e}, at {spec}"
            )
        errors[name] = float(f"{error:.2e}")
    return errors


def reference(
    spec: ConvSpec,
    x: np.ndarray,
    dy: np.ndarray,
    values: np.ndarray,
    filters: np.ndarray,
    channels: np.ndarray,
    taps: np.ndarray,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The convolution and its gradients by their definition, tap by tap, in NumPy.

    Args:
      spec: the static sizes.
      x, dy, values: float64 operands.
      filters, channels, taps: the index arrays.

    Returns:
      `(y, dx, dvalues)` in float64.
    """
    (top, bottom), (left, right) = spec.padding
    padded = np.pad(x, ((0, 0), (top, bottom), (left, right), (0, 0)))
    y, dpadded, dvalues = (
        np.zeros(spec.out_shape),
        np.zeros_like(padded),
        np.zeros(spec.packed_shape),
    )
    for g in range(spec.groups):
        dg = dy[filters[g]].reshape(spec.group_size, -1)
        total = np.zeros_like(dg)
        for t, tap in enumerate(taps[g]):
            ends = [
                slice(i * d, i * d + (n - 1) * s + 1, s)
                for i, d, n, s in zip(
                    divmod(int(tap), spec.kernel[1]),
                    spec.dilation,
                    spec.out_shape[1:3],
                    spec.strides,
                )
            ]
            where = (channels[g][:, None, None], *np.ogrid[ends[0], ends[1]])
            rows = padded[where].reshape(spec.kept, -1)
            total += values[g, :, t].T @ rows
            dvalues[g, :, t] = rows @ dg.T
            dpadded[where] += (values[g, :, t] @ dg).reshape(spec.kept, *spec.out_shape[1:])
        y[filters[g]] = total.reshape(spec.group_size, *spec.out_shape[1:])
    return y, dpadded[:, top : top + spec.height, left : left + spec.width], dvalues
