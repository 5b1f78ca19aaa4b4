"""All implementations, and which one runs where the caller names none."""

import dataclasses
import types

import jax

from pallas_kernels.block_sparse_conv import (
    cpu,
    cpu_times,
    gpu_times,
    mosaic_gpu,
    reference,
    triton,
    xla,
)
from pallas_kernels.block_sparse_conv.cpu.tiles import native_gain
from pallas_kernels.block_sparse_conv.spec import ConvSpec, Implementation
from pallas_kernels.block_sparse_conv.xla.tiles import choose

BACKENDS: tuple[types.ModuleType, ...] = (xla, cpu, reference, triton, mosaic_gpu)
IMPLEMENTATIONS: dict[str, Implementation] = {
    backend.IMPLEMENTATION.name: backend.IMPLEMENTATION for backend in BACKENDS
}
GPU_KERNELS = ("triton", "mosaic_gpu")
"""In the order in which untuned shapes prefer them: Triton takes any list, and reads plans."""


@dataclasses.dataclass(frozen=True)
class Choice:
    """What `implementation=None` picks for a spec, and why.

    Attributes:
      implementation: its name, for the spec as it is.
      reason: one line.
      details: the formulation that runs, `{"forward": ..., "forward + gradients": ...}`.
    """

    implementation: str
    reason: str
    details: dict[str, str]


def available_implementations() -> dict[str, str | None]:
    """The implementations by name: None for one that can be used, else the reason why not.

    Returns:
      `{name: None | reason}`.

    Example:
      >>> available_implementations()["xla"] is None
      True
    """
    reasons: dict[str, str | None] = dict.fromkeys(IMPLEMENTATIONS)
    for backend in BACKENDS:
        if hasattr(backend, "unavailable"):
            reasons[backend.IMPLEMENTATION.name] = backend.unavailable()
    return reasons


def reads_plans(implementation: str | None) -> bool:
    """Whether an implementation reads plans, so that it pays to make them.

    Args:
      implementation: a name, or None to choose: on a GPU that may be one that reads plans.

    Returns:
      A bool.

    Example:
      >>> reads_plans("triton"), reads_plans("xla")
      (True, False)
    """
    if implementation is None:
        return any(backend.unavailable() is None for backend in (triton, mosaic_gpu))
    return bool(IMPLEMENTATIONS[implementation].plans)


def fuses_norms(implementation: str | None) -> bool:
    """Whether an implementation has the passes between batch norms (`norm_act_conv`).

    Args:
      implementation: a name, or None to choose: on a GPU that may be one that has them.

    Returns:
      A bool.

    Example:
      >>> fuses_norms("triton"), fuses_norms("cpu")
      (True, False)
    """
    if implementation is None:
        absent = available_implementations()
        return any(one.fuses_norms and not absent[name] for name, one in IMPLEMENTATIONS.items())
    return IMPLEMENTATIONS[implementation].fuses_norms


def why_dense() -> str | None:
    """Why this platform runs every convolution dense where the caller names no implementation.

    Returns:
      The reason; None on platforms where sparse convolutions are chosen by their sizes.

    Example:
      >>> why_dense() is None or "TPU" in why_dense()
      True
    """
    if jax.default_backend() != "tpu":
        return None
    return (
        "there are no TPU kernels yet, and XLA's sparse formulations access more memory than the "
        "dense convolution: 2.8 times as many bytes in a training step of VGG-19, compiled for a "
        "v5e; they run by name: 'xla'"
    )


def choose_implementation(spec: ConvSpec) -> Choice:
    """What `implementation=None` picks for a convolution, and why.

    There is one choice where no gradients follow, and one where they do. On a GPU that the kernels
    can run on, it is what took least time by the GPU's table or, for other shapes, by a rule (see
    `gpu_times`), "dense" where that is cuDNN.

    Args:
      spec: the static sizes, and whether the gradients follow.

    Returns:
      The name, the reason, and the formulation that runs without and with gradients.

    Example:
      >>> spec = ConvSpec(cin=8, height=5, width=5, batch=2, kernel=(3, 3), cout=8, groups=2,
      ...                 kept=4, kept_taps=3, group_size=4)
      >>> choose_implementation(spec).implementation in ("cpu", "xla", "dense")
      True
    """
    if reason := why_dense():
        return Choice("dense", reason, dict.fromkeys(cpu_times.MODES, "dense"))
    by_mode = {
        mode: dataclasses.replace(spec, gradients=gradients)
        for mode, gradients in cpu_times.MODES.items()
    }
    kernels = [name for name in GPU_KERNELS if IMPLEMENTATIONS[name].supports(spec) is None]
    if kernels:
        picks = {mode: gpu_times.pick(one, kernels) for mode, one in by_mode.items()}
        name, reason = picks[cpu_times.mode(spec)]
        return Choice(name, reason, {mode: picked for mode, (picked, _) in picks.items()})
    details = {mode: choose(one) for mode, one in by_mode.items()}
    if absent := cpu.IMPLEMENTATION.supports(spec):
        reason = f"the one that does just the kept work here; 'cpu': {absent}"
        return Choice("xla", reason, details)
    for mode, one in by_mode.items():
        if native_gain(one) >= 1:
            details[mode] = cpu.instructions(spec)
    gain = native_gain(spec)
    if gain < 1:
        reason = f"1/{1 / gain:.2f} the time of the native kernels at the tuned shapes nearby"
        return Choice("xla", reason, details)
    reason = f"the native kernels: {gain:.1f}x as fast as XLA at the tuned shapes nearby"
    return Choice("cpu", reason, details)


def resolve(spec: ConvSpec, implementation: str | Implementation | None) -> Implementation:
    """The record of an implementation that runs a convolution.

    Args:
      spec: the static sizes.
      implementation: a name, a record, or None to choose.

    Returns:
      The record.

    Raises:
      ValueError: there is no implementation of that name.
      NotImplementedError: it cannot run this convolution; the message says why.

    Example:
      >>> spec = ConvSpec(cin=8, height=5, width=5, batch=2, kernel=(3, 3), cout=8, groups=2,
      ...                 kept=4, kept_taps=3, group_size=4)
      >>> resolve(spec, "xla").name
      'xla'
    """
    if implementation is None:
        implementation = choose_implementation(spec).implementation
    if isinstance(implementation, Implementation):
        record = implementation
    elif implementation in IMPLEMENTATIONS:
        record = IMPLEMENTATIONS[implementation]
    else:
        names = ", ".join(map(repr, IMPLEMENTATIONS))
        raise ValueError(f"implementation: expected None or one of {names}, got {implementation!r}")
    if reason := record.supports(spec):
        raise NotImplementedError(f"implementation={record.name!r}: {reason}")
    return record
