"""The dense convolution in CHWN equals XLA's in all passes, whichever formulation runs each."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from requirements import needs

import blocksparse_jax as bsj
from blocksparse_jax.geometry import explicit_geometry
from experiments.bench import shapes, tune
from pallas_kernels.block_sparse_conv import (
    PASSES,
    cpu,
    cpu_times,
    runs_whole_kernels,
    whole_kernel,
)

pytestmark = needs(cpu.unavailable())
DEFAULTS = {"strides": 1, "padding": "SAME", "dilation": 1}
CASES = {
    "one group": ((3, 3, 16, 24), {}),
    "two groups": ((3, 3, 8, 128), {}),
    "filters in eights": ((3, 3, 8, 72), {"padding": "VALID"}),
    "strides": ((3, 3, 16, 16), {"strides": (2, 1), "padding": ((1, 0), (0, 2))}),
    "dilation": ((2, 3, 16, 16), {"dilation": 2}),
    "circular": ((3, 3, 16, 16), {"padding": "CIRCULAR"}),
    "a stem": ((3, 3, 3, 16), {}),
}


@pytest.mark.parametrize(
    ("case", "dtype"),
    [*((case, "float32") for case in CASES), ("two groups", "bfloat16"), ("strides", "bfloat16")],
)
def test_values_and_gradients_are_those_of_xla(case, dtype, monkeypatch):
    monkeypatch.setattr(whole_kernel, "STEM_POSITIONS", 1)
    shape, options = CASES[case]
    keys = jax.random.split(jax.random.key(0), 2)
    x = jax.random.normal(keys[0], (shape[2], 7, 6, 3), dtype)
    kernel = jax.random.normal(keys[1], shape, jnp.float32)
    assert runs_whole_kernels(x, shape)

    def loss(x, kernel, implementation):
        y = bsj.conv(
            x,
            kernel,
            bsj.Dense(),
            data_format="CHWN",
            implementation=implementation,
            bias=jnp.arange(float(shape[3])),
            activation="relu" if dtype == "float32" else None,  # rounding would flip some
            **options,
        )
        return jnp.square(y.astype(jnp.float32) / 16).sum(), y

    native, xla = (
        jax.value_and_grad(lambda x, k, i=i: loss(x, k, i), (0, 1), has_aux=True)(x, kernel)
        for i in (None, "dense")
    )
    tolerance = 1e-4 if dtype == "float32" else 2e-2
    for a, b in zip(jax.tree.leaves(native), jax.tree.leaves(xla), strict=True):
        assert a.dtype == b.dtype
        a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
        assert np.linalg.norm(a - b) <= tolerance * np.linalg.norm(b)


@pytest.mark.parametrize("formulation", whole_kernel.DENSE)
@pytest.mark.parametrize("case", [case for case in CASES if case != "circular"])
def test_every_formulation_computes_the_same(case, formulation):
    shape, options = CASES[case]
    geometry = explicit_geometry((7, 6), shape[:2], **DEFAULTS | options)
    keys = jax.random.split(jax.random.key(0), 3)
    sizes = (shape[2], 7, 6, 3), shape, shape[3:]
    x, kernel, bias = (jax.random.normal(*draw, jnp.float32) for draw in zip(keys, sizes))

    def passes(name):
        record = whole_kernel.by_formulation(name)

        def loss(x, kernel, bias):
            y = whole_kernel.whole_kernel_conv(
                x, kernel, implementation=record, bias=bias, relu=True, **geometry._asdict()
            )
            return (y * jnp.sin(jnp.arange(float(y.size))).reshape(y.shape)).sum(), y

        return jax.value_and_grad(loss, (0, 1, 2), has_aux=True)(x, kernel, bias)

    for a, b in zip(
        jax.tree.leaves(passes("cpu")), jax.tree.leaves(passes(formulation)), strict=True
    ):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-3)


def test_each_pass_loses_at_most_a_tenth_at_the_tuned_shapes():
    cases, table = tune.whole_cases(), cpu_times.read(cpu_times.WHOLE)
    assert {entry["name"] for entry in table["entries"]} == set(cases)
    for entry in table["entries"]:
        spec = cases[entry["name"]]
        assert entry["features"] == cpu_times.features(spec)
        for pass_name, measured in entry["milliseconds"].items():
            times = dict(measured)
            chosen = whole_kernel.fastest_formulation(spec, pass_name)
            if math.prod(spec.out_size) < whole_kernel.XLA_PIXELS:
                del times["xla"]
            assert times[chosen] <= 1.1 * min(times.values()), (entry["name"], pass_name)


@pytest.mark.parametrize("shape", [(512, 2, 1), (512, 3, 16), (64, 1, 128)])
def test_xla_never_convolves_images_of_a_few_pixels(shape):
    cin, height, batch = shape
    layer = shapes.Layer("small", cin, 64, height)
    spec = shapes.layer_spec(layer, sparsity=0, batch=batch, group_size=64, kept_taps=9)
    assert all(whole_kernel.fastest_formulation(spec, name) != "xla" for name in PASSES)


def test_the_formulation_that_was_the_fastest_runs_each_pass():
    operation = {"cpu": "ffi_call", "xla": "conv_general_dilated", "taps": "dot_general"}
    for layer in (shapes.VGG19[0], shapes.VGG19[-1]):
        spec = shapes.layer_spec(layer, sparsity=0, batch=16, group_size=64, kept_taps=9)
        x = jax.ShapeDtypeStruct(spec.in_shape, jnp.float32)
        kernel = jax.ShapeDtypeStruct(spec.kernel_shape, jnp.float32)
        run = functools.partial(whole_kernel.whole_kernel_conv, padding=spec.padding)
        chosen = whole_kernel.fastest_formulation(spec, "forward")
        assert operation[chosen] in str(jax.make_jaxpr(run)(x, kernel)), layer


def test_the_growth_gradient_is_that_of_xla():
    keys = jax.random.split(jax.random.key(0), 2)
    x = jax.random.normal(keys[0], (16, 6, 6, 4), jnp.float32)
    dy = jax.random.normal(keys[1], (32, 3, 3, 4), jnp.float32)
    native = bsj.dense_kernel_gradient(x, dy, (3, 3), strides=2, data_format="CHWN")
    nhwc = (array.transpose(3, 1, 2, 0) for array in (x, dy))
    xla = bsj.dense_kernel_gradient(*nhwc, (3, 3), strides=2)
    np.testing.assert_allclose(native, xla, rtol=1e-4, atol=1e-4)


def test_stems_of_many_pixels_run_natively():
    kernel, images = (3, 3, 3, 16), whole_kernel.STEM_POSITIONS // 16
    assert runs_whole_kernels(jax.ShapeDtypeStruct((3, 4, 4, images), jnp.float32), kernel)
    assert not runs_whole_kernels(jax.ShapeDtypeStruct((3, 4, 4, images - 1), jnp.float32), kernel)


def test_stems_products_and_other_dtypes_stay_with_xla():
    x = jax.ShapeDtypeStruct((16, 8, 8, 2), jnp.float32)
    assert runs_whole_kernels(x, (3, 3, 16, 16))
    assert not runs_whole_kernels(x, (1, 1, 16, 16))
    assert not runs_whole_kernels(x, (3, 3, 16, 10))
    assert not runs_whole_kernels(jax.ShapeDtypeStruct((3, 8, 8, 2), jnp.float32), (3, 3, 3, 16))
    assert not runs_whole_kernels(jax.ShapeDtypeStruct((16, 8, 8, 2), jnp.float16), (3, 3, 16, 16))
    assert not runs_whole_kernels(jax.ShapeDtypeStruct((16, 8, 8, 0), jnp.float32), (3, 3, 16, 16))
