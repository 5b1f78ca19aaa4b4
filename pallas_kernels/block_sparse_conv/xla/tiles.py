"""Which formulation the XLA implementation runs.

On a CPU the fastest by the measured times, elsewhere that of a simple rule.
"""

import functools

import jax

from pallas_kernels.block_sparse_conv import cpu_times
from pallas_kernels.block_sparse_conv.spec import ConvSpec

MOST_UNROLLED_GROUPS = 8
"""More groups run in a loop or in one batched product: compile time grows with unrolled groups."""
GATHER_COST = 4
"""The rule's price of a kept multiplication, whose rows are gathered, against a dense one."""


def supports(name: str, spec: ConvSpec) -> str | None:
    """Whether a formulation may be picked for a spec.

    Args:
      name: of the formulation.
      spec: the static sizes.

    Returns:
      None, or the reason why not.

    Example:
      >>> spec = ConvSpec(cin=8, height=5, width=5, batch=2, kernel=(3, 3), cout=8, groups=2,
      ...                 kept=4, kept_taps=3, group_size=4)
      >>> supports("rows", spec) is None
      True
    """
    if name in ("rows", "taps") and spec.groups > MOST_UNROLLED_GROUPS:
        return (
            f"unrolls {spec.groups} groups: more than {MOST_UNROLLED_GROUPS} compile slowly; use "
            f"{name + '_loop'!r} or {name + '_batched'!r}"
        )
    return None


@functools.lru_cache(maxsize=4096)
def choose(spec: ConvSpec, backend: str | None = None) -> str:
    """The formulation for a spec: the fastest by the measured times, else by the rule.

    The fastest has the least weighted mean of `log(time / best time)` over the tuned shapes nearby
    (`cpu_times.weights`).

    Args:
      spec: the static sizes, and whether the gradients follow.
      backend: "cpu", "gpu" or "tpu"; None: JAX's default.

    Returns:
      The name of the formulation.

    Example:
      >>> spec = ConvSpec(cin=8, height=5, width=5, batch=2, kernel=(3, 3), cout=8, groups=2,
      ...                 kept=4, kept_taps=3, group_size=4)
      >>> choose(spec, "tpu")
      'rows_batched'
    """
    table = cpu_times.read()
    if (backend or jax.default_backend()) != table["environment"]["device"]:
        return _rule(spec)
    mode = cpu_times.mode(spec)
    times = [cpu_times.formulations(entry["milliseconds"][mode]) for entry in table["entries"]]
    loss = cpu_times.losses(times, cpu_times.weights(spec))
    return min((name for name in loss if supports(name, spec) is None), key=loss.__getitem__)


def _rule(spec: ConvSpec) -> str:
    """One batched product over the groups while its gathers pay off, else dense.

    It shifts on the side that gathers and multiplies fewer rows.
    """
    if spec.density * GATHER_COST > 1:
        return "dense"
    if spec.strides != (1, 1) or spec.kept <= spec.group_size:
        return "rows_batched"
    return "taps_batched"
