"""What runs of channels keep: `python -m experiments.bench.channel_blocks` prints one table of kept
scores over single-channel lists.

For whole networks at HRBP's default settings: every channel space is ordered
(`blocksparse_jax.channel_order`), then grouped with runs and with single channels, which keep
equally many. Of spaces whose layers have the same shapes one is measured and counted as often as
they are there, and of each network only the spaces with the most weights. Most of the time is the
compilation of the grouping, once per layer shape, kept count and run length; the report is written
row by row, and `--resume` goes on with it.
"""

import dataclasses
import json
import math
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from rich.console import Console
from rich.table import Table

from blocksparse_jax._checks import divisor
from blocksparse_jax.grouping.channel_order import Consumer, channel_order, run_ratio
from blocksparse_jax.grouping.channel_spaces import space_consumers
from blocksparse_jax.tree import conv_kernels, path_name
from experiments.bench.environment import commit, device, versions
from experiments.models import create
from experiments.models.spaces import channel_spaces
from experiments.training.config import TrainConfig
from experiments.training.run import Run

RESULTS = Path(__file__).parents[1] / "results"
CLUSTERS = 8  # of filters and of channels, in the clustered scores


@dataclasses.dataclass(frozen=True)
class Config:
    """What is measured.

    Attributes:
      networks: model:scores. Scores are random (fresh weights), clustered (fresh weights times a
        factor for each pair of a filter cluster and a channel cluster) or trained (the CNN after a
        dense training on digits).
      channel_blocks: channels in a run.
      sparsities: of static HRBP, uniform.
      group_size: filters in a group.
      spaces: different ones measured of each network, those that hold the most weights first.
      epochs: of the training.
      resume: keep the rows that the report has, and measure the others.
      out: the report, JSON.
    """

    networks: tuple[str, ...] = (
        "cnn:trained",
        "vgg19:random",
        "vgg19:clustered",
        "resnet50:random",
        "resnet50:clustered",
    )
    channel_blocks: tuple[int, ...] = (8, 16, 32)
    sparsities: tuple[float, ...] = (0.8, 0.9, 0.95)
    group_size: int = 32
    spaces: int = 4
    epochs: int = 3
    resume: bool = False
    out: str = str(RESULTS / "channel_blocks.json")


def main(config: Config) -> dict[str, Any]:
    """Measures, prints the table and writes the report.

    Args:
      config: what is measured.

    Returns:
      What the report holds: `rows`, one for each network, sparsity and channel block, device,
      versions and commit.

    Raises:
      ValueError: an unknown network or kind of scores, or sizes that the library refuses.
    """
    out, settings = (
        Path(config.out),
        {name: getattr(config, name) for name in ("group_size", "spaces", "epochs")},
    )
    found = (
        json.loads(out.read_text()) if config.resume and out.exists() else settings | {"rows": []}
    )
    if settings != {name: found[name] for name in settings}:
        raise ValueError(
            f"resume: {out} was measured with { ({name: found[name] for name in settings}) }, not "
            f"{settings}"
        )
    report = settings | {
        "device": device(),
        "versions": versions(),
        "commit": commit(),
        "rows": found["rows"],
    }
    have = {(row["network"], row["sparsity"], row["channel_block"]) for row in report["rows"]}
    for network in config.networks:
        wanted = [
            (s, b)
            for s in config.sparsities
            for b in config.channel_blocks
            if (network, s, b) not in have
        ]
        params = draw(network, config.epochs) if wanted else None
        for sparsity, block in wanted:
            report["rows"].append(
                {
                    "network": network,
                    **measure(params, sparsity, block, config.group_size, config.spaces),
                }
            )
            out.write_text(json.dumps(report, indent=2) + "\n")
    Console().print(_table(report["rows"]))
    return report


def draw(network: str, epochs: int) -> dict[str, Any]:
    """The parameters of a network: shapes of the zoo, values as `Config.networks` says.

    Args:
      network: model:scores.
      epochs: of the training.

    Returns:
      A tree of arrays.

    Raises:
      ValueError: an unknown model or kind of scores.
    """
    model, _, kind = network.partition(":")
    if kind not in ("random", "clustered", "trained") or (kind == "trained" and model != "cnn"):
        raise ValueError(
            f"networks: expected MODEL:random, MODEL:clustered or cnn:trained, got {network!r}"
        )
    if kind == "trained":
        with tempfile.TemporaryDirectory() as folder:
            run = Run(TrainConfig(model=model, method="dense", epochs=epochs, out=folder))
            run.train()
            return jax.tree.map(np.asarray, run.state.params)
    images = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
    shapes = jax.eval_shape(create(model, num_classes=10).init, jax.random.key(0), images)["params"]
    rng = np.random.default_rng(0)
    channel_cluster = {  # the consumers of a space see the same clusters of channels
        name: labels
        for entries in channel_spaces(shapes).values()
        for labels in [rng.integers(0, CLUSTERS, 4096)]
        for name, axis in entries
        if axis == 2
    }

    def values(path: tuple[Any, ...], leaf: Any) -> np.ndarray:
        name, array = path_name(path), rng.normal(size=leaf.shape).astype(np.float32)
        if not conv_kernels(name, leaf):
            return array
        array *= np.sqrt(2 / (leaf.shape[0] * leaf.shape[1] * leaf.shape[3]))  # He, fan-out
        if kind == "clustered":
            factors = 0.3 + rng.normal(size=(CLUSTERS, CLUSTERS)).astype(np.float32) ** 2
            array *= factors[
                channel_cluster[name][: leaf.shape[2], None],
                rng.integers(0, CLUSTERS, leaf.shape[3]),
            ]
        return array

    return jax.tree.map_with_path(values, shapes)


def measure(
    params: Any, sparsity: float, channel_block: int, group_size: int, most: int
) -> dict[str, Any]:
    """Orders the largest spaces of a network and values the runs.

    Args:
      params: of a network of the zoo.
      sparsity: of static HRBP.
      channel_block: channels in a run.
      group_size: filters in a group.
      most: different spaces at most.

    Returns:
      A row of the report: `ordered`, `unordered` and `chance` are kept scores over that of
      single-channel lists, summed over the spaces (chance = runs, filters and taps chosen blindly);
      `worst` is the lowest `ordered` of a space; `covered` the fraction of the sparse weights that
      the measured spaces hold; `seconds` include compiling.
    """
    found = space_consumers(
        params, channel_spaces(params), sparsity, channel_block=channel_block, group_size=group_size
    )
    alike: dict[Any, list[str]] = {}
    for space, named in found.items():
        alike.setdefault(
            tuple(sorted((c.scores.shape, *c[1:]) for c in named.values())), []
        ).append(space)
    weights = {
        sizes: len(names) * sum(math.prod(shape) for shape, *_ in sizes)
        for sizes, names in alike.items()
    }
    largest = sorted(alike, key=lambda sizes: -weights[sizes])[:most]
    covered = sum(weights[sizes] for sizes in largest) / sum(weights.values())
    kept, spaces, began = (
        dict.fromkeys(("ordered", "unordered", "chance", "single"), 0.0),
        [],
        time.perf_counter(),
    )
    for sizes in largest:
        names, consumers = alike[sizes], list(found[alike[sizes][0]].values())
        block = divisor(sizes[0][0][2], channel_block)
        ratio = run_ratio(
            consumers, channel_order(consumers, channel_block=block), channel_block=block
        )
        kept["ordered"] += len(names) * ratio.ordered * ratio.single
        kept["unordered"] += len(names) * ratio.unordered * ratio.single
        kept["single"] += len(names) * ratio.single
        kept["chance"] += len(names) * sum(_chance(consumer) for consumer in consumers)
        spaces.append(
            {
                "space": names[0],
                "times": len(names),
                "ordered": round(ratio.ordered, 4),
                "unordered": round(ratio.unordered, 4),
            }
        )
    return {
        "sparsity": sparsity,
        "channel_block": channel_block,
        **{
            name: round(kept[name] / kept["single"], 4)
            for name in ("ordered", "unordered", "chance")
        },
        "worst": min(space["ordered"] for space in spaces),
        "covered": round(covered, 3),
        "seconds": round(time.perf_counter() - began, 1),
        "spaces": spaces,
    }


def _chance(consumer: Consumer) -> float:
    """The score that blocks chosen blindly keep, on average."""
    kh, kw, cin, _ = consumer.scores.shape
    return float(jnp.sum(consumer.scores)) * consumer.kept * consumer.kept_taps / (kh * kw * cin)


def _table(rows: list[dict[str, Any]]) -> Table:
    table = Table(title="kept score with runs of channels over single-channel lists")
    for column in (
        "network",
        "sparsity",
        "channel_block",
        "ordered",
        "unordered",
        "chance",
        "worst space",
    ):
        table.add_column(column, justify="left" if column == "network" else "right")
    for row in rows:
        values = (f"{row[name]:.3f}" for name in ("ordered", "unordered", "chance", "worst"))
        table.add_row(row["network"], f"{row['sparsity']:.0%}", str(row["channel_block"]), *values)
    return table


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
