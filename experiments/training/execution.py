"""The three forms of a training state, and the exact way from one to another.

masked: dense conv on masked weights. sparse: block-sparse conv, dense parameters. packed:
block-sparse conv, packed parameters and optimizer state.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import blocksparse_jax as bsj
from blocksparse_jax import tree
from blocksparse_jax.state import is_sparse_state
from blocksparse_jax.summary import Summary
from experiments import models
from experiments.models.spaces import channel_spaces, inner_spaces
from experiments.training import network_size


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class State:
    """What training changes.

    Attributes:
      params: dense kernels HWIO, or packed values in the packed form.
      batch_stats: BatchNorm statistics.
      opt_state: the optimizer's, with the masks.
      layouts: a layout for each parameter; {} in the masked form.
      form: masked, sparse or packed (static).
      aside: what the method's operations keep for later, e.g. the weights to rewind to; () without.
    """

    params: Any
    batch_stats: Any
    opt_state: Any
    layouts: Any
    form: str = dataclasses.field(metadata={"static": True})
    aside: Any = ()


def to_form(form: str, state: State) -> State:
    """Converts a state to a form, exactly.

    Args:
      form: masked, sparse or packed.
      state: in any form.

    Returns:
      The same training state in that form.
    """
    params, opt_state = state.params, state.opt_state
    if state.form == "packed":
        params, opt_state = _unpack(params, opt_state, state.layouts)
    if form == "masked":
        return State(params, state.batch_stats, opt_state, {}, form, state.aside)
    layouts = copied(bsj.get_layouts(opt_state))  # the step donates the state, not the layouts
    if form == "packed":
        params, opt_state = _pack(params, opt_state, layouts)
    return State(params, state.batch_stats, opt_state, layouts, form, state.aside)


def checkpoint_like(
    form: str, state: State, channels: Mapping[str, int] | None = None
) -> tuple[State, Any, Any]:
    """What a checkpoint holds: the state, the last epoch's masks and the weights ever active.

    Args:
      form: that the state was saved in.
      state: of the same run, in any form.
      channels: `channels_of` the saved state, since layouts know the shape of their kernel; None
        where none were removed.
    """
    masks = masks_of(state)
    if channels is not None and channels != (before := channels_of(state)):
        state = to_form("masked", state)
        kept = {space: np.arange(n) < channels[space] for space, n in before.items()}
        state = without_channels(state, kept)
    return to_form(form, state), masks, masks


def channels_of(state: State) -> dict[str, int]:
    """The number of channels in each space of a state's network.

    Args:
      state: in any form.
    """
    params = dense_shapes(state)
    leaves = jax.tree.leaves_with_path(params)
    shapes = {tree.path_name(path): leaf.shape for path, leaf in leaves}
    firsts = {space: entries[0] for space, entries in channel_spaces(params).items()}
    return {space: shapes[name][axis] for space, (name, axis) in firsts.items()}


def without_channels(state: State, kept: Mapping[str, np.ndarray]) -> State:
    """A smaller network; the same state where all channels stay.

    Args:
      state: in the masked form.
      kept: `{space: bool vector}`, True = stays; the spaces of a residual branch may keep none, and
        those that have lost all are left as they are.
    """
    kept = {space: keeps for space, keeps in kept.items() if not keeps.all()}
    if not kept:
        return state
    params, batch_stats, opt_state = bsj.remove_channels(
        channel_spaces(state.params),
        kept,
        *(state.params, state.batch_stats, state.opt_state),
        vanishing=inner_spaces(state.params),
    )
    return dataclasses.replace(state, params=params, batch_stats=batch_stats, opt_state=opt_state)


def masks_of(state: State) -> Any:
    """The masks of a state in any form.

    Args:
      state: in any form.

    Returns:
      A tree of bool arrays in the dense parameters' shapes, the scalar True where dense; it
      outlives the state.
    """
    if is_dense(state):
        return jax.tree.map(lambda leaf: jnp.asarray(True), state.params)
    if state.form != "packed":
        return copied(bsj.get_masks(state.opt_state))

    def mask(layout: Any) -> jax.Array:
        sparse = isinstance(layout, bsj.BlockLayout)
        return bsj.layout_to_mask(layout) if sparse else jnp.asarray(True)

    return jax.tree.map(mask, state.layouts, is_leaf=bsj.is_layout)


def with_masks(masks: list[Any], state: State) -> State:
    """A state with other masks, to be tested.

    Args:
      masks: of each sparse method in it; [] leaves it as it is.
      state: masked or sparse.

    Returns:
      A state in the same form.
    """
    if not masks:
        return state
    remaining = iter(masks)
    opt_state = jax.tree.map(
        lambda node: node._replace(masks=next(remaining)) if is_sparse_state(node) else node,
        state.opt_state,
        is_leaf=is_sparse_state,
    )
    return to_form(state.form, dataclasses.replace(state, opt_state=opt_state, form="masked"))


def layouts_of(state: State) -> Any:
    """The layouts of a state in any form.

    Args:
      state: in any form.

    Returns:
      A tree of layouts; {} when training dense.
    """
    return state.layouts if is_dense(state) or state.layouts else bsj.get_layouts(state.opt_state)


def summary_of(state: State, method: str, original: Any) -> Summary | None:
    """What is kept in each layer.

    Args:
      state: in any form.
      method: its name in the registry, which the summary shows.
      original: shapes of the parameters that training began with; of a smaller network the summary
        shows no target, which counts the channels that were removed.

    Returns:
      A table to print; None when training dense.
    """
    if is_dense(state):
        return None
    dense = to_form("masked", state)
    summary = bsj.summarize(dense.params, dense.opt_state)
    if network_size.parameters(dense.params) < network_size.parameters(original):
        summary = dataclasses.replace(summary, target_densities=(1.0,))
    return dataclasses.replace(summary, method=method)


def dense_shapes(state: State) -> Any:
    """The shapes of the dense parameters of a state in any form.

    Args:
      state: in any form.

    Returns:
      A tree of `jax.ShapeDtypeStruct`.
    """
    if state.form != "packed":
        return jax.eval_shape(lambda: state.params)

    def shape(layout: Any, leaf: Any) -> jax.ShapeDtypeStruct:
        sparse = isinstance(layout, bsj.BlockLayout)
        return jax.ShapeDtypeStruct(layout.shape if sparse else leaf.shape, leaf.dtype)

    return jax.tree.map(shape, state.layouts, state.params, is_leaf=bsj.is_layout)


def widths_of(state: State) -> dict[str, int]:
    """The output channels of each convolution, fewer where a method removed some.

    Args:
      state: in any form.

    Returns:
      Path of the convolution -> channels, for `Network.model`.
    """
    return models.widths_of(dense_shapes(state))


def is_dense(state: State) -> bool:
    """Whether no method masks the network's weights."""
    nodes = jax.tree.leaves(state.opt_state, is_leaf=is_sparse_state)
    return not any(is_sparse_state(node) for node in nodes)


def copied(tree: Any) -> Any:
    """The same tree in buffers of its own, since steps donate theirs."""
    return jax.tree.map(lambda leaf: leaf.copy(), tree)


@jax.jit
def _pack(params: Any, opt_state: Any, layouts: Any) -> tuple[Any, Any]:
    # drops the pruned weights of soft SUBP too: they play no part once its pattern is final
    return bsj.pack_tree(params, opt_state, layouts, drop_pruned=True)


@jax.jit
def _unpack(values: Any, opt_state: Any, layouts: Any) -> tuple[Any, Any]:
    return bsj.unpack_tree(values, opt_state, layouts)
