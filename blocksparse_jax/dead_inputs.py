"""Dead inputs: what a dense layer reads from output channels whose kernels are all pruned."""

from collections.abc import Mapping, Sequence

import jax.numpy as jnp
from jaxtyping import Array, Bool

Feeds = Mapping[str, str | Sequence[str]]
Shapes = Mapping[str, tuple[int, ...]]


def checked_feeds(feeds: Feeds | None, shapes: Shapes) -> dict[str, tuple[str, ...]]:
    """The convolutions that each dense layer reads, as tuples of names.

    Args:
      feeds: name of a dense kernel -> name or names of the conv kernels whose sum it reads, through
        a pool or a flattening of NHWC activations.
      shapes: of all sparse leaves, by name.

    Returns:
      Name -> names; {} for None.

    Raises:
      ValueError: a name is no sparse leaf or of another kind, or sizes do not fit.

    Example:
      >>> checked_feeds({"fc": "conv"}, {"fc": (128, 10), "conv": (3, 3, 8, 32)})
      {'fc': ('conv',)}
    """
    by_name = {
        layer: (convs,) if isinstance(convs, str) else tuple(convs)
        for layer, convs in (feeds or {}).items()
    }
    for layer, convs in by_name.items():
        for name in (layer, *convs):
            if name not in shapes:
                raise ValueError(
                    f"feeds: {name!r} is no sparse layer, expected names among {list(shapes)[:8]}; "
                    "choose it with `where`, or leave it out"
                )
        if len(shapes[layer]) != 2 or not convs:
            raise ValueError(
                f"feeds: expected a dense kernel [cin, cout] and the conv kernels that it reads, "
                f"got {layer!r} of shape {shapes[layer]} and {convs}"
            )
        for name in convs:
            if len(shapes[name]) < 4 or shapes[layer][0] % shapes[name][-1]:
                raise ValueError(
                    f"feeds: expected {layer!r} {shapes[layer]} to read the channels of a conv "
                    f"kernel once or several times, got {name!r} {shapes[name]}"
                )
    return by_name


def live_inputs(masks: Mapping[str, Array], convs: Sequence[str], inputs: int) -> Bool[Array, " n"]:
    """Which inputs of a dense layer are not dead.

    Args:
      masks: bool masks of the conv kernels, by name.
      convs: the conv kernels whose sum the layer reads; () where that is not known.
      inputs: of the dense layer: the channels, or positions times channels, channels last.

    Returns:
      True where a kernel slice of the input's channel is kept.

    Example:
      >>> mask = jnp.ones((1, 1, 4, 3), bool).at[..., 1].set(False)
      >>> live_inputs({"conv": mask}, ["conv"], 6).tolist()
      [True, False, True, True, False, True]
    """
    live = jnp.zeros((), bool) if convs else jnp.ones((), bool)
    for name in convs:
        mask = masks[name]
        channels = mask.reshape(-1, mask.shape[-1]).any(0)
        live = live | jnp.tile(channels, inputs // len(channels))
    return jnp.broadcast_to(live, (inputs,))
