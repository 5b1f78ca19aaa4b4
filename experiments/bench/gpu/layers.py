"""Times conv layers on a GPU: cuDNN through XLA in NHWC and NCHW, masked dense, and the
block-sparse kernels; one pass at a time.

The loops of `gpu_clock` keep operands in the layout that the compiler prefers, so a dense
convolution transposes its activations once per program of hundreds of launches. "forward +
gradients" is the sum of the three medians: what the passes of the block-sparse kernels share in one
program (the gathered dy, the lists) is counted twice there.
"""

import dataclasses
import functools
import zlib
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from experiments.bench import shapes
from experiments.bench.gpu import clock as gpu_clock
from experiments.bench.gpu import shapes as gpu_shapes
from experiments.bench.gpu import tiles as gpu_tiles
from experiments.bench.gpu import tune as tune_gpu
from experiments.bench.gpu.check import KINDS, LARGEST, LIMITS, WEIGHT_GRADIENT, reference
from experiments.bench.gpu.journal import fingerprint
from experiments.bench.programs import PASSES, single_passes
from pallas_kernels.block_sparse_conv import ConvSpec, Implementation
from pallas_kernels.block_sparse_conv.xla import kernels as xla

CHOSEN, MASKED = "chosen", "masked dense"
DENSE = {"dense NHWC": "NHWC", "dense NCHW": "NCHW"}
TOGETHER = "forward + gradients"
FROM_CHWN = {"NHWC": (3, 1, 2, 0), "NCHW": (3, 0, 1, 2)}


def sources(name: str, spec: ConvSpec | None = None) -> str:
    """What an implementation's measurements hold for: its sources, and the tiles in which it runs a
    convolution.

    Args:
      name: of the implementation.
      spec: the static sizes.

    Returns:
      A fingerprint, and with a spec one of the tiles behind it.
    """
    own = _files(name)
    return own if spec is None else f"{own}-{zlib.crc32(str(tiles(name, spec)).encode()):08x}"


@functools.cache
def _files(name: str) -> str:
    folder = Path(xla.__file__).parents[1]
    return fingerprint(
        [path for part in (".", "xla", name) for path in sorted((folder / part).glob("*.py"))]
    )


def tiles(name: str, spec: ConvSpec) -> dict[str, dict[str, Any]]:
    """The tiles in which an implementation runs a convolution.

    Args:
      name: of the implementation.
      spec: the static sizes.

    Returns:
      By pass; empty where there are none.

    Example:
      >>> tiles("xla", gpu_shapes.case_spec(gpu_shapes.cases("512@2")[0], sparsity=0.9))
      {}
    """
    if name not in ("mosaic_gpu", "triton"):
        return {}
    which = gpu_tiles.tunable(name)
    if which.implementation.supports(spec) is not None:
        return {}
    return {
        mode: dataclasses.asdict(which.default(spec, one))
        for mode, one in zip(PASSES, gpu_tiles.PASSES)
    }


def measure_dense(spec: ConvSpec, repetitions: int) -> dict[str, Any]:
    """Times the dense convolution and the masked one.

    Args:
      spec: the static sizes; of the blocks only the density plays a part.
      repetitions: of each.

    Returns:
      {"ms": {name: {pass: times}}, and the sets' size}.
    """

    def conv(layout: str, x: jax.Array, kernel: jax.Array) -> jax.Array:
        return lax.conv_general_dilated(
            x, kernel, spec.strides, spec.padding, dimension_numbers=(layout, "HWIO", layout)
        )

    def masked(x: jax.Array, kernel: jax.Array, mask: jax.Array) -> jax.Array:
        return conv("NHWC", x, jnp.where(mask, kernel, 0))

    def operands(layout: str, seed: int) -> tuple[jax.Array, ...]:
        keys = jax.random.split(jax.random.key(seed), 4)
        images = (
            tuple(size[axis] for axis in FROM_CHWN[layout])
            for size in (spec.in_shape, spec.out_shape)
        )
        kernel = (*spec.kernel, spec.cin, spec.cout)
        arrays = [
            jax.random.normal(key, size, spec.dtype) for key, size in zip(keys, (*images, kernel))
        ]
        return *arrays, jax.random.bernoulli(keys[3], spec.density, kernel)

    dense = dataclasses.replace(spec, kept=spec.cin, kept_taps=spec.kernel[0] * spec.kernel[1])
    ms, about = {}, {}
    for layout in ("NHWC", "NCHW"):
        sets = gpu_clock.rotate(functools.partial(operands, layout))
        about, count = sets.about, gpu_clock.rounds(tune_gpu.estimate(dense), sets)
        plain = single_passes(lambda x, kernel, mask, layout=layout: conv(layout, x, kernel))
        functions = {(f"dense {layout}", name): f for name, f in plain.items()}
        if layout == "NHWC":
            functions |= {(MASKED, name): f for name, f in single_passes(masked).items()}
        programs = gpu_clock.build(
            functions, sets, count
        )  # one after another: XLA times cuDNN's algorithms meanwhile
        for (name, which), times in gpu_clock.sample(programs, repetitions).items():
            ms.setdefault(name, {})[which] = times
    return {"ms": ms, **about}


def measure_sparse(
    spec: ConvSpec,
    name: str,
    implementation: Implementation,
    kind: str,
    repetitions: int,
    threads: int,
) -> dict[str, Any]:
    """Checks and times one implementation of the block-sparse convolution.

    Args:
      spec: the static sizes.
      name: of the implementation.
      implementation: the record.
      kind: of `gpu_check.KINDS`, for the limits of the error.
      repetitions: of each pass.
      threads: compile at once.

    Returns:
      {"ms": {pass: times}, "tiles": pass -> tile, and the sets' size}; {"refused": why} where it
      cannot serve the shape.

    Raises:
      AssertionError: what was about to be timed is wrong.
    """
    if reason := implementation.supports(spec):
        return {"refused": reason}

    def conv(x: jax.Array, values: jax.Array, *index: jax.Array) -> jax.Array:
        return shapes.convolve(
            spec,
            implementation,
            x,
            values,
            *index,
            channel_block=spec.channel_block,
            precision=spec.precision,
        )

    def operands(seed: int) -> tuple[jax.Array, ...]:
        x, dy, values, *index = gpu_shapes.operands(spec, seed)
        return (
            x,
            dy,
            values.astype(jnp.float32),
            *index,
        )  # as parameters are; the cast is in the time

    sets = gpu_clock.rotate(operands)
    count = gpu_clock.rounds(tune_gpu.estimate(spec), sets)
    programs = gpu_clock.build(
        single_passes(conv), sets, count, 1 if name in ("xla", "dense") else threads
    )
    check_slices(
        spec,
        kind,
        sets.operands[0],
        {which: program.output() for which, program in programs.items()},
    )
    return {"ms": gpu_clock.sample(programs, repetitions), "tiles": tiles(name, spec), **sets.about}


def check_slices(
    spec: ConvSpec, kind: str, operands: tuple[jax.Array, ...], results: dict[str, jax.Array]
) -> None:
    """Compares parts of the results with float64: the first and the last image, and one weight's
    row of the gradient over all of them.

    Args:
      spec: the static sizes.
      kind: of `gpu_check.KINDS`.
      operands: what the program was given.
      results: of each pass.

    Raises:
      AssertionError: a pass is wrong.
    """
    x, dy, values, *index = operands

    def host(a: jax.Array) -> np.ndarray:
        return np.asarray(a.astype(jnp.float32), np.float64)

    ends = np.array([0, spec.batch - 1])
    few = dataclasses.replace(spec, batch=2)
    rounded = host(values.astype(spec.dtype))
    y, dx, _ = reference(
        few, host(x[..., ends]), host(dy[..., ends]), rounded, *map(np.asarray, index)
    )
    filters, channels, taps = (a[-1:] for a in index)
    some = min(8, spec.group_size)
    row = dataclasses.replace(spec, cin=1, cout=some, groups=1, kept=1, group_size=some)
    one = np.zeros((1, 1), np.int32)
    *_, dvalues = reference(
        row,
        host(x[channels[0, -1:]]),
        host(dy[filters[0, :some]]),
        np.zeros(row.packed_shape),
        np.arange(some)[None],
        one,
        np.asarray(taps),
    )
    got = {
        "forward": results["forward"][..., ends],
        "input gradient": results["input gradient"][..., ends],
    }
    got["weight gradient"] = results["weight gradient"][-1:, -1:, :, :some]
    for name, wanted in zip(PASSES, (y, dx, dvalues)):
        limit = WEIGHT_GRADIENT[kind] if name == "weight gradient" else LIMITS[kind]
        difference = np.linalg.norm(host(got[name]) - wanted) / np.linalg.norm(wanted)
        largest = np.abs(host(got[name]) - wanted).max() * wanted.size**0.5 / np.linalg.norm(wanted)
        if not (difference <= limit and largest <= LARGEST * limit):
            raise AssertionError(
                f"the {name} differs from float64 by {difference:.1e} (limit {limit:.0e}), nothing "
                f"was timed, at {spec}"
            )


def kind_of(dtype: str) -> str:
    """The kind of arithmetic that is timed for a dtype.

    Args:
      dtype: of the activations.

    Returns:
      A key of `KINDS`; float32 means tf32, as a GPU's users run it.

    Example:
      >>> kind_of("bfloat16"), kind_of("float32")
      ('bf16', 'tf32')
    """
    return next(kind for kind, (own, _) in KINDS.items() if own == dtype)


def rows(
    about: dict[str, Any], dense: dict[str, Any], sparse: dict[str, dict[str, Any]]
) -> list[dict[str, Any]]:
    """The report's rows of one layer and sparsity, in the CPU report's form: the three passes, and
    their sum.

    "chosen" is the kernel with the least sum of the passes, as long as nothing picks the GPU
    kernels. "runs" is what should run the pass: the fastest kernel, or dense where that is faster
    still (without the transpositions that it may take in a network).

    Args:
      about: goes into each row.
      dense: of `measure_dense`.
      sparse: name -> what `measure_sparse` found.

    Returns:
      Rows; none where nothing block-sparse was timed.
    """
    timed = {name: found["ms"] for name, found in sparse.items() if "ms" in found}
    if not timed:
        return []
    every = {**dense["ms"], **timed}
    every = {name: by_pass | {TOGETHER: _sum(by_pass)} for name, by_pass in every.items()}
    chosen = min(timed, key=lambda name: every[name][TOGETHER]["median"])
    every[CHOSEN] = every[chosen]
    found = []
    for mode in (*PASSES, TOGETHER):
        ms = {name: by_pass[mode] for name, by_pass in every.items()}
        median = {name: times["median"] for name, times in ms.items()}
        best, best_dense = min(timed, key=median.__getitem__), min(DENSE, key=median.__getitem__)
        row = {
            "mode": mode,
            "ms": ms,
            "best": best,
            "best_dense": best_dense,
            "regret": round(median[CHOSEN] / median[best] - 1, 3),
        }
        row |= {"chosen": chosen, "runs": best if median[best] < median[best_dense] else "dense"}
        row |= {
            "speed_up_over_dense": round(median[best_dense] / median[CHOSEN], 3),
            "speed_up_over_masked": round(median[MASKED] / median[CHOSEN], 3),
            "tiles": {
                name: own["tiles"].get(mode) for name, own in sparse.items() if own.get("tiles")
            },
            "l2": {
                name: own["l2"] for name, own in (("dense", dense), *sparse.items()) if "l2" in own
            },
            "sum_of_passes": mode == TOGETHER,
            "refused": {name: own["refused"] for name, own in sparse.items() if "refused" in own},
        }
        found.append(about | row)
    return found


def _sum(by_pass: dict[str, dict[str, float]]) -> dict[str, float]:
    parts = [by_pass[name] for name in PASSES]
    total = {key: round(sum(part[key] for part in parts), 6) for key in ("median", "iqr")}
    return total | {"repetitions": min(part["repetitions"] for part in parts)}
