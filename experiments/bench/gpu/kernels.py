"""The GPU part of bench_kernels: `python -m experiments.bench.kernels --device gpu` (`--quick`: a
dry run of tiny shapes on any device).

Stages, in this order: the GPU kernels against float64 in the arithmetic that is timed (gate); the
layers that the goals name, at 90% (headline); every implementation, dtype and pass against float64
(check); what the device can do at most (ceilings); then all conv layers of ResNet-50, VGG-19 and
ResNet-32 (width 2) at each sparsity, three passes, against cuDNN (layers). Each finished unit is a
line in the journal at once; `--minutes 9` stops in time with exit status 75, and the same command
goes on. Units hold as long as the sources and the tuned tiles that they measured. Every end writes
the report of what is there.
"""

import dataclasses
import functools
import json
import os
import sys
from pathlib import Path
from typing import Any, Literal

import jax

from experiments.bench.environment import origin
from experiments.bench.gpu import ceilings as gpu_ceilings
from experiments.bench.gpu import check as gpu_check
from experiments.bench.gpu import clock as gpu_clock
from experiments.bench.gpu import layers as gpu_layers
from experiments.bench.gpu import shapes as gpu_shapes
from experiments.bench.gpu.journal import Journal, TimeUp, exit_status
from experiments.bench.summary import summary
from experiments.reporting.reports import gpu_kernels
from pallas_kernels.block_sparse_conv import ConvSpec, Implementation, choose_implementation

RESULTS = Path(__file__).parents[2] / "results"
STAGES = ("gate", "headline", "check", "ceilings", "layers")
RESERVE = {
    "check": 20,
    "ceiling": 20,
    "dense": 40,
    "sparse": 40,
}  # seconds that must be left for a unit of a kind


@dataclasses.dataclass(frozen=True)
class GpuConfig:
    """What is timed on a GPU.

    Attributes:
      device: gpu.
      stages: of gate, headline, check, ceilings, layers.
      sparsities: fractions of the weights removed, in this order.
      layers: a part of the layers' names; empty is all.
      group_size: filters in a group.
      channel_block: the longest runs of channels.
      dtype: of the activations.
      minutes: no unit begins after them; None: no limit.
      threads: compile at once (dense convolutions: one after another).
      repetitions: of each program of some milliseconds.
      keep_going: time those implementations that are right although others failed their check; the
        exit status still is 1.
      allow_absent: an implementation that cannot run here is no failure.
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
    allow_absent: bool = False
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
    """
    gpu_clock.require_gpu(config.quick)
    if unknown := set(config.stages) - set(STAGES):
        raise ValueError(
            f"stages: expected some of {', '.join(STAGES)}, got {', '.join(sorted(unknown))}"
        )
    if config.quick:
        config = dataclasses.replace(config, sparsities=config.sparsities[:1], repetitions=2)
    run = _Run(config)
    complete = False
    try:
        for stage in STAGES:
            if stage in config.stages:
                getattr(run, stage)()
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
        print(f"<!-- table:bench_kernels_gpu -->\n{gpu_kernels.table(report)}<!-- /table -->")
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

    def _do(self, key: str, function: Any, limit: float | None = None, name: str = "") -> Any:
        """Runs a unit; `name` is of the implementation that may be left out when it hung before."""
        reserve = 0 if self._config.quick else RESERVE[key.split()[0]]
        group = f"{name} {gpu_layers.sources(name)}" if name else ""
        result = self._journal.run(key, function, reserve=reserve, limit=limit, group=group)
        jax.clear_caches()
        return result

    def _present(self) -> dict[str, Implementation]:
        return {name: one for name, one in self._found.items() if not isinstance(one, str)}

    def _checks(self) -> list[tuple[str, gpu_check.Unit, str]]:
        """The implementation, the unit and the key of every check; those of the timed arithmetic
        come first.
        """
        kind = gpu_layers.kind_of(self._config.dtype)
        units = [
            (name, unit)
            for name in self._present()
            for unit in gpu_check.units(self._config.quick, name)
        ]
        units.sort(key=lambda one: (one[1].kind != kind, one[0] == "xla"))
        return [
            (
                name,
                unit,
                f"check {self._where} {name} {gpu_layers.sources(name, unit.spec)} {unit.name} "
                f"{unit.kind}",
            )
            for name, unit in units
        ]

    def gate(self) -> None:
        kind = gpu_layers.kind_of(self._config.dtype)
        self.check([one for one in self._checks() if one[1].kind == kind and one[0] != "xla"])

    def check(self, which: list[tuple[str, gpu_check.Unit, str]] | None = None) -> None:
        which = self._checks() if which is None else which
        for name, unit, key in which:
            self._do(
                key,
                functools.partial(gpu_check.check, unit, self._present()[name]),
                unit.seconds,
                name,
            )
        wrong = self._wrong()
        for what, error in wrong.items():
            print(f"WRONG {what}: {error}", file=sys.stderr)
        if wrong and not self._config.keep_going:
            what, error = next(iter(wrong.items()))
            raise AssertionError(
                f"{len(wrong)} checks failed, nothing was timed (--keep-going times the others); "
                f"{what}: {error}"
            )

    def _wrong(self) -> dict[str, str]:
        """The checks that failed, and why."""
        found = {
            f"{name}, {unit.name}, {unit.kind}": self._journal.error(key)
            for name, unit, key in self._checks()
        }
        return {what: error for what, error in found.items() if error}

    def ceilings(self) -> None:
        for name in gpu_ceilings.ceilings(self._config.quick):
            self._do(
                f"ceiling {self._where} {name}",
                functools.partial(gpu_ceilings.measure_ceiling, name, self._config.quick),
            )
        for name in gpu_ceilings.KERNELS:
            self._do(
                self._kernel_key(name),
                functools.partial(gpu_ceilings.measure_kernel, name, self._config.quick),
            )

    def _kernel_key(self, name: str) -> str:
        return f"ceiling {self._where} {name} {gpu_layers.sources('mosaic_gpu')} {gpu_layers.sources('triton')}"

    def _spec(self, case: gpu_shapes.Case, sparsity: float) -> ConvSpec:
        config = self._config
        size = {
            "group_size": config.group_size,
            "channel_block": config.channel_block,
            "dtype": config.dtype,
        }
        kind = gpu_layers.kind_of(config.dtype)
        spec = gpu_shapes.case_spec(case, sparsity=sparsity, **size)
        return dataclasses.replace(spec, precision=gpu_check.KINDS[kind][1])

    def _timed(self) -> dict[str, Implementation]:
        """The GPU kernels that passed their checks; XLA's formulations where there is no other, as
        in a dry run.
        """
        if self._bad is None:
            kind = gpu_layers.kind_of(self._config.dtype)
            self._bad = {what.split(",")[0] for what in self._wrong() if what.endswith(f" {kind}")}
        right = {name: one for name, one in self._present().items() if name not in self._bad}
        return {name: one for name, one in right.items() if name != "xla"} or right

    def _keys(
        self, case: gpu_shapes.Case, spec: ConvSpec, sparsity: float
    ) -> tuple[str, dict[str, str]]:
        sizes = f"{case.name} {spec.dtype}"
        blocks = f"{sizes} {sparsity:g} {'x'.join(map(str, spec.packed_shape))} block {spec.channel_block}"
        return (
            f"dense {self._where} {sizes}",
            {
                name: f"sparse {self._where} {name} {gpu_layers.sources(name, spec)} {blocks}"
                for name in self._timed()
            },
        )

    def headline(self) -> None:
        goals = [case for case in self._cases if case.is_goal]
        self.layers(goals or self._cases[:1], self._config.sparsities[:1])

    def layers(
        self,
        cases: list[gpu_shapes.Case] | None = None,
        sparsities: tuple[float, ...] | None = None,
    ) -> None:
        config = self._config
        for sparsity in sparsities or config.sparsities:
            for case in cases or self._cases:
                spec = self._spec(case, sparsity)
                dense_key, keys = self._keys(case, spec, sparsity)
                self._do(
                    dense_key, functools.partial(gpu_layers.measure_dense, spec, config.repetitions)
                )
                kind, kernels = gpu_layers.kind_of(config.dtype), self._timed()
                for name, key in keys.items():
                    measure = functools.partial(
                        gpu_layers.measure_sparse,
                        spec,
                        name,
                        kernels[name],
                        kind,
                        config.repetitions,
                        config.threads,
                    )
                    self._do(key, measure, name=name)
                self._show(case, spec, sparsity)

    def _rows(
        self, case: gpu_shapes.Case, spec: ConvSpec, sparsity: float, about: dict[str, Any]
    ) -> list[dict[str, Any]]:
        dense_key, keys = self._keys(case, spec, sparsity)
        found = {name: self._journal.result(key) for name, key in keys.items()}
        self._failed |= {
            key: error for key in (dense_key, *keys.values()) if (error := self._journal.error(key))
        }
        if not (plain := self._journal.result(dense_key)):
            return []
        choice = choose_implementation(spec)
        tile = {
            "groups": spec.groups,
            "group_size": spec.group_size,
            "kept": spec.kept,
            "kept_taps": spec.kept_taps,
        }
        shape = {
            "input": spec.in_shape,
            "output": spec.out_shape,
            "kernel": spec.kernel,
            "strides": spec.strides,
            "dtype": spec.dtype,
        }
        about = {
            "layer": case.name,
            "sparsity": sparsity,
            "shape": shape,
            "density": round(spec.density, 5),
            "tile": tile | {"channel_block": spec.channel_block},
            "picked": {"implementation": choice.implementation, **choice.details},
        } | about
        return gpu_layers.rows(about, plain, {name: own for name, own in found.items() if own})

    def _show(self, case: gpu_shapes.Case, spec: ConvSpec, sparsity: float) -> None:
        for row in self._rows(case, spec, sparsity, {})[-1:]:
            us = {name: f"{1e3 * times['median']:.1f}" for name, times in row["ms"].items()}
            print(f"{case.name} {sparsity:.0%} {row['mode']}, us: {us}", flush=True)

    def report(self, complete: bool) -> dict[str, Any]:
        about = origin()
        rows = []
        for sparsity in self._config.sparsities:
            for case in self._cases:
                rows += self._rows(case, self._spec(case, sparsity), sparsity, about)
        checks = []
        for name, unit, key in self._checks():
            if key in self._journal.records:
                outcome = self._journal.result(key) or {
                    "error": self._journal.error(key) or "unfinished"
                }
                checks.append(
                    {"implementation": name, "shape": unit.name, "kind": unit.kind, **outcome}
                )
        names = [
            f"ceiling {self._where} {name}" for name in gpu_ceilings.ceilings(self._config.quick)
        ]
        names += map(self._kernel_key, gpu_ceilings.KERNELS)
        ceilings = [found for key in names if (found := self._journal.result(key))]
        told = {
            name: value
            for name, value in dataclasses.asdict(self._config).items()
            if name not in ("journal", "out")
        }
        absent = {name: one for name, one in self._found.items() if isinstance(one, str)}
        failed = (
            self._failed
            | self._wrong()
            | ({} if self._config.allow_absent or self._config.quick else absent)
        )
        return about | {
            "config": told,
            "complete": complete,
            "absent": absent,
            "failed": failed,
            "checks": checks,
            "ceilings": ceilings,
            "summary": summary(rows),
            "rows": rows,
        }


def run(config: GpuConfig) -> int:
    """The command.

    Args:
      config: what is timed.

    Returns:
      The exit status: 0, 1 when something failed, 2 for a wrong argument, 70 when the device is
      lost, 75 when time was up.
    """
    return exit_status(lambda: main(config))
