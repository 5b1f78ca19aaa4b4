"""What a timed training step needs on a GPU: a kernel for each layer, and proof that the step is
that of the masked execution.

Each convolution of the step is compared with float64 by itself (`check_layer`). The step as a whole
is compared with the masked one by the direction of its updates: in bfloat16 two right steps differ
much, since roundings flip ReLUs and all later layers follow.
"""

import collections
import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.bench import shapes
from experiments.bench.gpu import layers as gpu_layers
from experiments.bench.gpu import shapes as gpu_shapes
from experiments.bench.programs import single_passes
from pallas_kernels.block_sparse_conv import ConvSpec, Implementation, api, apply_epilogue

SKETCH = 128  # numbers that stand for the update of a parameter
LEAST = {
    "float32": 0.97,
    "bfloat16": 0.3,
}  # cosine of the update of each conv kernel and the masked one: 0 of unrelated ones, up to 0.1
LENGTHS = 2.0  # neither is so many times as long as the other


class Fallback:
    """An implementation that serves every layer: the wanted one where it can, else triton, else
    dense; and the record of who served whom.

    Args:
      name: of the wanted implementation.

    Attributes:
      name: what it is called.
      specs: the convolutions that were traced, and who serves them.
      refused: layer -> who serves it instead, and why.

    Example:
      >>> with Fallback("xla").registered() as name:
      ...     choice.available_implementations()[name] is None
      True
    """

    def __init__(self, name: str):
        self.name = f"{name} or what serves"
        self._records = [
            choice.IMPLEMENTATIONS[one] for one in dict.fromkeys((name, "triton", "dense"))
        ]
        self._served: dict[str, str] = {}
        self.specs: dict[ConvSpec, Implementation] = {}
        self.refused: dict[str, str] = {}

    def layers(self) -> dict[str, int]:
        """How many different layers each implementation serves, of those that were traced."""
        return dict(collections.Counter(self._served.values()))

    @contextlib.contextmanager
    def registered(self) -> Iterator[str]:
        """Inside, `implementation=` takes the name that this gives."""
        choice.IMPLEMENTATIONS[self.name] = Implementation(
            self.name,
            lambda spec: None,
            self._forward,
            self._input_gradient,
            self._weight_gradient,
            fused=True,
        )
        try:
            yield self.name
        finally:
            del choice.IMPLEMENTATIONS[self.name]

    def _record(self, spec: ConvSpec) -> Implementation:
        layer = f"{spec.cin}-{spec.cout}@{spec.height} {spec.kernel[0]}x{spec.kernel[1]}/{spec.strides[0]} {spec.packed_shape}"
        reasons = {one.name: one.supports(spec) for one in self._records}
        served = next(one for one in self._records if reasons[one.name] is None)
        self._served[layer] = served.name
        self.specs[dataclasses.replace(spec, gradients=False, relu=False)] = served
        if served is not self._records[0]:
            self.refused[layer] = f"{served.name}: {reasons[self._records[0].name]}"
        return served

    def _forward(self, spec: ConvSpec, *operands: jax.Array | None) -> jax.Array:
        record = self._record(spec)
        if record.fused:
            return record.forward(spec, *operands)
        return apply_epilogue(record.forward(spec, *operands[:5]), *operands[5:], spec.relu)

    def _input_gradient(self, spec: ConvSpec, *operands: jax.Array) -> jax.Array:
        return self._record(spec).input_gradient(spec, *operands)

    def _weight_gradient(self, spec: ConvSpec, *operands: jax.Array) -> jax.Array:
        return self._record(spec).weight_gradient(spec, *operands)


def sketch(before: Any, after: Any, masks: Any) -> dict[str, list[float]]:
    """What a step changed in the kept weights of each conv kernel, in few numbers: projections on
    random signs.

    The norm of a difference of two sketches is that of the updates, up to 1 / sqrt(2 SKETCH) of it.

    Args:
      before, after: parameters in the masked form.
      masks: of the kept weights.

    Returns:
      Path -> numbers.

    Example:
      >>> one = {"a": jnp.ones((1, 1, 4, 8))}
      >>> found = sketch(one, {"a": 3 * one["a"]}, {"a": jnp.asarray(True)})["['a']"]
      >>> bool(0.5 < np.linalg.norm(found) / np.linalg.norm(2 * one["a"]) < 1.5)
      True

    Reference: the distances of Achlioptas, "Database-friendly random projections", JCSS 2003.
    """
    kernels = [leaf for leaf in jax.tree_util.tree_leaves_with_path(before) if leaf[1].ndim == 4]
    changed = jax.tree.map(
        lambda old, new, mask: _project(old, new, mask) if old.ndim == 4 else None,
        before,
        after,
        masks,
    )
    names = [jax.tree_util.keystr(path) for path, _ in kernels]
    return {
        name: [float(f"{n:.6g}") for n in np.asarray(numbers)]
        for name, numbers in zip(names, jax.tree.leaves(changed), strict=True)
    }


@jax.jit
def _project(old: jax.Array, new: jax.Array, mask: jax.Array) -> jax.Array:
    change = jnp.where(mask, new - old, 0).ravel().astype(jnp.float32)
    keys = jax.random.split(jax.random.key(0), SKETCH)
    return (
        jax.lax.map(
            lambda key: jnp.vdot(jax.random.rademacher(key, change.shape, jnp.float32), change),
            keys,
        )
        / SKETCH**0.5
    )


def check_layer(spec: ConvSpec, implementation: Implementation) -> bool:
    """Compares the three passes of a convolution with float64, in parts of their results.

    Args:
      spec: the static sizes.
      implementation: the record.

    Returns:
      True.

    Raises:
      AssertionError: a pass is wrong.
    """
    x, dy, values, *index = gpu_shapes.operands(spec)
    operands = (x, dy, values.astype(jnp.float32), *index)

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

    results = jax.jit(
        lambda *operands: {name: run(*operands) for name, run in single_passes(conv).items()}
    )(*operands)
    gpu_layers.check_slices(spec, gpu_layers.kind_of(spec.dtype), operands, results)
    return True


def agree(
    execution: str,
    found: dict[str, list[float]],
    wanted: dict[str, list[float]] | None,
    precision: str,
) -> float:
    """Compares the first step's updates with the masked execution's, in direction and length.

    Args:
      execution: sparse or packed, and in what kernels.
      found: its sketch.
      wanted: the masked execution's.
      precision: of the activations.

    Returns:
      The least cosine of a conv kernel's updates.

    Raises:
      AssertionError: one is below the limit, or there is nothing to compare with.

    Example:
      >>> agree("packed", {"a": [1.0, 0.0]}, {"a": [1.0, 0.01]}, "float32") > 0.99
      True
    """
    if not wanted:
        raise AssertionError(
            f"{execution}: there is no masked step to compare with; nothing was timed"
        )
    cosines = {}
    for name, numbers in wanted.items():
        lengths = np.linalg.norm(found[name]), np.linalg.norm(numbers)
        alike = max(lengths) <= LENGTHS * min(lengths) and min(lengths) > 0  # never of NaN
        cosines[name] = (
            float(np.dot(found[name], numbers) / (lengths[0] * lengths[1])) if alike else -1.0
        )
    worst = min(cosines, key=cosines.__getitem__)
    if not cosines[worst] >= LEAST[precision]:
        raise AssertionError(
            f"{execution}: the first step changes {worst} otherwise than the masked execution: "
            f"cosine {cosines[worst]:.2f} "
            f"(at least {LEAST[precision]:g}; -1 where the lengths differ); nothing was timed"
        )
    return cosines[worst]
