"""The channel spaces of the zoo: which axes of which parameters and batch statistics count the same
channels.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import blocksparse_jax as bsj

Entries = list[tuple[str, int]]


def channel_spaces(params: Mapping[str, Any]) -> dict[str, Entries]:
    """The channel spaces of a network of the zoo, read off the names of its parameters; images and
    logits are in none.

    VGG-19 and the CNN are chains: a space behind every conv. A ResNet has a space for every
    residual stream, named after the stem or the stage that begins it with a `downsample`, and one
    behind every conv inside a block. In MobileNet a depthwise conv and what it reads are one space.

    Args:
      params: of a network made by `experiments.models.create`, values or shapes.

    Returns:
      `{space: [(leaf name, axis), ...]}` as `blocksparse_jax.fold_channel_orders` takes it; the
      statistics of the batch norms are named too.

    Raises:
      ValueError: the names are not those of a network of the zoo.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from experiments.models import create
      >>> variables = jax.eval_shape(create("cnn", num_classes=10).init, jax.random.key(0), jnp.ones((1, 8, 8, 1)))
      >>> channel_spaces(variables["params"])["conv3"][-1]
      ('classifier/kernel', 0)
    """
    if "stem" not in params or "classifier" not in params:
        raise ValueError(
            f"params: expected those of a network of the zoo, got {list(params)[:8]}; write the "
            f"spaces down by hand"
        )
    if "stage1_block1" in params:
        return _resnet(params)
    if "block1_depthwise" in params:
        return _chain(_numbered(params, "block{}_pointwise"), depthwise=True)
    if "stage1_conv2" in params:
        return _chain(
            [
                name
                for stage in range(1, len(params))
                for name in _numbered(params, f"stage{stage}_conv{{}}")
            ]
        )
    return _chain(_numbered(params, "conv{}"))


def with_channel_orders(
    params: Mapping[str, Any], batch_stats: Mapping[str, Any], sparsity: float, **options: Any
) -> tuple[Any, Any]:
    """The same network of the zoo with similar channels side by side.

    Args:
      params: of a network made by `experiments.models.create`.
      batch_stats: its statistics.
      sparsity: as for `hrbp_prune`.
      **options: as for `blocksparse_jax.channel_orders`; `channel_block` is one.

    Returns:
      The params and the statistics, reordered.

    Raises:
      ValueError: the names are not those of a network of the zoo, or a size that `hrbp_prune`
        refuses.
    """
    spaces = channel_spaces(params)
    return bsj.fold_channel_orders(
        spaces, bsj.channel_orders(params, spaces, sparsity, **options), params, batch_stats
    )


def _numbered(params: Mapping[str, Any], pattern: str) -> list[str]:
    """The layers of that name with a number in it, in their order."""
    return [name for i in range(len(params)) if (name := pattern.format(i)) in params]


def _made(conv: str, norm: str) -> Entries:
    """What makes the channels: a conv's filters and the norm behind it."""
    return [
        (f"{conv}/kernel", 3),
        *((f"{norm}/{leaf}", 0) for leaf in ("scale", "bias", "mean", "var")),
    ]


def _chain(names: Iterable[str], depthwise: bool = False) -> dict[str, Entries]:
    """A space behind the stem and behind every conv; a depthwise conv in front of a conv belongs to
    the space that it reads.
    """
    last, spaces = "stem", {"stem": _made("stem", "stem_norm")}
    for name in names:
        if depthwise:
            front = name.replace("pointwise", "depthwise")
            spaces[last] += _made(front, f"{front}_norm")
        spaces[last].append((f"{name}/kernel", 2))
        spaces[name] = _made(name, f"{name}_norm")
        last = name
    spaces[last].append(("classifier/kernel", 0))
    return spaces


def _resnet(params: Mapping[str, Any]) -> dict[str, Entries]:
    stream, spaces = "stem", {"stem": _made("stem", "stem_norm")}
    for stage in range(1, len(params)):
        for block in _numbered(params, f"stage{stage}_block{{}}"):
            convs = _numbered(params[block], "conv{}")
            inner = [f"{block}/{conv}" for conv in convs[:-1]]
            spaces[stream].append((f"{block}/{convs[0]}/kernel", 2))
            for space, following in zip(inner, convs[1:]):
                number = space.removeprefix(f"{block}/conv")
                spaces[space] = [
                    *_made(space, f"{block}/norm{number}"),
                    (f"{block}/{following}/kernel", 2),
                ]
            if "downsample" in params[block]:
                spaces[stream].append((f"{block}/downsample/kernel", 2))
                stream = f"stage{stage}"
                spaces[stream] = _made(f"{block}/downsample", f"{block}/downsample_norm")
            spaces[stream] += _made(f"{block}/{convs[-1]}", f"{block}/norm{len(convs)}")
    spaces[stream].append(("classifier/kernel", 0))
    return spaces
