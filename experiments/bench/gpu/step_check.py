"""Evidence that a training step in the block-sparse kernels is that of the masked execution.

Each convolution of the step is compared with float64 by itself (`check_layer`). The step as a whole
is compared with the masked one by the direction of its updates: in bfloat16 two correct steps
differ much, since roundings flip ReLUs and all later layers follow.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.bench.gpu.check import check_slices
from experiments.bench.gpu.float64 import as_float64, check_error, kind_of
from experiments.bench.gpu.layers import sparse_operands, sparse_passes
from pallas_kernels.block_sparse_conv import ConvSpec, Implementation, norm_passes

SKETCH_SIZE = 128  # numbers that stand for the update of a parameter
# The least cosine between the update of a conv kernel and the masked execution's. That of unrelated
# updates is 0, and in the sketch up to 0.1.
LEAST_COSINE = {"float32": 0.97, "bfloat16": 0.3}
MOST_LENGTH_RATIO = 2.0  # of the longer update to the shorter one

Sketch = dict[str, list[float]]  # path of a conv kernel -> numbers


def sketch(before: Any, after: Any, masks: Any) -> Sketch:
    """Returns what a step changed in the kept weights of each conv kernel, in few numbers.

    The numbers are projections on random signs. The norm of the difference of two sketches is that
    of the updates, up to a fraction 1 / sqrt(2 SKETCH_SIZE) of it.

    Args:
      before, after: parameters in the masked form.
      masks: of the kept weights.

    Returns:
      Numbers by path.

    Example:
      >>> one = {"a": jnp.ones((1, 1, 4, 8))}
      >>> numbers = sketch(one, {"a": 3 * one["a"]}, {"a": jnp.asarray(True)})["['a']"]
      >>> bool(0.5 < np.linalg.norm(numbers) / np.linalg.norm(2 * one["a"]) < 1.5)
      True

    Reference: the distances of Achlioptas, "Database-friendly random projections", JCSS 2003.
    """
    projections = jax.tree.map(
        lambda old, new, mask: _project(old, new, mask) if old.ndim == 4 else None,
        before,
        after,
        masks,
    )
    paths = [
        jax.tree_util.keystr(path)
        for path, leaf in jax.tree_util.tree_leaves_with_path(before)
        if leaf.ndim == 4
    ]
    return {
        path: [float(f"{number:.6g}") for number in np.asarray(projection)]
        for path, projection in zip(paths, jax.tree.leaves(projections), strict=True)
    }


@jax.jit
def _project(old: jax.Array, new: jax.Array, mask: jax.Array) -> jax.Array:
    change = jnp.where(mask, new - old, 0).ravel().astype(jnp.float32)

    def projection(key: jax.Array) -> jax.Array:
        return jnp.vdot(jax.random.rademacher(key, change.shape, jnp.float32), change)

    keys = jax.random.split(jax.random.key(0), SKETCH_SIZE)
    return jax.lax.map(projection, keys) / SKETCH_SIZE**0.5


def check_layer(spec: ConvSpec, implementation: Implementation) -> bool:
    """Compares the three passes of a convolution with float64, in parts of their results.

    Those between batch norms are then compared with these and XLA's operations.

    Args:
      spec: the static sizes.
      implementation: the record.

    Returns:
      True.

    Raises:
      AssertionError: a pass is wrong.
    """
    operands = sparse_operands(spec)
    passes = sparse_passes(spec, implementation)
    run_all = jax.jit(lambda *operands: {name: run(*operands) for name, run in passes.items()})
    check_slices(spec, kind_of(spec.dtype), operands, run_all(*operands))
    if implementation.fuses_norms:
        _check_norm_passes(spec, implementation, operands)
    return True


def _check_norm_passes(
    spec: ConvSpec, implementation: Implementation, operands: tuple[jax.Array, ...]
) -> None:
    """AssertionError unless the fused passes are the plain ones and the formulas of batch norm."""
    x, dy, values, *index = operands
    spec = dataclasses.replace(spec, relu=True)
    keys = jax.random.split(jax.random.key(2), 4)
    z, more = (jax.random.normal(key, spec.in_shape, spec.dtype) for key in keys[:2])
    scale, shift = (jax.random.normal(key, (spec.cin,)) for key in keys[2:])
    norm = (z, scale, shift, jnp.maximum(z + more, 0), more)

    @jax.jit
    def fused(*operands: jax.Array) -> tuple[jax.Array, ...]:
        x, dy, values, *index = operands
        forward = implementation.run("forward_with_sums", spec, x, values, *index)
        return *forward, *implementation.run("norm_input_gradient", spec, dy, values, *index, *norm)

    @jax.jit
    def plain(*operands: jax.Array) -> tuple[jax.Array, ...]:
        x, dy, values, *index = operands
        forward = norm_passes.forward_with_sums(implementation.forward, spec, x, values, *index)
        return *forward, *norm_passes.norm_input_gradient(
            implementation.input_gradient, spec, dy, values, *index, *norm
        )

    arrays = (x, dy, values.astype(spec.dtype), *index)
    names = ("forward", "sums", "input gradient", "sums of the input gradient", "shortcut gradient")
    for name, result, expected in zip(names, fused(*arrays), plain(*arrays), strict=True):
        exact = as_float64(expected)
        check_error(name, as_float64(result), exact, kind_of(spec.dtype), spec)


def check_updates(
    execution: str, updates: Sketch, masked_updates: Sketch | None, precision: str
) -> float:
    """Compares the first step's updates with the masked execution's, in direction and length.

    Args:
      execution: sparse or packed, and in which kernels; for the message.
      updates: their sketch.
      masked_updates: the sketch of the masked execution's updates.
      precision: of the activations.

    Returns:
      The least cosine of a conv kernel's updates.

    Raises:
      AssertionError: it is below the limit, or there is nothing to compare with.

    Example:
      >>> check_updates("packed", {"a": [1.0, 0.0]}, {"a": [1.0, 0.01]}, "float32") > 0.99
      True
    """
    if not masked_updates:
        raise AssertionError(
            f"{execution}: there is no masked step to compare with; nothing was timed"
        )
    cosines = {name: _cosine(updates[name], masked) for name, masked in masked_updates.items()}
    worst = min(cosines, key=cosines.__getitem__)
    if not cosines[worst] >= LEAST_COSINE[precision]:
        raise AssertionError(
            f"{execution}: the first step changes {worst} otherwise than the masked execution: "
            f"cosine {cosines[worst]:.2f} (expected at least {LEAST_COSINE[precision]:g}; -1 means "
            "that the lengths differ); nothing was timed"
        )
    return cosines[worst]


def _cosine(update: list[float], masked_update: list[float]) -> float:
    """The cosine of two updates; -1 if their lengths differ much, or if one of them is NaN."""
    lengths = np.linalg.norm(update), np.linalg.norm(masked_update)
    alike = max(lengths) <= MOST_LENGTH_RATIO * min(lengths) and min(lengths) > 0
    if not alike:
        return -1.0
    return float(np.dot(update, masked_update) / (lengths[0] * lengths[1]))
