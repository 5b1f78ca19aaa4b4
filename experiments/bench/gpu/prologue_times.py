"""Times what a norm costs in front of a convolution: in a pass of its own, or while x is loaded."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from experiments.bench.gpu import clock, shapes
from experiments.bench.gpu.estimate import least_milliseconds
from experiments.bench.gpu.tile_times import PROGRAM_MS, TOLERANCES
from pallas_kernels import batch_norm
from pallas_kernels.batch_norm import Affine, NormSpec
from pallas_kernels.block_sparse_conv import ConvSpec, Implementation, tuned_tables
from pallas_kernels.devices import this_gpu


def measure_prologue(
    implementation: Implementation, spec: ConvSpec, *, threads: int, repetitions: int
) -> dict[str, Any]:
    """Times the passes that read a normalised input: the forward pass and the weight gradient.

    Args:
      implementation: one that can normalise while it loads.
      spec: the static sizes.
      threads: how many programs compile at once.
      repetitions: of each program.

    Returns:
      The table's key; milliseconds with a prologue and without, where a pass stores the normalised
      input; and how far the results differ, relative to their norms.

    Raises:
      RuntimeError: the results differ by more than rounding.
    """
    spec = dataclasses.replace(spec, relu=True, gradients=True)
    sets = clock.rotate(functools.partial(_operands, spec))
    count = clock.rounds(3 * least_milliseconds(spec), sets, PROGRAM_MS if this_gpu() else None)
    functions = {
        "with": functools.partial(normalise_while_loading, implementation, spec),
        "without": functools.partial(normalise_before, implementation, spec),
    }
    programs = clock.build(functions, sets, count, threads)
    results = (programs[name].output() for name in functions)
    error = max(jax.tree.leaves(jax.tree.map(_difference, *results)))
    if error > TOLERANCES[spec.dtype]:
        raise RuntimeError(f"with a prologue the results differ by {error:.1e}")
    times = clock.sample(programs, repetitions)
    medians = {name: times[name]["median"] for name in functions}
    key = tuned_tables.layer_key(spec)
    return {"key": key, **medians, "error": error, **sets.describe()}


def normalise_while_loading(
    implementation: Implementation,
    spec: ConvSpec,
    z: jax.Array,
    dy: jax.Array,
    values: jax.Array,
    scale: jax.Array,
    shift: jax.Array,
    *index: jax.Array,
) -> tuple[jax.Array, ...]:
    """The output, its sums and the weight gradient, from a raw input.

    Args:
      implementation: one that can normalise while it loads.
      spec: the static sizes.
      z: the raw input.
      dy, values: of the convolution.
      scale, shift: of the norm.
      *index: of the convolution.

    Returns:
      Three arrays.
    """
    assert implementation.forward_with_sums is not None
    y, sums = implementation.forward_with_sums(spec, z, values, *index, scale, shift)
    return y, sums, implementation.weight_gradient(spec, z, dy, *index, scale, shift)


def normalise_before(
    implementation: Implementation,
    spec: ConvSpec,
    z: jax.Array,
    dy: jax.Array,
    values: jax.Array,
    scale: jax.Array,
    shift: jax.Array,
    *index: jax.Array,
) -> tuple[jax.Array, ...]:
    """The same from a normalised input that is stored.

    Args:
      implementation: any that sums its output.
      spec, z, dy, values, scale, shift, index: as in `normalise_while_loading`.

    Returns:
      Three arrays.
    """
    assert implementation.forward_with_sums is not None
    x = batch_norm.apply(NormSpec(spec.relu), Affine(scale, shift), z, None)
    x = lax.optimization_barrier(x)
    y, sums = implementation.forward_with_sums(spec, x, values, *index)
    return y, sums, implementation.weight_gradient(spec, x, dy, *index)


def _difference(result: jax.Array, expected: jax.Array) -> float:
    wide, exact = result.astype(jnp.float32).ravel(), expected.astype(jnp.float32).ravel()
    return float(jnp.linalg.norm(wide - exact) / jnp.linalg.norm(exact))


def _operands(spec: ConvSpec, seed: int) -> tuple[jax.Array, ...]:
    z, dy, values, *index = shapes.operands(spec, seed)
    keys = jax.random.split(jax.random.key(seed), 2)
    scale = jax.random.uniform(keys[0], (spec.cin,), minval=0.5, maxval=1.5)
    return z, dy, values, scale, jax.random.normal(keys[1], (spec.cin,)), *index
