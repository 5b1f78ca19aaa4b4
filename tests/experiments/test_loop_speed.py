"""The loop of a run: it waits for the device once a window, and one program can make more steps.

Also the benchmarks of the loop and of the data path.
"""

import dataclasses
import itertools
import json
import operator

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.array import ArrayImpl
from tiny_runs import PER_EPOCH, assert_same_run, config

from experiments.bench import data, loop, seeds
from experiments.measuring import timing
from experiments.reporting import tables
from experiments.training.execution import copied
from experiments.training.loop import Trainer
from experiments.training.run import Run
from experiments.training.stepper import stepper, stepper_of_seeds


@pytest.fixture
def waits(monkeypatch):
    """Counts how often the host waits for the device or reads a value of it."""
    count = []

    def counted(function):
        return lambda *args: count.append(function) or function(*args)

    monkeypatch.setattr(timing, "LONGEST_WAIT_MS", float("inf"))  # the machine may be slow
    monkeypatch.setattr(jax, "block_until_ready", counted(jax.block_until_ready))
    monkeypatch.setattr(jax, "device_get", counted(jax.device_get))
    monkeypatch.setattr(ArrayImpl, "_value", property(counted(ArrayImpl._value.fget)))
    return count


@pytest.mark.parametrize("together", [1, 2])
def test_between_two_rows_of_metrics_nothing_waits_and_nothing_is_sent(tmp_path, waits, together):
    run = Run(config(tmp_path, log_every=PER_EPOCH, steps_per_dispatch=together))
    run.train(stop_after=PER_EPOCH)
    dispatches = run._dispatches(None)
    next(dispatches)
    run._fetch()
    waits.clear()
    with jax.transfer_guard("disallow_explicit"):
        while run.step < 2 * PER_EPOCH - 1:
            next(dispatches)
            assert not waits
    run._fetch()
    assert waits
    next(dispatches)
    assert len(run._timer.milliseconds(("packed", run._parameters))) >= PER_EPOCH


def test_the_host_hears_of_a_long_step_before_it_makes_the_next():
    timer = timing.StepTimer(warm_up=0)
    timer._times_ms["step"].append(timing.LONGEST_WAIT_MS)
    timer.time("step", 0, lambda: jnp.ones(3))
    assert timer._steps == 0  # none is under way


@pytest.mark.parametrize(
    ("method", "execution"),
    [("hrbp", "packed"), pytest.param("dense", "masked", marks=pytest.mark.slow)],
)
def test_steps_of_one_program_are_the_steps_one_by_one(tmp_path, monkeypatch, method, execution):
    """Up to rounding. The images are noise, since digits make ties in max pools, and the compiler
    optimizes, since the suite's flags round so that the second step's gradients depend on fusion.
    """
    run = Run(config(tmp_path, method, sparsity=None, execution=execution, lr=1e-3))
    trainer = run.trainer
    optimized = {"xla_backend_optimization_level": 3}
    for name, function, static in (
        ("_step", trainer.train_step, "dense_gradient"),
        ("_steps", trainer._train_steps, "count"),
    ):
        jitted = jax.jit(function, static_argnames=static, compiler_options=optimized)
        monkeypatch.setattr(trainer, name, jitted)
    noise = np.random.default_rng(0).integers(0, 256, run.data.train.x.shape, np.uint8)
    noisy = dataclasses.replace(run.data, train=run.data.train._replace(x=jnp.asarray(noise)))
    start = 0, run.config.batch_size, run.config.seed, 2
    state, before, losses, right = copied(run.state), copied(run.state.params), [], []
    for step, batch in enumerate(itertools.islice(noisy.train_batches(*start), 3)):
        state, metrics = run.trainer.step(state, step, *batch)
        losses.append(metrics.loss)
        right.append(metrics.correct)
    together, metrics, rest = run.trainer.steps(run.state, noisy.train_rest(*start), 3)
    np.testing.assert_allclose(metrics.loss, losses, rtol=1e-5)
    np.testing.assert_allclose(metrics.correct, right, atol=1)
    assert jax.tree.structure(together) == jax.tree.structure(state)
    first, one, several = (
        np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(params)])
        for params in (before, state.params, together.params)
    )
    assert np.linalg.norm(several - one) < 0.01 * np.linalg.norm(one - first)
    images, labels = rest.split()[0]
    expected_images, expected_labels = next(noisy.train_batches(*start[:3], 5))
    np.testing.assert_array_equal(images, expected_images)
    np.testing.assert_array_equal(labels, expected_labels)


def test_a_run_keeps_its_rows_and_mask_updates_when_steps_go_together(tmp_path, monkeypatch):
    """Also when it is resumed with steps one by one. They are made one by one, to be the same."""
    dispatched = []

    def steps(trainer, state, rest, count):
        first, metrics = runs[-1].step, []
        dispatched.append((first, count))
        for step in range(first, first + count):
            batch, rest = rest.split()
            state, of_step = trainer.step(state, step, *batch)
            metrics.append(of_step)
        return state, jax.tree.map(lambda *numbers: jnp.stack(numbers), *metrics), rest

    fields = {"execution": "masked", "checkpoint_every": 5}
    runs = [Run(config(tmp_path, "rigl", out=str(tmp_path / "one"), **fields))]
    runs[0].train()
    monkeypatch.setattr(Trainer, "steps", steps)
    settings = config(tmp_path, "rigl", steps_per_dispatch=2, **fields)
    runs.append(Run(settings))
    runs[-1].train(stop_after=PER_EPOCH + 3)
    updates = [step for step in range(PER_EPOCH + 3) if not runs[0].trainer.needs.plain(step)]
    assert updates
    assert len(dispatched) >= 3
    assert {count for _, count in dispatched} == {2}
    for first, count in dispatched:
        inside = range(first + 1, first + count)
        assert not any(step % n == 0 for step in inside for n in (4, PER_EPOCH))
        assert not set(updates) & {first, *inside}
    runs.append(Run(dataclasses.replace(settings, steps_per_dispatch=1), resume=True))
    runs[-1].train()
    assert_same_run(runs[-1], runs[0])


def test_the_loop_is_timed_beside_its_bare_step(tmp_path):
    out = tmp_path / "bench_loop_cpu.json"
    report = loop.main(loop.Config(quick=True, out=str(out)))
    assert json.loads(out.read_text()) == json.loads(json.dumps(report))
    (row,) = report["rows"]
    assert row["turns"] == 2
    assert row["bare_step_ms"] > 0
    assert row["loop_step_ms"] > 0
    assert row["test_images_per_second"] > 0
    assert f"| {row['overhead_percent']:+.1f}% (iqr " in tables.table("bench_loop_cpu", tmp_path)


@pytest.mark.slow
def test_seeds_are_timed_in_turn_side_by_side_and_at_once(tmp_path):
    out = tmp_path / "bench_seeds_cpu.json"
    report = seeds.main(seeds.Config(quick=True, out=str(out)))
    assert json.loads(out.read_text()) == json.loads(json.dumps(report))
    masked, packed = report["rows"]
    assert (masked["execution"], packed["execution"]) == ("masked", "packed")
    assert all(masked[f"{way}_ms"] > 0 for way in ("in_turn", "side_by_side", "at_once"))
    assert packed["at_once_ms"] is None
    assert tables.table("bench_seeds_cpu", tmp_path).count("| — |") == 1


def test_seeds_at_once_train_as_they_do_alone():
    case = seeds.QUICK_CASES[0]
    trainers = [seeds._trainer(case, seed) for seed in (0, 1)]
    batches = [seeds._batch(case, seed) for seed in (0, 1)]
    states = [trainer.init(batch) for trainer, batch in zip(trainers, batches, strict=True)]
    together, _ = stepper_of_seeds(trainers[0], states, *map(jnp.stack, zip(*batches)))()
    for seed in (0, 1):
        alone, _ = stepper(trainers[seed], states[seed], seeds.STEP, *batches[seed])()
        chex.assert_trees_all_close(
            jax.tree.map(operator.itemgetter(seed), together.params),
            alone.params,
            rtol=1e-4,
            atol=1e-5,
        )


def test_the_data_path_is_timed_beside_decoding(tmp_path):
    out = tmp_path / "bench_data_cpu.json"
    report = data.main(data.Config(quick=True, out=str(out)))
    assert json.loads(out.read_text()) == json.loads(json.dumps(report))
    floor, *rest = report["rows"]
    assert floor["of_the_floor"] == 1
    for row in rest:
        ratio = row["images_per_second_and_core"] / floor["images_per_second_and_core"]
        assert row["of_the_floor"] == pytest.approx(ratio, abs=2e-3, rel=0.01)
    assert "| decode, crop | 1 | " in tables.table("bench_data_cpu", tmp_path)


def test_synthetic_images_have_the_size_of_imagenet_files():
    examples = data.Synthetic(100)
    pixels, label = data.decoded(examples[99])
    assert pixels.shape == (375, 500, 3)
    assert label == 99 % data.DISTINCT
    assert 50_000 < len(examples[99]["image"]) < 200_000
