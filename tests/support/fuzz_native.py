"""A seeded fuzzer of the native kernels: `python tests/support/fuzz_native.py 10000` tries so many
random convolutions against plain NumPy.

Every size, stride, padding, dilation, layout, dtype and variant is random; the output and both
gradients are compared. `--library FOLDER` takes the library from there (as the sanitizers' test
does).
"""

import argparse
import collections
import os
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import pallas_kernels
from experiments.bench import shapes
from pallas_kernels.block_sparse_conv import ConvSpec, cpu
from pallas_kernels.block_sparse_conv.cpu import kernels as native

TOLERANCE = {"float32": 1e-5, "bfloat16": 2e-2}


def random_spec(rng: np.random.Generator) -> ConvSpec:
    """Sizes of one convolution: mostly odd ones, some that fill vectors, some tiny."""

    def pair(low, high):
        return int(rng.integers(low, high + 1)), int(rng.integers(low, high + 1))

    kernel = (1, 1) if rng.random() < 0.2 else pair(1, 4)
    plain = rng.random() < 0.4
    strides, dilation = ((1, 1), (1, 1)) if plain else (pair(1, 3), pair(1, 3))
    padding = (pair(0, 3), pair(0, 3))
    reach = [(k - 1) * d for k, d in zip(kernel, dilation)]
    height, width = (max(size, r + 1 - sum(p)) for size, r, p in zip(pair(1, 12), reach, padding))
    groups, group_size = (
        int(rng.choice([1, 1, 2, 3, 5])),
        int(rng.choice([1, 2, 3, 5, 8, 13, 16, 24, 33, 64])),
    )
    cin = int(rng.choice([1, 2, 3, 7, 16, 40, 130]))
    return ConvSpec(
        cin=cin,
        height=height,
        width=width,
        batch=int(rng.choice([1, 1, 2, 3, 5, 8, 16, 17, 32, 48])),
        kernel=kernel,
        cout=groups * group_size,
        groups=groups,
        group_size=group_size,
        kept=int(rng.integers(1, cin + 1)),
        kept_taps=int(rng.integers(1, kernel[0] * kernel[1] + 1)),
        strides=strides,
        padding=padding,
        dilation=dilation,
        dtype=str(rng.choice(list(TOLERANCE))),
    )


def reference(spec: ConvSpec, x, dy, values, filters, channels, taps):
    """The output and both gradients, window by window, in float64."""
    x, dy, values = (np.asarray(a, np.float64) for a in (x, dy, values))
    padded = np.pad(x, ((0, 0), *spec.padding, (0, 0)))
    y, dpadded, dvalues = (
        np.zeros(spec.out_shape),
        np.zeros_like(padded),
        np.zeros(spec.packed_shape),
    )
    for g in range(spec.groups):
        for t, tap in enumerate(np.asarray(taps[g])):
            top, left = (
                tap // spec.kernel[1] * spec.dilation[0],
                tap % spec.kernel[1] * spec.dilation[1],
            )
            window = (
                np.asarray(channels[g]),
                slice(top, top + (spec.out_height - 1) * spec.strides[0] + 1, spec.strides[0]),
                slice(left, left + (spec.out_width - 1) * spec.strides[1] + 1, spec.strides[1]),
            )
            rows = np.asarray(filters[g])
            y[rows] += np.einsum("kf,khwn->fhwn", values[g, :, t], padded[window])
            dpadded[window] += np.einsum("kf,fhwn->khwn", values[g, :, t], dy[rows])
            dvalues[g, :, t] = np.einsum("khwn,fhwn->kf", padded[window], dy[rows])
    (top, _), (left, _) = spec.padding
    return y, dpadded[:, top : top + spec.height, left : left + spec.width], dvalues


def random_epilogue(rng: np.random.Generator, spec: ConvSpec) -> dict[str, Any]:
    """Each part of the epilogue, or not."""
    shapes = {"scale": (spec.cout,), "bias": (spec.cout,), "residual": spec.out_shape}
    parts: dict[str, Any] = {
        name: jnp.asarray(rng.standard_normal(s).astype(np.float32))
        for name, s in shapes.items()
        if rng.random() < 0.5
    }
    if "residual" in parts:
        parts["residual"] = parts["residual"].astype(spec.dtype)
    return parts | {"relu": bool(rng.random() < 0.5)}


def finished(
    y: np.ndarray, scale: Any = None, bias: Any = None, residual: Any = None, relu: bool = False
) -> np.ndarray:
    """The epilogue of float64 sums."""
    y = y * (1 if scale is None else np.asarray(scale, np.float64)[:, None, None, None])
    y = y + (0 if bias is None else np.asarray(bias, np.float64)[:, None, None, None])
    y = y + (0 if residual is None else np.asarray(residual, np.float64))
    return np.maximum(y, 0) if relu else y


def disagreement(
    spec: ConvSpec, rng: np.random.Generator, seed: int, variant: str
) -> tuple[float, str]:
    """The largest error relative to the largest value, over the four results, and where."""
    os.environ[native.VARIABLE] = variant
    x, dy, values, *index = shapes.random_operands(spec, seed)
    epilogue = random_epilogue(rng, spec)
    relu = epilogue.pop("relu")

    @jax.jit
    def run(x, values, dy, epilogue, *index):
        y, pullback = jax.vjp(
            lambda x, values: shapes.convolve(spec, "cpu", x, values, *index), x, values
        )
        return (
            y,
            *pullback(dy),
            shapes.convolve(spec, "cpu", x, values, *index, **epilogue, relu=relu),
        )

    references = reference(spec, x, dy, values, *index)
    references = (*references, finished(references[0], **epilogue, relu=relu))
    names, worst = (
        ("output", "dx", "dvalues", f"output with {', '.join(epilogue)} and relu={relu}"),
        (0.0, ""),
    )
    for name, result, expected in zip(names, run(x, values, dy, epilogue, *index), references):
        error = np.abs(np.asarray(result, np.float64) - expected).max() / max(
            np.abs(expected).max(), 1e-30
        )
        worst = max(worst, (float(error) if np.isfinite(error) else np.inf, name))
    return worst


def main(cases: int, seed: int = 0) -> None:
    """Tries the cases, and stops at the first that disagrees."""
    before, start, worst = (
        os.environ.get(native.VARIABLE),
        time.time(),
        dict.fromkeys(TOLERANCE, 0.0),
    )
    tried = collections.Counter()
    try:
        for case in range(cases):
            rng = np.random.default_rng([seed, case])
            spec, variant = random_spec(rng), str(rng.choice(native.variants()))
            error, where = disagreement(spec, rng, case, variant)
            if not error <= TOLERANCE[spec.dtype]:
                raise AssertionError(
                    f"case {case} of seed {seed}, {variant}: the {where} is off by {error:.1e} of "
                    f"its largest value, {spec}"
                )
            worst[spec.dtype], tried[variant] = max(worst[spec.dtype], error), tried[variant] + 1
            if case % 100 == 99:
                jax.clear_caches()
    finally:
        os.environ.pop(native.VARIABLE) if before is None else os.environ.update(
            {native.VARIABLE: before}
        )
    print(
        f"{cases} cases agree in {time.time() - start:.0f} s; largest errors {worst}; {dict(tried)}"
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("cases", type=int)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--library")
    options = parser.parse_args()
    if options.library:
        pallas_kernels.__path__.insert(0, options.library)
    assert cpu.unavailable() is None, cpu.unavailable()
    assert jnp.zeros(1).devices().pop().platform == "cpu"
    main(options.cases, options.seed)
