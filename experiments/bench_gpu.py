"""The GPU part of bench_kernels: `python -m experiments.bench_kernels --device gpu` (`--quick`: a dry run of tiny shapes on any device).

In this order: every implementation, dtype and pass against float64; what the device can do at most; then all conv layers of ResNet-50,
VGG-19 and ResNet-32 (width 2) at each sparsity, three passes, against cuDNN. Each finished unit is a line in the journal at once;
`--minutes 9` stops in time with exit status 75, and the same command goes on. Units hold as long as the sources and the tuned tiles that
they measured. Every end writes the report of what is there.
"""

import dataclasses
import functools
import json
import os
import sys
from pathlib import Path
from typing import Any, Literal

import jax

from experiments import gpu_ceilings, gpu_check, gpu_layers, gpu_tables
from experiments.environment import commit, device, versions
from experiments.summary import summary
from pallas_kernels import gpu_clock, gpu_shapes
from pallas_kernels.block_sparse_conv import ConvSpec, Implementation, choose_implementation, dense
from pallas_kernels.gpu_journal import LOST, STOPPED, DeviceLost, Journal, TimeUp

RESULTS = Path(__file__).parent / "results"
STAGES = ("check", "ceilings", "layers")


@dataclasses.dataclass(frozen=True)
class GpuConfig:
    """What is timed on a GPU.

    Attributes:
      device: gpu.
      stages: of check, ceilings, layers.
      sparsities: fractions of the weights removed, in this order.
      layers: a part of the layers' names; empty is all.
      group_size: filters in a group.
      channel_block: the longest runs of channels.
      dtype: of the activations.
      minutes: no unit begins after them; None: no limit.
      threads: compile at once (dense convolutions: one after another).
      repetitions: of each program of some milliseconds.
      keep_going: time those implementations that are right although others failed their check; the exit status still is 1.
      journal: JSON-lines file that is gone on with.
      out: JSON file; None is experiments/results/bench_kernels_gpu.json.
      quick: a dry run of tiny shapes on any device, written nowhere unless `out` is given.
    """

    device: Literal["gpu"] = "gpu"
    stages: tuple[str, ...] = STAGES
    sparsities: tuple[float, ...] = (0.9, 0.8, 0.95)
    layers: str = ""
    group_size: int = 64
    channel_block: int = 16
    dtype: str = "bfloat16"
    minutes: float | None = None
    threads: int = min(16, os.cpu_count() or 1)
    repetitions: int = 9
    keep_going: bool = False
    journal: Path = Path("runs/gpu/bench_kernels.jsonl")
    out: Path | None = None
    quick: bool = False


def main(config: GpuConfig) -> dict[str, Any]:
    """Checks, measures ceilings, times the layers, and writes the report of what is there.

    Args:
      config: what is timed.

    Returns:
      The report; "complete" says whether everything is in it.

    Raises:
      ValueError: the device is no GPU, or no such stage or layer.
      AssertionError: an implementation is wrong; nothing is timed without `keep_going`.

    Reference: ours.
    """
    gpu_clock.require_gpu(config.quick)
    if unknown := set(config.stages) - set(STAGES):
        raise ValueError(f"stages: expected some of {', '.join(STAGES)}, got {', '.join(sorted(unknown))}")
    if config.quick:
        config = dataclasses.replace(config, sparsities=config.sparsities[:1], repetitions=2)
    run = _Run(config)
    complete = False
    try:
        if "check" in config.stages:
            run.check()
        if "ceilings" in config.stages:
            run.ceilings()
        if "layers" in config.stages:
            run.layers()
        complete = True
    except TimeUp as unit:
        print(f"time is up before {unit}; the same command goes on", file=sys.stderr)
    finally:
        report = run.report(complete)
        path = config.out or (None if config.quick else RESULTS / "bench_kernels_gpu.json")
        if path and (report["rows"] or report["checks"] or report["ceilings"]):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(report, indent=1) + "\n")
    if report["rows"]:
        print(f"<!-- table:bench_kernels_gpu -->\n{gpu_tables.kernels(report)}<!-- /table -->")
    return report


class _Run:
    """One process's part of the work."""

    def __init__(self, config: GpuConfig):
        self._config = config
        self._journal = Journal(config.journal, config.minutes)
        self._found = gpu_check.implementations()
        self._where = f"{gpu_clock.gpu()} jax {jax.__version__}"
        self._failed: dict[str, str] = {}
        self._bad: set[str] | None = None
        self._cases = gpu_shapes.cases(config.layers, config.quick)
        self._units: dict[str, list[tuple[str, Any]]] = {"check": [], "ceilings": []}
        for name, one in self._found.items():
            if isinstance(one, str):
                print(f"no {name}: {one}", file=sys.stderr)

    def _do(self, key: str, function: Any) -> Any:
        result = self._journal.run(key, function)
        jax.clear_caches()
        return result

    def _present(self) -> dict[str, Implementation]:
        return {name: one for name, one in self._found.items() if not isinstance(one, str)}

    def _check_key(self, name: str, shape: str, spec: ConvSpec, kind: str) -> str:
        return f"check {self._where} {name} {gpu_layers.sources(name, spec)} {shape} {kind}"

    def check(self) -> None:
        for shape, spec, kind in gpu_check.units(self._config.quick):
            for name, one in self._present().items():
                self._do(self._check_key(name, shape, spec, kind), functools.partial(gpu_check.check, spec, kind, one))
        wrong = self._wrong()
        for what, error in wrong.items():
            print(f"WRONG {what}: {error}", file=sys.stderr)
        if wrong and not self._config.keep_going:
            what, error = next(iter(wrong.items()))
            raise AssertionError(f"{len(wrong)} checks failed, nothing was timed (--keep-going times the others); {what}: {error}")

    def _wrong(self) -> dict[str, str]:
        """The checks that failed, and why."""
        keys = {
            f"{name}, {shape}, {kind}": self._check_key(name, shape, spec, kind)
            for shape, spec, kind in gpu_check.units(self._config.quick)
            for name in self._present()
        }
        return {what: error for what, key in keys.items() if (error := self._journal.error(key))}

    def ceilings(self) -> None:
        for name in gpu_ceilings.ceilings(self._config.quick):
            self._do(f"ceiling {self._where} {name}", functools.partial(gpu_ceilings.measure_ceiling, name, self._config.quick))
        self._do(self._gather_key(), functools.partial(gpu_ceilings.row_gather_kernel, self._config.quick))

    def _gather_key(self) -> str:
        return f"ceiling {self._where} row gather, kernels {gpu_layers.sources('mosaic_gpu')} {gpu_layers.sources('triton')}"

    def _spec(self, case: gpu_shapes.Case, sparsity: float) -> ConvSpec:
        config = self._config
        size = {"group_size": config.group_size, "channel_block": config.channel_block, "dtype": config.dtype}
        kind = gpu_layers.kind_of(config.dtype)
        spec = gpu_shapes.case_spec(case, sparsity=sparsity, **size)
        return dataclasses.replace(spec, precision=gpu_check.KINDS[kind][1])

    def _timed(self, spec: ConvSpec) -> dict[str, Implementation]:
        """The GPU kernels that passed their checks, and what `implementation=None` picks."""
        if self._bad is None:
            kind = gpu_layers.kind_of(self._config.dtype)
            self._bad = {what.split(",")[0] for what in self._wrong() if what.endswith(f" {kind}")}
        bad = self._bad
        kernels = {name: one for name, one in self._present().items() if name != "xla" and name not in bad}
        picked, known = choose_implementation(spec).implementation, {**self._present(), "dense": dense.IMPLEMENTATION}
        if picked in known and picked not in bad:
            kernels[picked] = known[picked]
        return kernels or ({"xla": known["xla"]} if "xla" not in bad else {})

    def _keys(self, case: gpu_shapes.Case, spec: ConvSpec, sparsity: float) -> tuple[str, dict[str, str]]:
        sizes = f"{case.name} {spec.dtype}"
        blocks = f"{sizes} {sparsity:g} {'x'.join(map(str, spec.packed_shape))} block {spec.channel_block}"
        return (
            f"dense {self._where} {sizes}",
            {name: f"sparse {self._where} {name} {gpu_layers.sources(name, spec)} {blocks}" for name in self._timed(spec)},
        )

    def layers(self) -> None:
        config = self._config
        for sparsity in config.sparsities:
            for case in self._cases:
                spec = self._spec(case, sparsity)
                dense_key, keys = self._keys(case, spec, sparsity)
                self._do(dense_key, functools.partial(gpu_layers.measure_dense, spec, config.repetitions))
                kind, kernels = gpu_layers.kind_of(config.dtype), self._timed(spec)
                for name, key in keys.items():
                    measure = functools.partial(
                        gpu_layers.measure_sparse, spec, name, kernels[name], kind, config.repetitions, config.threads
                    )
                    self._do(key, measure)
                self._show(case, spec, sparsity)

    def _rows(self, case: gpu_shapes.Case, spec: ConvSpec, sparsity: float, about: dict[str, Any]) -> list[dict[str, Any]]:
        dense_key, keys = self._keys(case, spec, sparsity)
        found = {name: self._journal.result(key) for name, key in keys.items()}
        self._failed |= {key: error for key in (dense_key, *keys.values()) if (error := self._journal.error(key))}
        if not (plain := self._journal.result(dense_key)):
            return []
        choice = choose_implementation(spec)
        tile = {"groups": spec.groups, "group_size": spec.group_size, "kept": spec.kept, "kept_taps": spec.kept_taps}
        shape = {"input": spec.in_shape, "output": spec.out_shape, "kernel": spec.kernel, "strides": spec.strides, "dtype": spec.dtype}
        about = {
            "layer": case.name, "sparsity": sparsity, "shape": shape, "density": round(spec.density, 5),
            "tile": tile | {"channel_block": spec.channel_block}, "picked": {"implementation": choice.implementation, **choice.details},
        } | about  # fmt: skip
        return gpu_layers.rows(about, plain, {name: own for name, own in found.items() if own}, choice.implementation)

    def _show(self, case: gpu_shapes.Case, spec: ConvSpec, sparsity: float) -> None:
        for row in self._rows(case, spec, sparsity, {})[-1:]:
            us = {name: f"{1e3 * times['median']:.1f}" for name, times in row["ms"].items()}
            print(f"{case.name} {sparsity:.0%} {row['mode']}, us: {us}", flush=True)

    def report(self, complete: bool) -> dict[str, Any]:
        origin = {"device": device(), "versions": versions(), "commit": commit() or os.environ.get("COMMIT")}
        rows = []
        for sparsity in self._config.sparsities:
            for case in self._cases:
                rows += self._rows(case, self._spec(case, sparsity), sparsity, origin)
        checks = []
        for shape, spec, kind in gpu_check.units(self._config.quick):
            for name in self._present():
                key = self._check_key(name, shape, spec, kind)
                if key in self._journal.records:
                    outcome = self._journal.result(key) or {"error": self._journal.error(key) or "unfinished"}
                    checks.append({"implementation": name, "shape": shape, "kind": kind, **outcome})
        names = [f"ceiling {self._where} {name}" for name in gpu_ceilings.ceilings(self._config.quick)]
        ceilings = [found for key in (*names, self._gather_key()) if (found := self._journal.result(key))]
        told = {name: value for name, value in dataclasses.asdict(self._config).items() if name not in ("journal", "out")}
        absent = {name: one for name, one in self._found.items() if isinstance(one, str)}
        return origin | {
            "config": told, "complete": complete, "absent": absent, "failed": self._failed | self._wrong(), "checks": checks,
            "ceilings": ceilings, "summary": summary(rows), "rows": rows,
        }  # fmt: skip


def run(config: GpuConfig) -> int:
    """The command.

    Args:
      config: what is timed.

    Returns:
      The exit status: 0, 1 when something failed, 2 for a wrong argument, 70 when the device is lost, 75 when time was up.

    Reference: ours.
    """
    try:
        report = main(config)
    except (ValueError, AssertionError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, ValueError) else 1
    except DeviceLost as unit:
        print(f"the device is lost at {unit}; the same command goes on behind it", file=sys.stderr)
        return LOST
    if not report["complete"]:
        return STOPPED
    return 1 if report["failed"] else 0
