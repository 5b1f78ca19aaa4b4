"""Times the layers of a training run: as they are, with the run's own masks, and dense.

Each layer makes a forward pass and both gradients, at the run's batch size and precision. The dense
time is that of the faster format, NHWC or CHWN.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

import blocksparse_jax as bsj
from blocksparse_jax import tree
from blocksparse_jax.linen import BlockSparseConv
from experiments.bench.dense_forms import axes
from experiments.bench.programs import training_programs
from experiments.measuring.timing import median_iqr, time_in_turn, timed
from experiments.training.execution import State, layouts_of, masks_of, to_form, widths_of
from experiments.training.loop import Trainer

ROUNDS = 7
MODE = "forward + gradients"
FORMATS = ("NHWC", "CHWN")
TOLERANCES = {"float32": 1e-4, "bfloat16": 3e-2}  # relative to the largest value


class Place(NamedTuple):
    """Where a convolution stands in its network.

    Attributes:
      shape: of its input, NHWC.
      settings: strides and padding, as `bsj.conv` takes them.
    """

    shape: tuple[int, ...]
    settings: dict[str, Any]


class Times(NamedTuple):
    """Median and interquartile range in milliseconds.

    Attributes:
      dense_ms: of the dense layer.
      sparse_ms: of the layer with its mask.
    """

    dense_ms: tuple[float, float]
    sparse_ms: tuple[float, float]


def measure(
    trainer: Trainer, state: State, image_shape: tuple[int, ...], *, rounds: int = ROUNDS
) -> dict[str, Times]:
    """Times every convolution that has a mask.

    Args:
      trainer: of the run.
      state: in any form.
      image_shape: (height, width, channels).
      rounds: repetitions of each time.

    Returns:
      Name of the kernel -> its times, in the order of the network.

    Raises:
      AssertionError: the results of a block-sparse and a masked layer differ; nothing was timed.
    """
    kernels = _named(to_form("masked", state).params)
    masks, layouts = _named(masks_of(state)), trainer.planned(layouts_of(state) or {})
    layouts = _named(layouts, is_leaf=bsj.is_layout)
    times = {}
    for name, place in places(trainer, state, image_shape).items():
        if jnp.ndim(masks[name]):
            layout = layouts.get(name, bsj.Dense())
            calls = _calls(trainer, place, kernels[name], masks[name], layout)
            times[name] = _times(time_in_turn(calls, rounds=rounds))
    return times


def places(trainer: Trainer, state: State, image_shape: tuple[int, ...]) -> dict[str, Place]:
    """Finds the convolutions of a network, which is traced and not run.

    Args:
      trainer: of the run.
      state: in any form.
      image_shape: (height, width, channels).

    Returns:
      Name of the kernel -> its place.
    """
    found: dict[str, Place] = {}
    dense = to_form("masked", state)
    variables = {"params": dense.params, "batch_stats": dense.batch_stats}
    model = trainer.network.model("masked", widths=widths_of(state))

    def record(call: Callable[..., Any], args: Any, kwargs: Any, context: Any) -> Any:
        """Calls a module's method and notes the place of a convolution."""
        module = context.module
        if context.method_name == "__call__" and isinstance(module, BlockSparseConv):
            order = axes(module.data_format, "NHWC")
            shape = tuple(args[0].shape[axis] for axis in order)
            settings = {"strides": module.strides, "padding": module.padding}
            found["/".join((*module.path, "kernel"))] = Place(shape, settings)
        return call(*args, **kwargs)

    with nn.intercept_methods(record):
        jax.eval_shape(
            lambda v, x: model.apply(v, x, train=False),
            variables,
            jnp.zeros((trainer.config.batch_size, *image_shape), jnp.float32),
        )
    return found


def _calls(
    trainer: Trainer, place: Place, kernel: jax.Array, mask: jax.Array, layout: Any
) -> dict[tuple[str, str], Callable[[], float]]:
    """(dense or sparse, format) -> a call that returns the milliseconds that it took."""
    dtype = jnp.dtype(trainer.config.precision)
    images = jnp.asarray(np.random.default_rng(0).standard_normal(place.shape), dtype)

    def dense(data_format: str, x: jax.Array, weights: jax.Array) -> jax.Array:
        return bsj.conv(x, weights, bsj.Dense(), data_format=data_format, **place.settings)

    def masked(data_format: str, x: jax.Array, weights: jax.Array, mask: jax.Array) -> jax.Array:
        return dense(data_format, x, jnp.where(mask, weights, 0))

    def packed(data_format: str, x: jax.Array, weights: jax.Array, layout: Any) -> jax.Array:
        implementation = trainer.config.implementation
        return bsj.conv(
            x,
            weights,
            layout,
            packed=True,
            data_format=data_format,
            implementation=implementation,
            **place.settings,
        )

    def program(conv: Callable[..., jax.Array], data_format: str, *weights: Any) -> Any:
        """The program of a convolution with its operands."""
        conv = functools.partial(conv, data_format)
        x = images.transpose(axes("NHWC", data_format))
        out = jax.eval_shape(conv, x, *weights)
        first, *rest = weights
        operands = x, first, jnp.ones(out.shape, out.dtype), *rest
        return functools.partial(training_programs(conv)[MODE], *operands)

    programs = {("dense", form): program(dense, form, kernel) for form in FORMATS}
    plain = {("sparse", form): program(masked, form, kernel, mask) for form in FORMATS}
    if isinstance(layout, bsj.BlockLayout):
        block_sparse = program(packed, "CHWN", bsj.pack(kernel, layout), layout)
        _check(block_sparse()[0], plain["sparse", "CHWN"]()[0], kernel.shape)
        programs["sparse", "CHWN"] = block_sparse
    else:
        programs |= plain
    return {name: timed(run) for name, run in programs.items()}


def _check(result: jax.Array, expected: jax.Array, shape: tuple[int, ...]) -> None:
    """Compares a block-sparse output with the masked one; nothing wrong is timed."""
    tolerance = TOLERANCES[result.dtype.name]
    result, expected = (np.asarray(array, np.float32) for array in (result, expected))
    error = np.abs(result - expected).max() / max(np.abs(expected).max(), 1e-30)
    if not error <= tolerance:
        raise AssertionError(
            f"a block-sparse layer of shape {shape} differs from the masked one by {error:.1e} of "
            "its largest value"
        )


def _times(times_ms: dict[tuple[str, str], list[float]]) -> Times:
    """The faster format of each."""
    records = {name: median_iqr(times) for name, times in times_ms.items()}
    dense, sparse = (
        min(record for (kind, _), record in records.items() if kind == wanted)
        for wanted in ("dense", "sparse")
    )
    return Times(dense, sparse)


def _named(leaves: Any, is_leaf: Any = None) -> dict[str, Any]:
    paths = jax.tree.leaves_with_path(leaves, is_leaf=is_leaf)
    return {tree.path_name(path): leaf for path, leaf in paths}
