"""The training steps that are timed on a GPU, and what each of them depends on."""

import dataclasses
import zlib

import jax

from experiments.bench.gpu import shapes, tiles
from experiments.bench.gpu.fingerprint import fingerprint, implementation_key
from experiments.bench.gpu.implementations import present_implementations
from experiments.measuring.environment import ROOT
from pallas_kernels.devices import this_gpu


@dataclasses.dataclass(frozen=True)
class Network:
    """A network as it is timed.

    Attributes:
      model: of the zoo.
      batch_size: images in a step.
      sparsities: of static HRBP.
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
    Network("resnet32", 1024, (0.9,), width=2),
    Network("resnet50", 256, (0.8, 0.9), dataset="imagenet2012", image_size=224),
    Network("vgg19", 1024, (0.9, 0.95)),
    Network("resnet32", 128, (0.9,), width=2),
)
QUICK_NETWORKS = (Network("cnn", 4, (0.9,), image_size=8),)


@dataclasses.dataclass(frozen=True)
class Unit:
    """One timed step.

    Attributes:
      network: which is trained.
      execution: dense, masked, sparse or packed.
      sparsity: of static HRBP; 0 for dense.
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


def training_units(implementations: tuple[str, ...], networks: list[Network]) -> list[Unit]:
    """Returns the steps in the order in which they are timed.

    First come, for all networks, the packed step in the most important implementation with the
    dense and the masked step that it is compared with; then the rest.

    Args:
      implementations: the most important first; those that cannot run here are left out.
      networks: the networks.

    Returns:
      Units.
    """
    present = present_implementations()
    names = [name for name in implementations if name in present]
    first, rest = [], []
    for network in networks:
        first.append(Unit(network, "dense"))
        for sparsity in network.sparsities:
            sparse = [
                Unit(network, execution, sparsity, name)
                for execution in ("packed", "sparse")
                for name in names
            ]
            first += [Unit(network, "masked", sparsity), *sparse[:1]]
            rest += sparse[1:]
    return first + rest


def unit_key(options: StepOptions, unit: Unit) -> str:
    """Returns the key of a step in the journal: all that its time depends on.

    Dense and masked steps depend on the network and on how it is trained; the others also on the
    library, the kernels, and the tiles in which they run the layers of the network that the
    benchmark times.

    Args:
      options: of all steps.
      unit: the step.

    Returns:
      The key.
    """
    network = unit.network
    sources = [
        path
        for room in ("training", "models")
        for path in (ROOT / "experiments" / room).glob("*.py")
    ]
    size = f"n{network.batch_size} {network.image_size} {options.precision}"
    parts = [
        f"step {this_gpu()} jax {jax.__version__} {network.model} {network.width:g}",
        f"{size} g{options.group_size} b{options.channel_block}",
        f"{unit.execution} {unit.sparsity:g} {fingerprint(sources)}",
    ]
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
