"""On a TPU convolutions run dense until there are TPU kernels: the choice, and what is compiled."""

import json

import described_tpu
import jax
import jax.numpy as jnp
import pytest
from new_process import run_python

import blocksparse_jax as bsj
from experiments import models
from experiments.training.config import TrainConfig, resolve

KERNEL = jnp.ones((3, 3, 16, 32), jnp.float32)
LAYOUT = bsj.random_groups(jax.random.key(0), KERNEL.shape, group_size=8, kept=5, kept_taps=3)
X = jnp.ones((2, 6, 6, 16), jnp.float32)


@pytest.fixture
def on_a_tpu(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")


def test_the_choice_is_dense_and_says_why(on_a_tpu):
    choice = bsj.choose_implementation(X, LAYOUT)
    assert choice.implementation == "dense"
    assert "no TPU kernels yet" in choice.reason
    assert "2.8 times" in choice.reason
    assert set(choice.details.values()) == {"dense"}


@pytest.mark.parametrize("packed", [False, True])
def test_none_traces_what_dense_traces(on_a_tpu, packed):
    kernel = bsj.pack(KERNEL, LAYOUT) if packed else KERNEL
    by_default, dense, sparse = (
        str(
            jax.make_jaxpr(lambda k, name=name: bsj.conv(X, k, LAYOUT, implementation=name))(kernel)
        )
        for name in (None, "dense", "xla")
    )
    assert by_default == dense
    assert "conv_general_dilated" in dense
    assert "conv_general_dilated" not in sparse


def test_the_trainer_trains_dense_by_default(on_a_tpu):
    assert resolve(TrainConfig(method="hrbp")).execution == "masked"
    assert resolve(TrainConfig(method="hrbp", execution="packed")).execution == "packed"


@pytest.mark.parametrize("data_format", ["NHWC", "CHWN"])
def test_the_zoo_makes_none_of_the_choices_for_cpus(on_a_tpu, data_format):
    network = models.create("vgg19", num_classes=10, data_format=data_format)
    images = jax.ShapeDtypeStruct((4, 32, 32, 3), jnp.float32)
    variables = jax.eval_shape(network.init, jax.random.key(0), images)
    jaxpr = str(jax.make_jaxpr(network.apply)(variables, images))
    assert jaxpr.count("conv_general_dilated") == 16
    assert jaxpr.count("dot_general") == 1, "the classifier"
    assert "concatenate" not in jaxpr


@pytest.mark.skipif(bool(described_tpu.missing()), reason=str(described_tpu.missing()))
def test_a_training_step_compiled_for_a_v5e_accesses_no_more_memory_than_a_dense_one():
    configs = [{"model": "cnn", "method": "dense"}, {"model": "cnn", "method": "hrbp"}]
    done = run_python(
        described_tpu.__file__, *map(json.dumps, configs), **described_tpu.environment()
    )
    assert done.returncode == 0, done.stderr[-3000:]
    dense, default = map(json.loads, done.stdout.splitlines())
    assert dense["flops"] > 3e10
    assert default["flops"] <= 1.01 * dense["flops"]
    assert default["bytes"] <= 1.02 * dense["bytes"], "more than the masks"
