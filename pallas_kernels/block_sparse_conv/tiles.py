"""Which formulation each pass of the XLA implementation runs: a tuned table on CPUs, a simple rule elsewhere."""

import functools
import json
import math
from pathlib import Path
from typing import Any

import jax

from pallas_kernels.block_sparse_conv.spec import ConvSpec

PASSES = ("forward", "input_gradient", "weight_gradient")
TABLE = Path(__file__).with_name("tuned_xla.json")
UNROLLED_GROUPS = 8  # compile time grows with the groups: beyond this many, only a loop or one batched product
GATHER_COST = 4  # the rule's price of a kept multiplication against a dense one


def supports(name: str, spec: ConvSpec) -> str | None:
    """Whether a formulation may be picked for a spec.

    Args:
      name: of the formulation.
      spec: the static sizes.

    Returns:
      None, or the reason why not.

    Example:
      >>> spec = ConvSpec(cin=8, height=5, width=5, batch=2, kernel=(3, 3), cout=8, groups=2, kept=4, kept_taps=3, group_size=4)
      >>> supports("rows", spec) is None
      True

    Reference: ours.
    """
    if name in ("rows", "taps") and spec.groups > UNROLLED_GROUPS:
        return f"unrolls {spec.groups} groups: more than {UNROLLED_GROUPS} compile slowly; use {name + '_loop'!r} or {name + '_batched'!r}"
    return None


@functools.lru_cache(maxsize=4096)
def choose(spec: ConvSpec, backend: str | None = None) -> dict[str, str]:
    """The formulation of each pass: the fastest at the nearest tuned shape (in log space), else by the rule.

    Args:
      spec: the static sizes.
      backend: "cpu", "gpu" or "tpu"; None: JAX's default.

    Returns:
      `{"forward": name, "input_gradient": name, "weight_gradient": name}`.

    Example:
      >>> spec = ConvSpec(cin=8, height=5, width=5, batch=2, kernel=(3, 3), cout=8, groups=2, kept=4, kept_taps=3, group_size=4)
      >>> choose(spec, "tpu")["forward"]
      'rows_batched'

    Reference: ours.
    """
    table = _table()
    if (backend or jax.default_backend()) != table["environment"]["device"]:
        return dict.fromkeys(PASSES, _rule(spec))
    here = features(spec)
    entry = min(table["entries"], key=lambda e: math.dist(here, e["features"]))
    return {p: _fastest(entry["milliseconds"][p], spec) for p in PASSES}


def features(spec: ConvSpec) -> list[float]:
    """What the choice depends on, in log2: pixels, images, channels, groups, and the packed block's sides.

    Args:
      spec: the static sizes.

    Returns:
      A point; its distance to a tuned point says how alike two convolutions are.

    Example:
      >>> spec = ConvSpec(cin=8, height=4, width=4, batch=2, kernel=(1, 1), cout=8, groups=2, kept=4, kept_taps=1, group_size=4)
      >>> features(spec)
      [4.0, 1.0, 3.0, 1.0, 2.0, 0.0, 2.0, 0.0]

    Reference: ours.
    """
    sides = (
        spec.out_height * spec.out_width,
        spec.batch,
        spec.cin,
        spec.groups,
        max(1, spec.kept),
        max(1, spec.kept_taps),
        spec.group_size,
        math.prod(spec.strides),
    )
    return [round(math.log2(s), 3) for s in sides]


def _fastest(milliseconds: dict[str, float], spec: ConvSpec) -> str:
    return min((name for name in milliseconds if supports(name, spec) is None), key=milliseconds.__getitem__)


def _rule(spec: ConvSpec) -> str:
    """One batched product over the groups while its gathers pay; the side that gathers and multiplies fewer rows."""
    if spec.density * GATHER_COST > 1:
        return "dense"
    return "rows_batched" if spec.strides != (1, 1) or spec.kept <= spec.group_size else "taps_batched"


@functools.cache
def _table() -> dict[str, Any]:
    return json.loads(TABLE.read_text())
