"""Which formulation the XLA implementation runs, and whether the native kernels are faster: a tuned
table on CPUs, else a simple rule.
"""

import functools
import json
import math
from collections import defaultdict
from typing import Any

import jax

from pallas_kernels.block_sparse_conv.devices import FOLDER
from pallas_kernels.block_sparse_conv.spec import ConvSpec

MODES = {
    "forward": False,
    "forward + gradients": True,
}  # what is measured, and `ConvSpec.gradients`
TABLE = FOLDER / "tuned_xla_cpu.json"
NATIVE = "cpu"  # the native kernels' name in the table
UNROLLED_GROUPS = (
    8  # compile time grows with the groups: beyond this many, only a loop or one batched product
)
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
    """
    if name in ("rows", "taps") and spec.groups > UNROLLED_GROUPS:
        return f"unrolls {spec.groups} groups: more than {UNROLLED_GROUPS} compile slowly; use {name + '_loop'!r} or {name + '_batched'!r}"
    return None


@functools.lru_cache(maxsize=4096)
def choose(spec: ConvSpec, backend: str | None = None) -> str:
    """The formulation for a spec: the fastest at the tuned shapes nearby, else by the rule.

    Each tuned shape at distance d (in log space, see `features`) votes with the weight `exp(-2
    d^2)`; the least mean of `log(time / best time)` wins. Neighbours smooth the noise of single
    measurements.

    Args:
      spec: the static sizes, and whether the gradients follow.
      backend: "cpu", "gpu" or "tpu"; None: JAX's default.

    Returns:
      Its name.

    Example:
      >>> spec = ConvSpec(cin=8, height=5, width=5, batch=2, kernel=(3, 3), cout=8, groups=2, kept=4, kept_taps=3, group_size=4)
      >>> choose(spec, "tpu")
      'rows_batched'
    """
    table = _table()
    if (backend or jax.default_backend()) != table["environment"]["device"]:
        return _rule(spec)
    mode = _mode(spec)
    return _fastest(
        spec, [_xla(entry["milliseconds"][mode]) for entry in table["entries"]], _weights(spec)
    )


@functools.lru_cache(maxsize=4096)
def native_gain(spec: ConvSpec) -> float:
    """How many times as fast as the best XLA formulation the native CPU kernels are, by the same
    votes.

    In the forward pass, or, where the spec's gradients follow, in all three. The table was measured
    with 512-bit vectors in float32, on both sides; the same ratio is taken for CPUs whose vectors
    are shorter, which slows both sides down, and for bfloat16, which XLA widens.

    Args:
      spec: the static sizes, and whether the gradients follow.

    Returns:
      The weighted geometric mean of `XLA's time / native time`.

    Example:
      >>> spec = ConvSpec(cin=8, height=5, width=5, batch=2, kernel=(3, 3), cout=8, groups=2, kept=4, kept_taps=3, group_size=4)
      >>> native_gain(spec) > 0
      True
    """
    mode, logs, total = _mode(spec), 0.0, 0.0
    for entry, weight in zip(_table()["entries"], _weights(spec)):
        milliseconds = entry["milliseconds"][mode]
        if NATIVE in milliseconds:
            logs += weight * math.log(min(_xla(milliseconds).values()) / milliseconds[NATIVE])
            total += weight
    return math.exp(logs / total) if total else 1.0


def _mode(spec: ConvSpec) -> str:
    return next(mode for mode, gradients in MODES.items() if gradients == spec.gradients)


def _xla(milliseconds: dict[str, float]) -> dict[str, float]:
    return {name: ms for name, ms in milliseconds.items() if name != NATIVE}


def _weights(spec: ConvSpec) -> list[float]:
    """The votes of the tuned shapes."""
    here = features(spec)
    distances = [math.dist(here, entry["features"]) ** 2 for entry in _table()["entries"]]
    return [math.exp(2 * (min(distances) - d)) for d in distances]


def features(spec: ConvSpec) -> list[float]:
    """What the choice depends on, in log2: pixels, images, channels, groups, and the packed block's
    sides.

    Args:
      spec: the static sizes.

    Returns:
      A point; its distance to a tuned point says how alike two convolutions are.

    Example:
      >>> spec = ConvSpec(cin=8, height=4, width=4, batch=2, kernel=(1, 1), cout=8, groups=2, kept=4, kept_taps=1, group_size=4)
      >>> features(spec)
      [4.0, 1.0, 3.0, 1.0, 2.0, 0.0, 2.0, 0.0]
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


def _fastest(spec: ConvSpec, measured: list[dict[str, float]], weights: list[float]) -> str:
    """The formulation with the least weighted mean of `log(time / best time)`."""
    loss, votes = defaultdict[str, float](float), defaultdict[str, float](float)
    for milliseconds, weight in zip(measured, weights):
        best = min(milliseconds.values())
        for name in milliseconds:
            loss[name] += weight * math.log(milliseconds[name] / best)
            votes[name] += weight
    return min(
        (name for name in loss if votes[name] > 0 and supports(name, spec) is None),
        key=lambda name: loss[name] / votes[name],
    )


def _rule(spec: ConvSpec) -> str:
    """One batched product over the groups while its gathers pay; the side that gathers and
    multiplies fewer rows.
    """
    if spec.density * GATHER_COST > 1:
        return "dense"
    return (
        "rows_batched" if spec.strides != (1, 1) or spec.kept <= spec.group_size else "taps_batched"
    )


@functools.cache
def _table() -> dict[str, Any]:
    return json.loads(TABLE.read_text())
