"""`choose_implementation` asks about the very convolution that `conv` runs."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

import blocksparse_jax as bsj
from pallas_kernels.block_sparse_conv import IMPLEMENTATIONS, ConvSpec


@pytest.fixture
def asked(monkeypatch):
    """The specs about which an implementation was asked whether it serves them."""
    specs = []

    def supports(spec):
        specs.append(spec)
        return "only listens"

    listener = dataclasses.replace(IMPLEMENTATIONS["mosaic_gpu"], supports=supports)
    monkeypatch.setitem(IMPLEMENTATIONS, "mosaic_gpu", listener)
    return specs


def layout_of(shape, **sizes):
    return bsj.random_groups(jax.random.key(0), shape, **sizes)


PLAIN = {"cin": 16, "height": 8, "width": 6, "batch": 5, "kernel": (3, 3), "cout": 32} | {
    "groups": 4,
    "kept": 8,
    "kept_taps": 3,
    "group_size": 8,
    "padding": ((1, 1), (1, 1)),
}
# What differs from the plain call, and the fields of the spec that differ with it.
CASES = {
    "plain": ({}, {}),
    "runs of 4 channels": ({"channel_block": 4}, {"channel_block": 4}),
    "runs of 8 channels": ({"channel_block": 8}, {"channel_block": 8}),
    "strides": (
        {"strides": (2, 1)},
        {"strides": (2, 1), "padding": ((0, 1), (1, 1))},
    ),
    "one number for both strides": (
        {"strides": 2},
        {"strides": (2, 2), "padding": ((0, 1), (0, 1))},
    ),
    "dilation": ({"dilation": (1, 2)}, {"dilation": (1, 2), "padding": ((1, 1), (2, 2))}),
    "no padding": ({"padding": "VALID"}, {"padding": ((0, 0), (0, 0))}),
    "padding in pixels": ({"padding": ((2, 0), (1, 3))}, {"padding": ((2, 0), (1, 3))}),
    "channels first": ({"data_format": "CHWN"}, {}),
    "bfloat16": ({"dtype": jnp.bfloat16}, {"dtype": "bfloat16"}),
}


@pytest.mark.parametrize("name", CASES)
def test_the_choice_is_asked_for_the_convolution_that_runs(name, asked):
    options, fields = CASES[name]
    options = dict(options)
    layout = layout_of(
        (3, 3, 16, 32),
        group_size=8,
        kept=8,
        kept_taps=3,
        channel_block=options.pop("channel_block", 1),
    )
    shape = (16, 8, 6, 5) if options.get("data_format") == "CHWN" else (5, 8, 6, 16)
    x = jnp.ones(shape, options.pop("dtype", jnp.float32))
    choice = bsj.choose_implementation(x, layout, **options)
    (spec,) = asked
    assert spec == ConvSpec(**(PLAIN | fields))
    assert bsj.available_implementations()[choice.implementation] is None

    asked.clear()
    kernel = jnp.ones((3, 3, 16, 32), x.dtype)
    jax.eval_shape(lambda x, kernel: bsj.conv(x, kernel, layout, **options), x, kernel)
    assert spec in asked
    assert dataclasses.replace(spec, gradients=True) in asked
