"""`capture_inputs`: what every convolution and dense layer of a linen model reads."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from blocksparse_jax.channel_pruning.inputs import LayerInput
from blocksparse_jax.linen.conv import BlockSparseConv
from blocksparse_jax.linen.linear import BlockSparseLinear
from blocksparse_jax.pending import PendingActivations, activations


def capture_inputs(
    model: nn.Module, variables: Any, *args: Any, **kwargs: Any
) -> dict[str, LayerInput]:
    """Applies a model and records what its layers read.

    `nn.Conv`, `nn.Dense`, `BlockSparseConv`, `BlockSparseLinear` and their subclasses are recorded,
    but for grouped convolutions. It may be jitted: `LayerInput` is a pytree.

    Args:
      model: a linen module.
      variables: as `model.apply` takes them.
      *args: of the model, e.g. a batch of images.
      **kwargs: likewise, e.g. `train=False`; without `mutable` nothing is updated.

    Returns:
      `{name of the layer's kernel: LayerInput}`, activations in NHWC. A layer that runs more than
      once has the inputs of all its calls, one after the other along the first axis.

    Raises:
      ValueError: what the model raises.

    Example:
      >>> model, x = nn.Conv(8, (3, 3), strides=2), jnp.ones((2, 8, 8, 4))
      >>> variables = model.init(jax.random.key(0), x)
      >>> captured = capture_inputs(model, variables, x)
      >>> captured["kernel"].x.shape, captured["kernel"].strides
      ((2, 8, 8, 4), 2)
    """
    captured: dict[str, LayerInput] = {}

    def record(
        method: Callable[..., Any],
        call_args: Any,
        call_kwargs: Any,
        context: nn.module.InterceptorContext,
    ) -> Any:
        if context.method_name == "__call__" and call_args:
            given = _layer_input(context.module, call_args[0])
            if given is not None:
                name = "/".join((*context.module.path, "kernel"))
                captured[name] = _joined(captured.get(name), given)
        return method(*call_args, **call_kwargs)

    with nn.intercept_methods(record):
        model.apply(variables, *args, **kwargs)
    return captured


def _layer_input(module: nn.Module, x: jax.Array | PendingActivations) -> LayerInput | None:
    """What a layer reads; None for other modules and grouped convolutions."""
    if isinstance(module, nn.Dense | BlockSparseLinear):
        return LayerInput(activations(x))
    if not isinstance(module, nn.Conv | BlockSparseConv) or module.feature_group_count != 1:
        return None
    given = activations(x)
    if getattr(module, "data_format", "NHWC") == "CHWN":
        given = given.transpose(3, 1, 2, 0)
    strides, padding, dilation = map(
        _hashable, (module.strides or 1, module.padding, module.kernel_dilation or 1)
    )
    return LayerInput(given, strides, padding, dilation)


def _hashable(value: Any) -> Any:
    """Sequences as tuples."""
    is_sequence = not isinstance(value, str) and hasattr(value, "__len__")
    return tuple(map(_hashable, value)) if is_sequence else value


def _joined(first: LayerInput | None, second: LayerInput) -> LayerInput:
    """The inputs of two calls of one layer."""
    if first is None:
        return second
    x = jnp.concatenate([first.x, second.x])
    return LayerInput(x, second.strides, second.padding, second.dilation)
