"""Whole training steps, compiled for an H200 that is only described: one CUDA graph each."""

import dataclasses
import importlib.util

import jax
import jax.numpy as jnp
import pytest
from described_gpu import described_h200, launches_on_h200, missing
from requirements import needs

from experiments.bench.gpu.fallback import Fallback
from experiments.bench.gpu.step_setup import STEP, set_up
from experiments.bench.gpu.training_units import (
    NETWORKS,
    QUICK_NETWORKS,
    Network,
    StepOptions,
    Unit,
)
from pallas_kernels.block_sparse_conv import choice, mosaic_gpu, triton

PACKAGES = [name for name in ("triton", "jax_triton") if importlib.util.find_spec(name) is None]
pytestmark = needs(f"not installed: {', '.join(PACKAGES)}" if PACKAGES else missing())
TRITON = dataclasses.replace(triton.IMPLEMENTATION, supports=triton.limits)
# Each pass in the backend that was the faster one on an H200.
BEST = dataclasses.replace(
    TRITON,
    name="best",
    supports=lambda spec: mosaic_gpu.limits(spec) or triton.limits(spec),
    input_gradient=mosaic_gpu.IMPLEMENTATION.input_gradient,
    plans=("forward", "weight_gradient"),
    forward_with_sums=None,
    norm_input_gradient=None,
)
OPTIONS = StepOptions("bfloat16", 64, 16, 1, False)
QUICK_OPTIONS = StepOptions("bfloat16", 8, 1, 1, False)


def launches(network: Network, name: str, options: StepOptions) -> list[str]:
    """What the packed step of a network launches at 90% sparsity, and who serves its layers."""
    fallback = Fallback(name)
    with fallback.registered() as implementation:
        setup = set_up(options, Unit(network, "packed", 0.9, name), implementation)
        sharding = described_h200()
        state, images, labels = jax.tree.map(
            lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding),
            (setup.state, setup.images, setup.labels),
        )
        kinds = launches_on_h200(setup.trainer.lower(state, STEP, images, labels))
    assert fallback.layers().keys() <= {name, "triton"}, fallback.refused
    return kinds


@pytest.fixture
def backends(monkeypatch):
    """Triton and "best" as if a GPU were here."""
    monkeypatch.setitem(choice.IMPLEMENTATIONS, "triton", TRITON)
    monkeypatch.setitem(choice.IMPLEMENTATIONS, "best", BEST)


def test_a_small_packed_step_is_one_cuda_graph(backends):
    assert launches(QUICK_NETWORKS[0], "triton", QUICK_OPTIONS) == ["kCommandBuffer"]


def test_a_kernel_that_cannot_be_recorded_is_noticed():
    def program(x):
        for _ in range(6):
            x = jnp.cumsum(jnp.sin(x))
        call = jax.ffi.ffi_call(
            "triton_kernel_call", jax.typeof(x), custom_call_api_version=2, legacy_backend_config=""
        )
        x = call(x)
        for _ in range(6):
            x = jnp.cumsum(jnp.sin(x))
        return x

    x = jax.ShapeDtypeStruct((4096,), jnp.float32, sharding=described_h200())
    assert launches_on_h200(jax.jit(program).lower(x)) == [
        "kCommandBuffer",
        "kCustomCall",
        "kCommandBuffer",
    ]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["triton", "best"])
@pytest.mark.parametrize(
    "network",
    [network for network in NETWORKS if network.model in ("vgg19", "resnet32")],
    ids=lambda network: f"{network.model}-{network.batch_size}",
)
def test_a_packed_step_is_one_cuda_graph(network, name, backends):
    assert launches(network, name, OPTIONS) == ["kCommandBuffer"]
