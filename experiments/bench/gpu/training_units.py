"""The training steps that are timed on a GPU, and what each of them depends on."""

import dataclasses
import os
import zlib

import jax

from experiments.bench.gpu import shapes, tiles
from experiments.bench.gpu.fingerprint import fingerprint, implementation_key
from experiments.bench.gpu.implementations import present_implementations
from experiments.measuring.environment import ROOT
from experiments.measuring.row_names import TORCH
from pallas_kernels.block_sparse_conv import fuses_norms
from pallas_kernels.devices import this_gpu


@dataclasses.dataclass(frozen=True)
class Network:
    """A network as it is timed.

    Attributes:
      model: of the zoo.
      batch_size: images in a step.
      sparsities: of static HRBP, the most important first.
      width: factor on the channels.
      dataset: decides the classes and the stem.
      image_size: pixels.
    """

    model: str
    batch_size: int
    sparsities: tuple[float, ...]
    width: float = 1
    dataset: str = "cifar10"
    image_size: int = 32


NETWORKS = (
    Network("vgg19", 128, (0.9, 0.95)),
    Network("vgg19", 1024, (0.9, 0.95)),
    Network("resnet32", 128, (0.9,), width=2),
    Network("resnet32", 1024, (0.9,), width=2),
    Network("resnet50", 256, (0.8, 0.9), dataset="imagenet2012", image_size=224),
)
QUICK_NETWORKS = (Network("cnn", 4, (0.9,), image_size=8),)


def networks_named(part: str, *, quick: bool = False) -> list[Network]:
    """Returns the networks whose names contain a part.

    Args:
      part: of the name; empty for all.
      quick: choose among the tiny ones.

    Raises:
      ValueError: there is none.

    Example:
      >>> [network.batch_size for network in networks_named("vgg")]
      [128, 1024]
    """
    networks = QUICK_NETWORKS if quick else NETWORKS
    named = [network for network in networks if part in network.model]
    if not named:
        raise ValueError(f"models: no network's name contains {part!r}; e.g. {networks[0].model!r}")
    return named


@dataclasses.dataclass(frozen=True)
class Unit:
    """One timed step.

    Attributes:
      network: which is trained.
      execution: dense, `TORCH` (dense in PyTorch), masked, sparse or packed.
      sparsity: of static HRBP; 0 for dense, and for packed weights of which none is left out.
      implementation: of the block-sparse conv; "" for dense and masked.
    """

    network: Network
    execution: str
    sparsity: float = 0.0
    implementation: str = ""


@dataclasses.dataclass(frozen=True)
class StepOptions:
    """What all steps of a call have in common.

    Attributes:
      precision: of the activations.
      group_size: filters in a group.
      channel_block: runs of channels.
      repetitions: bursts of steps.
      quick: whether it is a dry run.
    """

    precision: str
    group_size: int
    channel_block: int
    repetitions: int
    quick: bool


def training_waves(
    implementations: tuple[str, ...], networks: list[Network], torch: bool = False
) -> list[list[Unit]]:
    """Returns the steps in the order in which they are timed, in waves.

    First comes one dense step alone, which needs no kernel of ours. Then, for all networks at their
    first sparsity, the dense step, the masked one and the packed one in each implementation; last,
    the rest. Where an implementation also fuses batch norm (`norm_act_conv`), the dense step runs
    in its kernels too: what fusion gives and what sparsity gives can then be told apart.

    Args:
      implementations: the most important first; those that cannot run here are left out.
      networks: the networks.
      torch: whether PyTorch's dense step is timed too.

    Returns:
      Waves of units.
    """
    present = present_implementations()
    names = [name for name in implementations if name in present]
    first, rest = [], []
    for network in networks:
        first.append(Unit(network, "dense"))
        first += [Unit(network, TORCH)] if torch else []
        for sparsity in network.sparsities:
            wave = first if sparsity == network.sparsities[0] else rest
            wave.append(Unit(network, "masked", sparsity))
            wave += [Unit(network, "packed", sparsity, name) for name in names]
            rest += [Unit(network, "sparse", sparsity, name) for name in names]
        first += [Unit(network, "packed", 0.0, name) for name in filter(fuses_norms, names)]
    return [first[:1], first[1:], rest]


def unit_key(options: StepOptions, unit: Unit) -> str:
    """Returns the key of a step in the journal: all that its time depends on.

    Dense and masked steps depend on the network, on how it is trained, and on `XLA_FLAGS`, which
    say what XLA records in its graphs; PyTorch's on its own sources. The others also depend on the
    library, the kernels, and the tiles in which they run the layers of the network that the
    benchmark times.

    Args:
      options: of all steps.
      unit: the step.

    Returns:
      The key.
    """
    network = unit.network
    is_torch = unit.execution == TORCH
    rooms = ("bench/torch_baseline",) if is_torch else ("training", "models")
    sources = [path for room in rooms for path in (ROOT / "experiments" / room).glob("*.py")]
    framework = "torch" if is_torch else f"jax {jax.__version__}"
    size = f"n{network.batch_size} {network.image_size} {options.precision}"
    parts = [
        f"step {this_gpu()} {framework} {network.model} {network.width:g}",
        f"{size} g{options.group_size} b{options.channel_block}",
        f"{unit.execution} {unit.sparsity:g} {fingerprint(sources)}",
    ]
    if not is_torch and (flags := os.environ.get("XLA_FLAGS", "").split()):
        parts.append(" ".join(sorted(flags)))
    if unit.implementation:
        names = list(dict.fromkeys((unit.implementation, "triton")))
        library = fingerprint((ROOT / "blocksparse_jax").rglob("*.py"))
        parts += [library, unit.implementation, *(implementation_key(name) for name in names)]
        parts.append(_tiles_key(options, unit, names))
    return " ".join(parts)


def _tiles_key(options: StepOptions, unit: Unit, names: list[str]) -> str:
    """A short name for the tiles of the network's layers in these implementations."""
    network = unit.network
    cases = [] if options.quick else shapes.cases(network.model)
    specs = [
        shapes.case_spec(
            case,
            sparsity=unit.sparsity,
            group_size=options.group_size,
            channel_block=options.channel_block,
            dtype=options.precision,
        )
        for case in cases
        if case.batch == network.batch_size
    ]
    chosen = [tiles.chosen_tiles(name, spec) for spec in specs for name in names]
    return f"{zlib.crc32(str(chosen).encode()):08x}"
