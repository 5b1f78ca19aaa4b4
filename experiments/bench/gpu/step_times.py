"""Checks and times one training step on a GPU."""

import functools
from collections.abc import Callable
from typing import Any

import jax

from experiments.bench.gpu.fallback import Fallback
from experiments.bench.gpu.fingerprint import implementation_key
from experiments.bench.gpu.journal import Journal
from experiments.bench.gpu.step_check import Sketch, check_layer, check_updates, sketch
from experiments.bench.gpu.step_setup import STEP, set_up
from experiments.bench.gpu.training_units import StepOptions, Unit
from experiments.measuring.timing import median_iqr, time_in_turn, timed
from experiments.training.execution import masks_of, to_form
from experiments.training.stepper import stepper
from pallas_kernels.devices import this_gpu

LAYER_SECONDS = 60  # after which the check of a layer hangs
BURST_MS = 300.0  # of steps with one wait at their end


def measure_steps(
    options: StepOptions, unit: Unit, masked_updates: Sketch | None, journal: Journal
) -> dict[str, Any]:
    """Checks and times the training step of one execution.

    Args:
      options: of all steps.
      unit: the step.
      masked_updates: the sketch of the first step in the masked execution.
      journal: keeps the checks of the layers, units inside of this one.

    Returns:
      The first loss, milliseconds of a step (median, interquartile range), and how many steps stand
      before one wait. For masked, also the first step's sketch; for sparse and packed, which
      implementation serves how many layers, and how near the first step is to the masked one.

    Raises:
      AssertionError: a layer is wrong, or the first step differs from the masked one.
    """
    if not unit.implementation:
        return _measure(options, unit, None, lambda updates: {"sketch": updates})
    fallback = Fallback(unit.implementation)
    title = f"{unit.execution}, {unit.implementation}"

    def check(updates: Sketch) -> dict[str, Any]:
        check_layers(fallback, journal, title)
        return {"cosine": check_updates(title, updates, masked_updates, options.precision)}

    with fallback.registered() as name:
        result = _measure(options, unit, name, check)
    return result | {"layers": fallback.layers(), "refused": fallback.refused}


def check_layers(fallback: Fallback, journal: Journal, title: str) -> None:
    """Compares every convolution of a step that was traced with float64.

    Args:
      fallback: served the step.
      journal: keeps the checks.
      title: of the step, for the message.

    Raises:
      AssertionError: a layer is wrong.
    """
    for spec, record in fallback.specs.items():
        if record.name == "dense":
            continue
        sources = implementation_key(record.name, spec)
        key = f"layer {this_gpu()} jax {jax.__version__} {record.name} {sources} {spec}"
        check = functools.partial(check_layer, spec, record)
        if not journal.run(key, check, limit=LAYER_SECONDS):
            raise AssertionError(f"{title}: {journal.error(key)}")


def _measure(
    options: StepOptions,
    unit: Unit,
    implementation: str | None,
    check: Callable[[Sketch], dict[str, Any]],
) -> dict[str, Any]:
    """Runs the first step, checks its updates and times the following ones."""
    trainer, state, images, labels = set_up(options, unit, implementation)
    step = stepper(trainer, state, STEP, images, labels)
    after, metrics = step()
    result: dict[str, Any] = {"loss": float(metrics.loss)}
    before_params, after_params = (to_form("masked", one).params for one in (state, after))
    result |= check(sketch(before_params, after_params, masks_of(state)))
    del state, after
    return result | _time(step, options)


def _time(step: Callable[[], Any], options: StepOptions) -> dict[str, Any]:
    """Times bursts of steps, with one wait at the end of each."""

    def last(steps: int) -> Any:
        for _ in range(steps):
            output = step()
        return output

    def burst(steps: int) -> float:
        return timed(functools.partial(last, steps))() / steps

    burst(2)
    steps = steps_in_burst(burst(3), options)
    bursts = {"step": functools.partial(burst, steps)}
    times_ms = time_in_turn(bursts, rounds=options.repetitions, burst_ms=0)["step"]
    median, iqr = median_iqr(times_ms)
    return {
        "step_ms_median": median,
        "step_ms_iqr": iqr,
        "steps": steps,
        "repetitions": options.repetitions,
    }


def steps_in_burst(step_ms: float, options: StepOptions) -> int:
    """Returns how many steps stand before one wait.

    Args:
      step_ms: milliseconds of a step.
      options: says whether it is a dry run.

    Example:
      >>> options = StepOptions("bfloat16", 64, 16, 7, quick=False)
      >>> [steps_in_burst(step_ms, options) for step_ms in (1.0, 10.0, 500.0)]
      [100, 30, 3]
    """
    return 2 if options.quick else int(min(100, max(3, BURST_MS / step_ms)))
