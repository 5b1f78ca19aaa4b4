"""A packed training step with plans, compiled for a described H200: nothing in it makes lists."""

import dataclasses
import re

import described_gpu
import jax
import jax.numpy as jnp
import pytest
from requirements import needs

from experiments.training.config import TrainConfig, resolve
from experiments.training.length import Length
from experiments.training.loop import Trainer
from experiments.training.methods import Hrbp
from pallas_kernels.block_sparse_conv import choice, triton

BATCH = 128


def compiled_step(trainer, state, layouts):
    """The optimized program of a training step."""
    arrays = (
        dataclasses.replace(state, layouts={}),
        layouts,
        jax.ShapeDtypeStruct((BATCH, 32, 32, 3), jnp.float32),
        jax.ShapeDtypeStruct((BATCH,), jnp.int32),
    )
    sharding = described_gpu.described_h200()
    placed = jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding), arrays
    )
    return trainer._step.lower(*placed, dense_gradient=False).compile().as_text()


def lists(program):
    """How many sorts, scatters and gathers of integers a program has."""
    return len(re.findall(r" (?:sort|scatter)\(| = s32\S* gather\(", program))


@needs(described_gpu.missing())
@pytest.mark.slow
def test_a_vgg_step_with_plans_makes_no_lists(monkeypatch):
    pytest.importorskip("jax_triton")
    record = dataclasses.replace(triton.IMPLEMENTATION, supports=triton.limits)
    monkeypatch.setitem(choice.IMPLEMENTATIONS, "triton", record)
    config = TrainConfig(
        dataset="cifar10",
        model="vgg19",
        method="hrbp",
        sparsity=0.9,
        execution="packed",
        precision="bfloat16",
        batch_size=BATCH,
        options=Hrbp(group_size=64, channel_block=16),
    )
    config = dataclasses.replace(resolve(config), implementation="triton")
    trainer = Trainer(config, (32, 32, 3), 10, Length(steps_per_epoch=390, total=3900), "NHWC")
    state = trainer.init()
    planned = compiled_step(trainer, state, trainer.planned(state.layouts))
    assert lists(planned) == 0
    assert lists(compiled_step(trainer, state, state.layouts)) > 15, "without plans it makes them"
