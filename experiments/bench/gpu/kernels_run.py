"""One process's part of the GPU kernel benchmark: its units, its stages and its report."""

import dataclasses
import functools
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from experiments.bench.gpu import ceilings, check, check_cases, implementations, layers, shapes
from experiments.bench.gpu.check_cases import CheckCase
from experiments.bench.gpu.fingerprint import implementation_key
from experiments.bench.gpu.float64 import KINDS, kind_of
from experiments.bench.gpu.journal import Journal
from experiments.bench.gpu.kernels_config import GpuConfig
from experiments.bench.gpu.layer_rows import rows as layer_rows
from experiments.bench.shapes import describe
from experiments.bench.summary import summary
from experiments.measuring.environment import origin
from experiments.reporting import results
from pallas_kernels.block_sparse_conv import ConvSpec, Implementation, choose_implementation
from pallas_kernels.devices import this_gpu

# Seconds that must be left for a unit, by its kind: the first word of its key.
RESERVE = {"check": 20, "ceiling": 20, "dense": 40, "sparse": 40}


class CheckUnit(NamedTuple):
    """A check of one implementation, and its key in the journal."""

    implementation: str
    case: CheckCase
    key: str

    @property
    def title(self) -> str:
        """What the report calls it."""
        return f"{self.implementation}, {self.case.name}, {self.case.kind}"


class LayerUnits(NamedTuple):
    """The keys of one layer's units in the journal: dense, and sparse by implementation."""

    dense: str
    sparse: dict[str, str]


class KernelsRun:
    """Runs the stages; every unit is in the journal, so that a later process continues.

    Args:
      config: what is timed.
    """

    def __init__(self, config: GpuConfig):
        self._config = config
        self._journal = Journal(config.journal, config.minutes)
        self._kind = kind_of(config.dtype)
        self._cases = shapes.cases(config.layers, config.quick)
        self._place = f"{this_gpu()} jax {jax.__version__}"
        records = implementations.implementations()
        self._present = {name: r for name, r in records.items() if isinstance(r, Implementation)}
        self._absent = {name: r for name, r in records.items() if isinstance(r, str)}
        self._wrong_names: set[str] | None = None
        for name, reason in self._absent.items():
            print(f"no {name}: {reason}", file=sys.stderr)

    # The stages.

    def gate(self) -> None:
        """Checks the GPU kernels in the arithmetic that is timed."""
        units = self._check_units()
        self._check(
            [
                unit
                for unit in units
                if unit.case.kind == self._kind and unit.implementation != "xla"
            ]
        )

    def check(self) -> None:
        """Checks everything."""
        self._check(self._check_units())

    def ceilings(self) -> None:
        """Measures what the device can do at most."""
        quick = self._config.quick
        for name in ceilings.ceilings(quick):
            self._run(
                self._ceiling_key(name), functools.partial(ceilings.measure_ceiling, name, quick)
            )
        for name in ceilings.KERNEL_CEILINGS:
            measure = functools.partial(ceilings.measure_kernel_ceiling, name, quick)
            self._run(self._kernel_ceiling_key(name), measure)

    def headline(self) -> None:
        """Times the layers of the goals at the first sparsity."""
        goals = [case for case in self._cases if case.is_goal]
        self._time(goals or self._cases[:1], self._config.sparsities[:1])

    def layers(self) -> None:
        """Times all layers at all sparsities."""
        self._time(self._cases, self._config.sparsities)

    # Units and their keys.

    def _run(
        self,
        key: str,
        function: Callable[[], Any],
        *,
        limit: float | None = None,
        implementation: str = "",
    ) -> Any:
        """Runs a unit of an implementation that is skipped once two of its units hung."""
        reserve = 0 if self._config.quick else RESERVE[key.split()[0]]
        group = ""
        if implementation:
            group = f"{implementation} {implementation_key(implementation)}"
        result = self._journal.run(key, function, reserve=reserve, limit=limit, group=group)
        jax.clear_caches()
        return result

    def _check_units(self) -> list[CheckUnit]:
        """All checks; those in the timed arithmetic come first, XLA's last."""
        units = []
        for name in self._present:
            for case in check_cases.check_cases(self._config.quick, name):
                sources = implementation_key(name, case.spec)
                key = f"check {self._place} {name} {sources} {case.name} {case.kind}"
                units.append(CheckUnit(name, case, key))
        return sorted(
            units, key=lambda unit: (unit.case.kind != self._kind, unit.implementation == "xla")
        )

    def _ceiling_key(self, name: str) -> str:
        return f"ceiling {self._place} {name}"

    def _kernel_ceiling_key(self, name: str) -> str:
        sources = " ".join(implementation_key(one) for one in ("mosaic_gpu", "triton"))
        return f"ceiling {self._place} {name} {sources}"

    def _layer_units(self, case: shapes.Case, spec: ConvSpec, sparsity: float) -> LayerUnits:
        sizes = f"{case.name} {spec.dtype}"
        packed = "x".join(map(str, spec.packed_shape))
        blocks = f"{sizes} {sparsity:g} {packed} block {spec.channel_block}"
        return LayerUnits(
            f"dense {self._place} {sizes}",
            {
                name: f"sparse {self._place} {name} {implementation_key(name, spec)} {blocks}"
                for name in self._timed_implementations()
            },
        )

    # The work.

    def _check(self, units: list[CheckUnit]) -> None:
        for unit in units:
            self._run(
                unit.key,
                functools.partial(check.check, unit.case, self._present[unit.implementation]),
                limit=unit.case.seconds,
                implementation=unit.implementation,
            )
        wrong = self._wrong()
        for title, error in wrong.items():
            print(f"WRONG {title}: {error}", file=sys.stderr)
        if wrong and not self._config.keep_going:
            title, error = next(iter(wrong.items()))
            raise AssertionError(
                f"{len(wrong)} checks failed, nothing was timed (--keep-going times the others); "
                f"{title}: {error}"
            )

    def _wrong(self) -> dict[str, str]:
        """The checks that failed, and why."""
        errors = {unit.title: self._journal.error(unit.key) for unit in self._check_units()}
        return {title: error for title, error in errors.items() if error}

    def _timed_implementations(self) -> dict[str, Implementation]:
        """The GPU kernels that passed their checks; XLA's if there is no other, as in a dry run."""
        if self._wrong_names is None:
            self._wrong_names = {
                unit.implementation
                for unit in self._check_units()
                if unit.case.kind == self._kind and self._journal.error(unit.key)
            }
        right = {
            name: record for name, record in self._present.items() if name not in self._wrong_names
        }
        return {name: record for name, record in right.items() if name != "xla"} or right

    def _spec(self, case: shapes.Case, sparsity: float) -> ConvSpec:
        spec = shapes.case_spec(
            case,
            sparsity=sparsity,
            group_size=self._config.group_size,
            channel_block=self._config.channel_block,
            dtype=self._config.dtype,
        )
        return dataclasses.replace(spec, precision=KINDS[self._kind][1])

    def _time(self, cases: list[shapes.Case], sparsities: tuple[float, ...]) -> None:
        config = self._config
        for sparsity in sparsities:
            for case in cases:
                spec = self._spec(case, sparsity)
                units = self._layer_units(case, spec, sparsity)
                self._run(
                    units.dense, functools.partial(layers.measure_dense, spec, config.repetitions)
                )
                records = self._timed_implementations()
                for name, key in units.sparse.items():
                    measure = functools.partial(
                        layers.measure_sparse,
                        spec,
                        name,
                        records[name],
                        self._kind,
                        config.repetitions,
                        config.threads,
                    )
                    self._run(key, measure, implementation=name)
                for row in self._rows(case, sparsity, {})[-1:]:
                    us = {name: f"{1e3 * t['median']:.1f}" for name, t in row["ms"].items()}
                    print(f"{case.name} {sparsity:.0%} {row['mode']}, us: {us}", flush=True)

    # The report.

    def _rows(
        self, case: shapes.Case, sparsity: float, about: dict[str, Any]
    ) -> list[dict[str, Any]]:
        """The rows of one layer, from what the journal holds."""
        spec = self._spec(case, sparsity)
        units = self._layer_units(case, spec, sparsity)
        dense = self._journal.result(units.dense)
        if not dense:
            return []
        sparse = {name: self._journal.result(key) for name, key in units.sparse.items()}
        choice = choose_implementation(spec)
        layer = {
            "layer": case.name,
            "sparsity": sparsity,
            **describe(spec),
            "picked": {"implementation": choice.implementation, **choice.details},
            **about,
        }
        return layer_rows(layer, dense, {name: r for name, r in sparse.items() if r})

    def _failed_timings(self) -> dict[str, str]:
        keys = []
        for sparsity in self._config.sparsities:
            for case in self._cases:
                units = self._layer_units(case, self._spec(case, sparsity), sparsity)
                keys += [units.dense, *units.sparse.values()]
        return {key: error for key in keys if (error := self._journal.error(key))}

    def _check_results(self) -> list[dict[str, Any]]:
        reports = []
        for unit in self._check_units():
            if unit.key not in self._journal.records:
                continue
            result = self._journal.result(unit.key)
            if not result:
                result = {"error": self._journal.error(unit.key) or "unfinished"}
            about = {
                "implementation": unit.implementation,
                "shape": unit.case.name,
                "kind": unit.case.kind,
            }
            reports.append(about | result)
        return reports

    def report(self, complete: bool) -> dict[str, Any]:
        """Returns the report of what the journal holds.

        Args:
          complete: whether every stage ran to its end.
        """
        config = self._config
        about = origin()
        rows = [
            row
            for sparsity in config.sparsities
            for case in self._cases
            for row in self._rows(case, sparsity, about)
        ]
        keys = [self._ceiling_key(name) for name in ceilings.ceilings(config.quick)]
        keys += [self._kernel_ceiling_key(name) for name in ceilings.KERNEL_CEILINGS]
        failed = self._failed_timings() | self._wrong()
        if not (config.allow_absent or config.quick):
            failed |= self._absent
        return about | {
            "config": results.settings(config),
            "complete": complete,
            "absent": self._absent,
            "failed": failed,
            "checks": self._check_results(),
            "ceilings": [result for key in keys if (result := self._journal.result(key))],
            "summary": summary(rows),
            "rows": rows,
        }
