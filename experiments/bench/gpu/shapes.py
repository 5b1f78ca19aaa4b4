"""The convolutions that are tuned and timed on a GPU: real layers at real batch sizes.

Channels come in aligned runs.
"""

import dataclasses

import jax
import jax.numpy as jnp

from experiments.bench import shapes
from experiments.bench.shapes import RESNET32, RESNET50, VGG19, Layer
from pallas_kernels.block_sparse_conv import ConvSpec

# By how much rounding up to runs of channels may change the number of kept channels.
FULLEST, EMPTIEST = 1.25, 0.95
ROUNDING = 1e-9  # of floats such as 1 - 0.9: a bound that is met exactly is met

SMALL = (Layer("small 64@4", 64, 64, 4), Layer("small 1x1 64-128@4/2", 64, 128, 4, 2, 1))


@dataclasses.dataclass(frozen=True)
class Case:
    """A layer at a batch size; `name` is unique.

    Attributes:
      layer: the layer.
      batch: images.
    """

    layer: Layer
    batch: int

    @property
    def name(self) -> str:
        """The layer and the batch size."""
        return f"{self.layer.name} n{self.batch}"

    @property
    def is_goal(self) -> bool:
        """Whether a goal of the project names it: a 3x3 convolution of 256 channels or more."""
        return self.layer.kernel == 3 and self.layer.cin >= 256


def cases(part: str = "", quick: bool = False) -> list[Case]:
    """Returns the layers of ResNet-50 at batch 256, and of VGG-19 and ResNet-32 at 128 and 1024.

    Args:
      part: of the names; empty for all.
      quick: two small layers instead.

    Returns:
      The cases in the order in which they are measured: those of the goals, other 3x3, 1x1.

    Raises:
      ValueError: no name contains the part.

    Example:
      >>> [case.name for case in cases("vgg19 512@2")]
      ['vgg19 512@2 n128', 'vgg19 512@2 n1024']
    """
    if quick:
        every = [Case(layer, 4) for layer in SMALL]
    else:
        every = [Case(layer, 256) for layer in RESNET50]
        every += [Case(layer, batch) for batch in (128, 1024) for layer in VGG19 + RESNET32]
    every.sort(key=lambda case: (not case.is_goal, case.layer.kernel == 1))
    chosen = [case for case in every if part in case.name]
    if not chosen:
        raise ValueError(f"layers: no name contains {part!r}; e.g. {every[0].name!r}")
    return chosen


def case_spec(
    case: Case,
    *,
    sparsity: float,
    group_size: int = 64,
    channel_block: int = 16,
    kept_taps: int | None = None,
    dtype: str = "bfloat16",
) -> ConvSpec:
    """Returns the convolution of a case, in the longest runs of channels that keep the density.

    Runs have `channel_block`, 8 or 1 channels. The longest is taken for which the kept channels,
    rounded up to runs, are 0.95 to 1.25 times what the sparsity asks for. So a layer is never timed
    at much less work than its sparsity says.

    Args:
      case: the layer and the batch.
      sparsity: fraction of the weights removed.
      group_size: filters in a group, at most `cout`.
      channel_block: the longest runs of channels.
      kept_taps: of each group; None: a third of the kernel.
      dtype: of the activations.

    Returns:
      The static sizes.

    Example:
      >>> case_spec(cases("vgg19 256@8 n128")[0], sparsity=0.9).packed_shape
      (4, 80, 3, 64)
    """
    spec = shapes.layer_spec(
        case.layer,
        sparsity=sparsity,
        batch=case.batch,
        group_size=group_size,
        kept_taps=kept_taps,
        dtype=dtype,
    )
    exact = (1 - sparsity) * spec.cin * case.layer.kernel**2 / spec.kept_taps
    most = min(FULLEST * exact * (1 + ROUNDING), spec.cin)
    for block in sorted({channel_block, min(8, channel_block), 1}, reverse=True):
        runs = -int(-EMPTIEST * exact * (1 - ROUNDING) // block)
        kept = max(block, runs * block)
        if block == 1 or (kept <= most and spec.cin % block == 0):
            break
    return dataclasses.replace(spec, kept=min(kept, spec.cin), channel_block=block)


def operands(spec: ConvSpec, seed: int = 0) -> tuple[jax.Array, ...]:
    """Draws random operands of a convolution whose channels come in aligned runs.

    Args:
      spec: the static sizes.
      seed: of NumPy's generator.

    Returns:
      `(x, dy, values, filters, channels, taps)`.

    Example:
      >>> spec = case_spec(cases("small 64@4", quick=True)[0], sparsity=0.8, channel_block=8)
      >>> bool((operands(spec)[4].reshape(spec.groups, -1, 8) % 8 == jnp.arange(8)).all())
      True
    """
    run = spec.channel_block
    of_runs = dataclasses.replace(  # the same groups, with a run of channels in place of each
        spec,
        cin=spec.cin // run,
        kept=spec.kept // run,
        height=1,
        width=1,
        batch=1,
        padding=((8, 8), (8, 8)),
    )
    *_, filters, runs, taps = shapes.random_operands(of_runs, seed)
    channels = (runs[..., None] * run + jnp.arange(run, dtype=jnp.int32)).reshape(spec.groups, -1)
    keys = jax.random.split(jax.random.key(seed), 3)
    x, dy, values = (
        jax.random.normal(key, shape, spec.dtype)
        for key, shape in zip(keys, (spec.in_shape, spec.out_shape, spec.packed_shape), strict=True)
    )
    return x, dy, values, filters, channels, taps
