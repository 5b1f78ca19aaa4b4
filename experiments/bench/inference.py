"""Times whole networks at inference: `python -m experiments.bench.inference`; `--quick` about a
minute.

About 4 minutes on 2 CPU cores at `--seconds 4`, PyTorch included.

SUBP's claim is CPU speed: ResNets for ImageNet (224x224) under its 1x16 and 1x32 patterns at the
paper's FLOPs, packed, against the dense network in XLA (NHWC, CHWN, and NHWC with a matrix product
per tap at 7x7 pixels) and, with `--torch PATH_TO_PYTHON`, in PyTorch (eager and frozen, see
torch_baseline.py), at batch 1 and 8 on 1 and 2 threads, in turn. Weights are random: only the speed
counts, but the logits must agree before anything is timed. Batch norm, shortcut and ReLU ride in
the block-sparse kernels; XLA fuses them, PyTorch's frozen form folds what it can.
"""

import contextlib
import dataclasses
import functools
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from rich.console import Console
from rich.table import Table

import blocksparse_jax as bsj
from blocksparse_jax.tree import conv_kernels, path_name
from experiments import models
from experiments.bench.environment import commit, device, versions
from experiments.bench.memory import steady_memory
from experiments.bench.timing import median_iqr, time_in_turn, timed
from experiments.bench.torch_process import POLICIES, TorchProcess
from experiments.models.flops import conv_positions
from pallas_kernels.dense_conv import taps_up_to

RESULTS = Path(__file__).parents[1] / "results"
TOLERANCE = 1e-3  # of the logits, relative to the largest
CLASSES = 1000
PATTERNS = {  # network -> (FLOPs of the paper, fraction of the channels removed)
    "resnet18": (("1.03G", 60 / 128),),
    "resnet34": (("2.0G", 59 / 128),),
    "resnet50_v1_5": (("2.0G", 66 / 128), ("1.0G", 98.5 / 128)),
}


@dataclasses.dataclass(frozen=True)
class InferenceConfig:
    """What is timed.

    Attributes:
      models: resnet18, resnet34, resnet50_v1_5.
      blocks: N of the 1xN patterns.
      batches: images at once.
      threads: cores to run on; each number is a process of its own.
      implementation: of the block-sparse conv; None picks.
      image_size: pixels.
      width: of the networks.
      seconds: time per network and batch after compilation.
      torch: path of a Python that has PyTorch.
      out: JSON file; None is experiments/results/bench_inference_cpu.json.
      quick: one narrow network on small images and few repetitions, written nowhere unless `out` is
        given.
    """

    models: tuple[str, ...] = ("resnet18", "resnet50_v1_5")
    blocks: tuple[int, ...] = (16, 32)
    batches: tuple[int, ...] = (1, 8)
    threads: tuple[int, ...] = (1, 2)
    implementation: str | None = None
    image_size: int = 224
    width: float = 1
    seconds: float = 10.0
    torch: str | None = None
    out: str | None = None
    quick: bool = False


def main(config: InferenceConfig) -> dict[str, Any]:
    """Times the networks, prints a table and writes JSON.

    Args:
      config: what is timed.

    Returns:
      What the JSON holds.

    Raises:
      ValueError: an unknown network, more threads than cores, or no PyTorch there.
      RuntimeError: two executions of one network disagree.

    Reference: Xiang et al., "SUBP", NeurIPS 2023 (patterns and FLOPs).
    """
    jax.config.update("jax_platforms", "cpu")
    available = len(os.sched_getaffinity(0))
    if unknown := set(config.models) - set(PATTERNS):
        raise ValueError(
            f"models: expected some of {', '.join(PATTERNS)}, got {', '.join(sorted(unknown))}"
        )
    if config.quick:
        small = {
            "models": config.models[:1],
            "blocks": config.blocks[:1],
            "batches": config.batches[:1],
        }
        config = dataclasses.replace(
            config, **small, threads=(available,), image_size=64, width=0.25, seconds=0.1
        )
    if not 1 <= min(config.threads) <= max(config.threads) <= available:
        raise ValueError(
            f"threads: expected 1 to {available}, the cores that this process may use, got "
            f"{config.threads}"
        )
    if config.threads == (available,):
        report = _report(config)
    else:
        reports = [
            _elsewhere(dataclasses.replace(config, threads=(threads,)))
            for threads in config.threads
        ]
        report = {
            **reports[0],
            "rows": [row for one in reports for row in one["rows"]],
            "device": device(),
            "config": _told(config),
        }
    Console(width=None if Console().is_terminal else 120).print(_table(report))
    if config.out or not config.quick:
        out = Path(config.out) if config.out else RESULTS / "bench_inference_cpu.json"
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(report, indent=1) + "\n")
    return report


def _told(config: InferenceConfig) -> dict[str, Any]:
    """The settings without a machine's paths."""
    return {
        name: value
        for name, value in dataclasses.asdict(config).items()
        if name not in ("torch", "out")
    }


def _elsewhere(config: InferenceConfig) -> dict[str, Any]:
    """The report of a process that may use only so many cores: XLA sizes its thread pool once, at
    the start, by the cores it may use.
    """
    flags = []
    for name, value in dataclasses.asdict(dataclasses.replace(config, out=None)).items():
        if value is not None and name != "quick":
            flags += [
                f"--{name.replace('_', '-')}",
                *map(str, value if isinstance(value, tuple) else (value,)),
            ]
    with tempfile.TemporaryDirectory() as folder, cores(config.threads[0]):
        out = Path(folder) / "report.json"
        command = [sys.executable, "-m", "experiments.bench.inference", *flags, "--out", str(out)]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        return json.loads(out.read_text())


@contextlib.contextmanager
def cores(count: int) -> Iterator[None]:
    """Lets this thread, and the processes that it starts, use only so many cores.

    Args:
      count: of the cores that it may use now.

    Yields:
      Nothing; afterwards all are back.

    Reference: sched_setaffinity(2).
    """
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, sorted(before)[:count])
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def _report(config: InferenceConfig) -> dict[str, Any]:
    """Everything on the cores of this process."""
    steady_memory()
    told = versions()
    with contextlib.ExitStack() as stack:
        torch = {
            policy: stack.enter_context(TorchProcess(config.torch, policy))
            for policy in POLICIES
            if config.torch
        }
        if torch:
            told["torch"] = torch[POLICIES[0]].version
        rows = [row for name in config.models for row in _bench(config, name, torch)]
    return {
        "rows": rows,
        "device": device(),
        "versions": told,
        "commit": commit(),
        "config": _told(config),
    }


def _bench(
    config: InferenceConfig, name: str, torch: dict[str, TorchProcess]
) -> list[dict[str, Any]]:
    """The rows of one network: dense and packed, all batches."""
    create = functools.partial(
        models.create, name, num_classes=CLASSES, width=config.width, stem="imagenet"
    )
    size = (config.image_size, config.image_size, 3)
    variables = _variables(create(), size)
    positions = conv_positions(create(data_format="NHWC"), variables, size)
    packed = {
        (f"1x{block}", flops): _pack(
            variables, _layouts(variables["params"], block, sparsity, name)
        )
        for block in config.blocks
        for flops, sparsity in PATTERNS[name]
    }
    network = {
        form: _network(create(data_format=form, implementation=config.implementation))
        for form in ("NHWC", "CHWN")
    }
    network["NHWC, taps"] = taps_up_to(64)(_network(create(data_format="NHWC")))
    rows = []
    for batch in config.batches:
        images = jnp.asarray(np.random.default_rng(0).standard_normal((batch, *size)), jnp.float32)
        calls = {
            ("XLA " + form, "", "dense"): functools.partial(network[form], variables, images)
            for form in network
        }
        wanted = np.asarray(network["NHWC"](variables, images))
        _agree(name, {key: np.asarray(call()) for key, call in calls.items()}, wanted)
        for (pattern, flops), (sparse, dense) in packed.items():
            key = ("packed", flops, pattern)
            calls[key] = functools.partial(network["CHWN"], sparse, images)
            _agree(
                name, {key: np.asarray(calls[key]())}, np.asarray(network["NHWC"](dense, images))
            )
        clocks: dict[Any, Callable[[], float]] = {key: timed(call) for key, call in calls.items()}
        for policy, process in torch.items():
            arrays: dict[str, Any] = {
                "images": np.asarray(images),
                "weights": _plain(variables["params"]),
            }
            theirs = process.load("resnet", arrays, stride_in_3x3=name.endswith("v1_5"))
            clocks |= {
                (f"PyTorch {how}, {policy}", "", "dense"): call for how, call in theirs.items()
            }
            _agree(name, {how: process.results(how)[0] for how in theirs}, wanted)
        times = time_in_turn(clocks, seconds=config.seconds, patience=config.seconds)
        median = {key: median_iqr(t)[0] or 0.0 for key, t in times.items()}
        fastest = {
            who: min((m for key, m in median.items() if key[0].startswith(who)), default=None)
            for who in ("XLA", "PyTorch")
        }
        for key, milliseconds in times.items():
            execution, flops, pattern = key
            held = packed[pattern, flops][0] if execution == "packed" else variables
            row = {
                "model": name,
                "threads": config.threads[0],
                "batch": batch,
                "execution": execution,
                "pattern": pattern,
                "flops": flops,
            }
            row |= {
                "ms_median": median[key],
                "ms_iqr": median_iqr(milliseconds)[1],
                "repetitions": len(milliseconds),
            }
            row |= {"weights_mb": _megabytes(held), "gflops": _gigaflops(held["params"], positions)}
            row |= {
                f"speed_up_over_{who.lower()}": round(ms / (median[key] or 1.0), 3)
                for who, ms in fastest.items()
                if ms
            }
            rows.append(row)
    jax.clear_caches()
    return rows


def _network(model: Any) -> Callable[[Any, jax.Array], jax.Array]:
    return jax.jit(lambda variables, images: model.apply(variables, images, train=False))


def _variables(model: Any, size: tuple[int, ...]) -> dict[str, Any]:
    """Random kernels and shifts; norms whose scale is in the kernels: mean 0, variance 1, gain 1."""
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, *size)))
    rng = np.random.default_rng(0)

    def leaf(path: Any, shape: Any) -> jax.Array:
        kind = path_name(path).rsplit("/", 1)[-1]
        if kind in ("scale", "var", "mean"):
            return jnp.full(shape.shape, {"scale": 1.0, "var": 1.0 - 1e-5, "mean": 0.0}[kind])
        spread = (1.0 if kind == "bias" else 2.0 / np.prod(shape.shape[:-1])) ** 0.5
        return jnp.asarray(spread * rng.standard_normal(shape.shape), jnp.float32)

    return jax.tree_util.tree_map_with_path(leaf, shapes)


def _pack(variables: dict[str, Any], layouts: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """The packed variables with their layouts, and the dense variables with zeros."""
    values = _on_blocks(bsj.pack, variables["params"], layouts)
    return variables | {"params": values, "layouts": layouts}, variables | {
        "params": _on_blocks(bsj.unpack, values, layouts)
    }


def _layouts(params: Any, block: int, sparsity: float, name: str) -> Any:
    """SUBP's pattern at random channels; stem, classifier and, but in ResNet-50, the shortcuts stay
    dense, as with the authors.
    """
    rng = np.random.default_rng(1)

    def layout(path: Any, kernel: Any) -> Any:
        leaf = path_name(path)
        if not conv_kernels(leaf, kernel) or (
            "downsample" in leaf and not name.startswith("resnet50")
        ):
            return bsj.Dense()
        kh, kw, cin, cout = kernel.shape
        groups, kept = cout // block, cin - int(sparsity * cin)
        channels = np.sort(
            rng.permuted(np.tile(np.arange(cin), (groups, 1)), axis=1)[:, :kept], axis=1
        )
        taps = np.tile(np.arange(kh * kw), (groups, 1))
        arrays = (
            jnp.asarray(a, jnp.int32)
            for a in (np.arange(cout).reshape(groups, block), channels, taps)
        )
        return bsj.BlockLayout(*arrays, shape=kernel.shape)

    return jax.tree_util.tree_map_with_path(layout, params)


@functools.partial(jax.jit, static_argnums=0)
def _on_blocks(convert: Callable[..., jax.Array], params: Any, layouts: Any) -> Any:
    return jax.tree.map(
        lambda leaf, layout: convert(leaf, layout) if isinstance(layout, bsj.BlockLayout) else leaf,
        params,
        layouts,
    )


def _plain(params: Any) -> dict[str, np.ndarray]:
    """The parameters as convs with bias, "stage1_block1/conv1/kernel" and ".../bias": gains are 1,
    shifts are the biases.
    """
    plain = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        name = path_name(path)
        *head, module, kind = name.split("/")
        conv = (
            module.removesuffix("_norm")
            if module.endswith("_norm")
            else module.replace("norm", "conv")
        )
        if kind != "scale":
            plain["/".join((*head, conv, kind))] = np.asarray(leaf)
    return plain


def _agree(name: str, logits: dict[Any, np.ndarray], wanted: np.ndarray) -> None:
    for key, ours in logits.items():
        error = np.abs(ours - wanted).max() / np.abs(wanted).max()
        if not error <= TOLERANCE:
            raise RuntimeError(
                f"nothing was timed: the logits of {name}, {key}, differ from the dense ones by "
                f"{error:.1e} of the largest"
            )


def _megabytes(variables: dict[str, Any]) -> float:
    """Parameters with the index arrays of their layouts."""
    leaves = jax.tree.leaves((variables["params"], variables.get("layouts", {})))
    return round(sum(leaf.nbytes for leaf in leaves) / 1e6, 2)


def _gigaflops(params: Any, positions: dict[str, int]) -> float:
    """Multiply-adds per image, as the papers count FLOPs."""
    leaves = jax.tree_util.tree_leaves_with_path(params)
    return round(
        sum(leaf.size * positions.get(path_name(path), 0) for path, leaf in leaves) / 1e9, 3
    )


def _table(report: dict[str, Any]) -> Table:
    table = Table(title=f"inference, median ms, {report['device']}")
    for column in (
        "network",
        "threads",
        "batch",
        "execution",
        "pattern",
        "kept G",
        "weights",
        "ms",
        "IQR",
        "over XLA",
        "over PyTorch",
    ):
        table.add_column(
            column, justify="left" if column in ("network", "execution", "pattern") else "right"
        )
    for row in report["rows"]:
        ups = [
            f"{row[key]:.2f}x" if key in row else "-"
            for key in ("speed_up_over_xla", "speed_up_over_pytorch")
        ]
        times = (f"{row['ms_median']:.1f}", f"{row['ms_iqr']:.1f}")
        sizes = (f"{row['gflops']:.2f}", f"{row['weights_mb']:.1f} MB")
        table.add_row(
            row["model"],
            str(row["threads"]),
            str(row["batch"]),
            row["execution"],
            row["pattern"],
            *sizes,
            *times,
            *ups,
        )
    return table


if __name__ == "__main__":
    try:
        main(tyro.cli(InferenceConfig, prog="python -m experiments.bench.inference"))
    except (ValueError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
