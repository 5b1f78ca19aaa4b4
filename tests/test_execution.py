"""Masked, sparse and packed execution of one training run are one run: equal losses, masks and weights."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache

import blocksparse_jax as bsj
from experiments.config import TrainConfig, resolve
from experiments.data import load
from experiments.loop import Trainer
from experiments.methods import METHODS, Length

STEPS = 50
BASE = TrainConfig(model="cnn", width=0.25, sparsity=0.8, group_size=16, block=16, batch_size=16, update_every=10, epochs=1, lr=0.02)


@pytest.fixture(scope="module", autouse=True)
def compile_cache(tmp_path_factory):
    """Equal programs of different trainers are compiled once."""
    for directory, seconds in ((str(tmp_path_factory.mktemp("jax")), 0.1), (None, 1.0)):
        jax.config.update("jax_compilation_cache_dir", directory)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", seconds)
        compilation_cache.reset_cache()
        if directory:
            yield


def trainer_of(**options):
    config = resolve(dataclasses.replace(BASE, **options))
    return Trainer(config, (8, 8, 1), 10, Length(STEPS, STEPS))


def train(**options):
    trainer = trainer_of(**options)
    state, losses = trainer.init(), []
    for step, (images, labels) in enumerate(load("digits").train_batches(0, 16, 0)):
        if step == STEPS:
            break
        state, metrics = trainer.step(state, step, images, labels)
        losses.append(float(metrics.loss))
    return trainer, state, np.array(losses)


@pytest.mark.parametrize(
    ("method", "optimizer"),
    [("hrbp", "sgd"), ("hrbp", "adam"), ("hrbp-dynamic", "sgd"), ("hrbp-dynamic", "adam"), ("subp", "sgd"), ("random-channel", "sgd")],
)
def test_executions_agree(method, optimizer):
    lr = {"sgd": 0.02, "adam": 1e-3}[optimizer]
    runs = {e: train(method=method, optimizer=optimizer, lr=lr, execution=e) for e in ("masked", "sparse", "packed")}
    _, masked_state, losses = runs["masked"]
    assert losses.min() < 0.95 * losses[0]
    assert [run[1].form for run in runs.values()] == ["masked", "sparse", "packed"]
    masks = runs["masked"][0].masks(masked_state)
    for trainer, state, other in runs.values():
        np.testing.assert_allclose(other, losses, atol=1e-4)
        jax.tree.map(np.testing.assert_array_equal, trainer.masks(state), masks)
        kept = jax.tree.map(jnp.multiply, trainer.to("masked", state).params, masks)
        expected = jax.tree.map(jnp.multiply, masked_state.params, masks)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-3), kept, expected)


def test_dynamic_masks_move_only_at_topology_steps():
    trainer = trainer_of(method="hrbp-dynamic", execution="packed", drop_fraction=0.9)
    state, moved = trainer.init(), []
    masks = trainer.masks(state)
    for step, (images, labels) in enumerate(load("digits").train_batches(0, 16, 0)):
        if step == 40:
            break
        state, _ = trainer.step(state, step, images, labels)
        before, masks = masks, trainer.masks(state)
        if not all(bool((a == b).all()) for a, b in zip(jax.tree.leaves(before), jax.tree.leaves(masks), strict=True)):
            moved.append(step)
    assert moved == [10, 20, 30]  # not 40 and on: the last quarter of training keeps its masks


def test_packed_state_shrinks_with_the_density():
    dense, packed = trainer_of(method="dense").init(), trainer_of(method="hrbp", execution="packed").init()

    def floats(tree):
        return sum(leaf.size for leaf in jax.tree.leaves(tree) if jnp.issubdtype(leaf.dtype, jnp.floating))

    for part in ("params", "opt_state"):
        assert floats(getattr(packed, part)) < 0.35 * floats(getattr(dense, part))


def test_to_is_exact_both_ways():
    trainer = trainer_of(method="hrbp", execution="packed")
    state = trainer.init()
    images, labels = next(load("digits").train_batches(0, 16, 0))
    state, _ = trainer.step(state, 0, images, labels)
    again = trainer.to("packed", trainer.to("sparse", state))
    jax.tree.map(np.testing.assert_array_equal, jax.tree.leaves(state), jax.tree.leaves(again))
    assert jax.tree.structure(state) == jax.tree.structure(again)


def test_new_masks_do_not_recompile():
    trainer = trainer_of(method="hrbp-dynamic", execution="packed")
    state = trainer.init()
    traces = []
    body = trainer._train_step

    @functools.wraps(body)
    def counted(*args, **kwargs):
        traces.append(1)
        return body(*args, **kwargs)

    trainer._step = jax.jit(counted, static_argnames="dense_gradient", donate_argnums=0)
    for step, (images, labels) in enumerate(load("digits").train_batches(0, 16, 0)):
        if step == 35:
            break
        state, _ = trainer.step(state, step, images, labels)
    assert len(traces) == 2  # one packed step, one topology step


@pytest.mark.parametrize("method", [name for name, method in METHODS.items() if not method.has_layout])
def test_masked_only_methods_train(method):
    trainer = trainer_of(method=method)
    state = trainer.init()
    for step, (images, labels) in enumerate(load("digits").train_batches(0, 16, 0)):
        if step == 12:
            break
        state, metrics = trainer.step(state, step, images, labels)
    assert np.isfinite(float(metrics.loss))
    assert state.form == "masked"
    expected = {"dense": 1.0, "sr-ste": 0.5, "ste": 0.5}.get(method, 0.2)
    if method != "gradual":  # which is half way at step 12
        assert float(bsj.metrics.density(trainer.masks(state))) == pytest.approx(expected, abs=0.002)


def test_bfloat16_keeps_float32_parameters():
    _trainer, state, losses = train(method="hrbp", execution="packed", precision="bfloat16")
    assert {leaf.dtype for leaf in jax.tree.leaves(state.params)} == {jnp.dtype("float32")}
    assert losses[-5:].mean() < losses[:5].mean()
    full = train(method="hrbp", execution="packed")[2]
    assert 1e-7 < np.abs(losses - full).max() < 0.3  # bf16 was used, and is close


def test_random_channel_drops_whole_channels():
    trainer = trainer_of(method="random-channel")
    layouts = [x for x in jax.tree.leaves(trainer.init().layouts, is_leaf=bsj.is_layout) if isinstance(x, bsj.BlockLayout)]
    assert layouts
    assert all(layout.filters.shape[0] == 1 for layout in layouts)
