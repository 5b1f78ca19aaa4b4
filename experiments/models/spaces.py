"""The channel spaces of the zoo.

A channel space is the set of all axes, of parameters and of batch statistics, that index the same
channels. Reordering channels must reorder all axes of a space alike.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import jax.numpy as jnp

import blocksparse_jax as bsj

Entries = list[tuple[str, int]]


def channel_spaces(params: Mapping[str, Any]) -> dict[str, Entries]:
    """Derives the channel spaces of a network from the names of its parameters.

    VGG-19 and the CNN are chains, with a space after every convolution. A ResNet has a space for
    every residual stream, named after the stem or the stage whose `downsample` begins it, and a
    space after every inner convolution of a block. In MobileNet a depthwise convolution and its
    input share a space. The channels of images and logits belong to no space.

    Args:
      params: parameters of a network that `experiments.models.create` made, values or shapes.

    Returns:
      `{space: [(leaf name, axis), ...]}`, as `blocksparse_jax.fold_channel_orders` takes it. The
      statistics of batch norms are included.

    Raises:
      ValueError: the names are not those of a network of the zoo.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from experiments.models import create
      >>> init = create("cnn", num_classes=10).init
      >>> variables = jax.eval_shape(init, jax.random.key(0), jnp.ones((1, 8, 8, 1)))
      >>> channel_spaces(variables["params"])["conv3"][-1]
      ('classifier/kernel', 0)
    """
    if "stem" not in params or "classifier" not in params:
        raise ValueError(
            f"params: expected those of a network of the zoo, got {list(params)[:8]}; list the "
            f"spaces of other networks yourself"
        )
    if "stage1_block1" in params:
        return _resnet(params)
    if "block1_depthwise" in params:
        return _chain(_numbered(params, "block{}_pointwise"), depthwise=True)
    if "stage1_conv2" in params:
        convs = []
        for stage in range(1, len(params)):
            convs += _numbered(params, f"stage{stage}_conv{{}}")
        return _chain(convs)
    return _chain(_numbered(params, "conv{}"))


def branches(params: Mapping[str, Any]) -> dict[str, list[str]]:
    """The residual branches of a network: what a shortcut leads around.

    A branch goes where its spaces lose all channels (`blocksparse_jax.remove_channels` with them as
    `vanishing`): its block is the shortcut then, and a ReLU.

    Args:
      params: as for `channel_spaces`.

    Returns:
      `{block: the channel spaces inside of its branch}`; {} for a network without shortcuts.
    """
    blocks = [name for name in params if "conv2" in params[name]]
    return {
        block: [f"{block}/{conv}" for conv in _numbered(params[block], "conv{}")[:-1]]
        for block in blocks
    }


def inner_spaces(params: Mapping[str, Any]) -> list[str]:
    """The channel spaces inside of residual branches, which may lose all channels."""
    return [space for inner in branches(params).values() for space in inner]


def in_branch(name: str, leaf: Any = None) -> bool:
    """Whether a leaf is a kernel of a residual branch, by its name: the shortcut is not.

    Example:
      >>> in_branch("stage1_block2/conv1/kernel"), in_branch("stage1_block2/downsample/kernel")
      (True, False)
    """
    _, _, inner = name.partition("/")
    return "_block" in name and inner.startswith("conv") and inner.endswith("/kernel")


def with_branch_factors(params: Mapping[str, Any]) -> dict[str, Any]:
    """Puts a `factor` of 1 into each residual block, which scales what its branch adds."""
    return {
        name: dict(node) | ({"factor": jnp.ones(())} if name in branches(params) else {})
        for name, node in params.items()
    }


def with_channel_orders(
    params: Mapping[str, Any], batch_stats: Mapping[str, Any], sparsity: float, **options: Any
) -> tuple[Any, Any]:
    """Reorders the channels of a network so that similar channels lie side by side.

    The network computes the same function as before.

    Args:
      params: parameters of a network that `experiments.models.create` made.
      batch_stats: its batch statistics.
      sparsity: as in `blocksparse_jax.hrbp_prune`.
      **options: further options of `blocksparse_jax.channel_orders`, such as `channel_block`.

    Returns:
      The reordered parameters and statistics.

    Raises:
      ValueError: the names are not those of a network of the zoo, or `hrbp_prune` would refuse a
        size.
    """
    spaces = channel_spaces(params)
    orders = bsj.channel_orders(params, spaces, sparsity, **options)
    return bsj.fold_channel_orders(spaces, orders, params, batch_stats)


def _numbered(params: Mapping[str, Any], pattern: str) -> list[str]:
    """The names of existing layers that fit a pattern such as `"conv{}"`, by ascending number."""
    return [name for i in range(len(params)) if (name := pattern.format(i)) in params]


def _conv_outputs(conv: str, norm: str) -> Entries:
    """The axes that index the output channels of a convolution and of the norm that follows it."""
    norm_leaves = ("scale", "bias", "mean", "var")
    return [(f"{conv}/kernel", 3), *((f"{norm}/{leaf}", 0) for leaf in norm_leaves)]


def _chain(names: Iterable[str], depthwise: bool = False) -> dict[str, Entries]:
    """The spaces of convolutions in sequence: one after the stem and one after every convolution.

    With `depthwise`, a depthwise convolution precedes each convolution and shares the space of its
    input.
    """
    spaces = {"stem": _conv_outputs("stem", "stem_norm")}
    last = "stem"
    for name in names:
        if depthwise:
            front = name.replace("pointwise", "depthwise")
            spaces[last] += _conv_outputs(front, f"{front}_norm")
        spaces[last].append((f"{name}/kernel", 2))
        spaces[name] = _conv_outputs(name, f"{name}_norm")
        last = name
    spaces[last].append(("classifier/kernel", 0))
    return spaces


def _resnet(params: Mapping[str, Any]) -> dict[str, Entries]:
    """The spaces of a ResNet: one for each residual stream and each inner convolution."""
    spaces = {"stem": _conv_outputs("stem", "stem_norm")}
    stream = "stem"
    for stage in range(1, len(params)):
        for block in _numbered(params, f"stage{stage}_block{{}}"):
            convs = _numbered(params[block], "conv{}")
            inner = [f"{block}/{conv}" for conv in convs[:-1]]
            spaces[stream].append((f"{block}/{convs[0]}/kernel", 2))
            for space, following in zip(inner, convs[1:]):
                number = space.removeprefix(f"{block}/conv")
                spaces[space] = _conv_outputs(space, f"{block}/norm{number}")
                spaces[space].append((f"{block}/{following}/kernel", 2))
            if "downsample" in params[block]:
                spaces[stream].append((f"{block}/downsample/kernel", 2))
                stream = f"stage{stage}"
                spaces[stream] = _conv_outputs(f"{block}/downsample", f"{block}/downsample_norm")
            spaces[stream] += _conv_outputs(f"{block}/{convs[-1]}", f"{block}/norm{len(convs)}")
    spaces[stream].append(("classifier/kernel", 0))
    return spaces
