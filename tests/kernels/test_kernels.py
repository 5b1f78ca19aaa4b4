"""One suite for all implementations of the convolution, and for each formulation of XLA's."""

import dataclasses
import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conv_cases import BASE, CASES, IMPLEMENTATIONS, NAMES, assert_close, conv, specs
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax
from new_process import host_devices, run_python

from experiments.bench import shapes
from pallas_kernels.block_sparse_conv import (
    PASSES,
    ConvSpec,
    Implementation,
    available_implementations,
    block_sparse_conv,
    xla,
)

SPARSE = [name for name in IMPLEMENTATIONS if name.startswith("xla:")]
NATIVE = [name for name in IMPLEMENTATIONS if name.startswith("cpu")]
every_implementation = pytest.mark.parametrize("name", IMPLEMENTATIONS)


def masked_dense(spec: ConvSpec, x, values, filters, channels, taps):
    """The definition: the packed values in a kernel of zeros, in XLA's convolution."""
    kernel = jnp.zeros((math.prod(spec.kernel), spec.cin, spec.cout), values.dtype)
    for g in range(spec.groups):
        kernel = kernel.at[taps[g][None, :, None], channels[g][:, None, None], filters[g]].set(
            values[g]
        )
    return lax.conv_general_dilated(
        x,
        kernel.reshape(*spec.kernel, spec.cin, spec.cout),
        spec.strides,
        spec.padding,
        rhs_dilation=spec.dilation,
        dimension_numbers=("CHWN", "HWIO", "CHWN"),
        precision="highest",
    )


def results(f, x, values, dy):
    """Output and both gradients."""

    @jax.jit
    def run(x, values, dy):
        y, pullback = jax.vjp(f, x, values)
        return y, *pullback(dy)

    with jax.default_matmul_precision("highest"):
        return run(x, values, dy)


def check(spec: ConvSpec, name: str, seed: int = 0, tolerance: float = 1e-5):
    x, dy, values, *index = shapes.random_operands(spec, seed)
    arrays = results(lambda x, v: conv(spec, name, x, v, *index), x, values, dy)
    assert [a.dtype for a in arrays] == [x.dtype, x.dtype, values.dtype]
    assert_close(arrays, expected(spec, seed), tolerance)


@functools.lru_cache(16)
def expected(spec: ConvSpec, seed: int):
    """What every implementation is compared with, in single precision."""
    x, dy, values, *index = shapes.random_operands(spec, seed)
    x, dy, values = (a.astype(jnp.float32) for a in (x, dy, values))
    arrays = results(lambda x, v: masked_dense(spec, x, v, *index), x, values, dy)
    return jax.device_get(arrays)


@pytest.mark.parametrize("case", CASES)
@every_implementation
def test_values_and_gradients_are_those_of_the_masked_dense_convolution(name, case):
    check(CASES[case], name)


some_geometry = given(specs(), st.sampled_from(list(IMPLEMENTATIONS)), st.integers(0, 99))


@settings(max_examples=8, deadline=None)
@some_geometry
def test_any_geometry(spec, name, seed):
    check(spec, name, seed)


@pytest.mark.slow
@settings(max_examples=200, deadline=None)
@some_geometry
def test_many_geometries(spec, name, seed):
    check(spec, name, seed)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@every_implementation
def test_half_precision_accumulates_in_single(name, dtype):
    if name.startswith("cpu") and dtype == "float16":
        pytest.skip("refused: test_native.py")
    check(dataclasses.replace(CASES["same"], dtype=dtype), name, tolerance=2e-2)
    spec = dataclasses.replace(BASE, cin=300, kept=290, kept_taps=9, dtype=dtype)
    x, _, values, *index = shapes.random_operands(spec)
    y = jax.jit(lambda x, v: conv(spec, name, x, v, *index))(
        jnp.ones_like(x), jnp.ones_like(values)
    )
    assert (y == jnp.asarray(290 * 9, dtype)).all(), "a sum of 2610 ones stalls in half precision"


@pytest.mark.parametrize("name", NAMES)
def test_parameters_may_stay_in_single_precision(name):
    spec = dataclasses.replace(CASES["same"], dtype="bfloat16")
    x, dy, values, *index = shapes.random_operands(spec)
    y, dx, dvalues = results(
        lambda x, v: conv(spec, name, x, v, *index), x, values.astype(jnp.float32), dy
    )
    assert (y.dtype, dx.dtype, dvalues.dtype) == (jnp.bfloat16, jnp.bfloat16, jnp.float32)


@pytest.mark.parametrize("empty", ["kept", "kept_taps"])
@pytest.mark.parametrize("name", NAMES)
def test_nothing_kept_gives_zeros(name, empty):
    spec = dataclasses.replace(BASE, **{empty: 0})
    x, dy, values, *index = shapes.random_operands(spec)
    y, dx, dvalues = results(lambda x, v: conv(spec, name, x, v, *index), x, values, dy)
    assert y.shape == spec.out_shape
    assert dvalues.shape == spec.packed_shape
    assert not y.any()
    assert not dx.any()


@every_implementation
def test_vmap_over_images_weights_and_layouts(name):
    spec = CASES["stride"]
    many = [shapes.random_operands(spec, seed) for seed in range(3)]
    x, dy, values, *index = (jnp.stack(a) for a in zip(*many))

    def run(x, values, dy, *index):
        y, pullback = jax.vjp(lambda x, v: conv(spec, name, x, v, *index), x, values)
        return y, *pullback(dy)

    everything = jax.jit(jax.vmap(run))(x, values, dy, *index)
    only_x = jax.jit(jax.vmap(run, in_axes=(0, None, 0, None, None, None)))(
        x, values[0], dy, *many[0][3:]
    )
    only_layouts = jax.jit(jax.vmap(run, in_axes=(None, None, None, 0, 0, 0)))(
        x[0], values[0], dy[0], *index
    )
    one = jax.jit(run)
    for i in range(3):
        assert_close(
            [a[i] for a in everything], one(x[i], values[i], dy[i], *(a[i] for a in index)), 1e-5
        )
        assert_close([a[i] for a in only_x], one(x[i], values[0], dy[i], *many[0][3:]), 1e-5)
        assert_close(
            [a[i] for a in only_layouts], one(x[0], values[0], dy[0], *(a[i] for a in index)), 1e-5
        )


SHARDED = """
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import Mesh, PartitionSpec as P
from conv_cases import CASES, IMPLEMENTATIONS, assert_close, conv, shapes
import dataclasses
spec = dataclasses.replace(CASES["same"], batch=4)
x, dy, values, *index = shapes.random_operands(spec)
assert jax.device_count() == 2
images = P(None, None, None, "batch")
for name in IMPLEMENTATIONS:
    def whole(x, v):
        return (conv(spec, name, x, v, *index) * dy).sum()
    expected = jax.jit(jax.grad(whole, (0, 1)))(x, values)
    half = dataclasses.replace(spec, batch=2)
    def loss(x, v, dy, *index):
        return jax.lax.psum((conv(half, name, x, v, *index) * dy).sum(), "batch")
    for inside in (True, False):
        body = jax.grad(loss, (0, 1)) if inside else loss
        f = jax.shard_map(
            body,
            mesh=Mesh(np.array(jax.devices()), ("batch",)),
            in_specs=(images, P(), images, P(), P(), P()),
            out_specs=(images, P()) if inside else P(),
        )
        gradients = jax.jit(f if inside else jax.grad(f, (0, 1)))(x, values, dy, *index)
        assert_close(gradients, expected, 1e-5)
    print(name, "agrees")
"""


def test_shard_map_over_the_batch():
    done = run_python("-c", SHARDED, **host_devices(2))
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("agrees") == len(IMPLEMENTATIONS)


@pytest.mark.parametrize("name", SPARSE + NATIVE)
@jax.debug_nans(False)
def test_values_that_are_not_finite_reach_exactly_what_they_touch(name):
    spec, bad = CASES["same"], np.inf if "rows" in name else np.nan
    x, dy, values, *index = shapes.random_operands(spec)
    run = functools.partial(results, lambda x, v: conv(spec, name, x, v, *index))
    channel = int(index[1][0, 0])
    clean = results(
        lambda x, v: masked_dense(spec, x, v, *index),
        jnp.zeros_like(x).at[channel, 3, 2, 1].set(1),
        abs(values),
        dy,
    )[0]
    assert np.asarray(clean).any()
    y, _, _ = run(x.at[channel, 3, 2, 1].set(bad), values, dy)
    np.testing.assert_array_equal(~np.isfinite(y), np.asarray(clean) != 0)
    reached = results(
        lambda x, v: masked_dense(spec, x, v, *index),
        x,
        abs(values),
        jnp.zeros_like(dy).at[5, 3, 2, 1].set(1),
    )[1]
    assert np.asarray(reached).any()
    _, dx, dvalues = run(x, values, dy.at[5, 3, 2, 1].set(bad))
    np.testing.assert_array_equal(~np.isfinite(dx), np.asarray(reached) != 0)
    owner = int(np.argwhere(np.asarray(index[0]) == 5)[0, 0])
    assert np.isfinite(np.delete(dvalues, owner, 0)).all()
    assert not np.isfinite(dvalues[owner]).all()


@pytest.mark.parametrize("name", NAMES)
@jax.disable_jit(False)
def test_new_index_contents_do_not_recompile(name):
    spec, traces = CASES["same"], []

    @jax.jit
    def run(x, values, *index):
        traces.append(1)
        return conv(spec, name, x, values, *index)

    outputs = []
    for seed in range(3):
        x, _, values, *_ = shapes.random_operands(spec)
        outputs.append(run(x, values, *shapes.random_operands(spec, seed)[3:]))
    assert len(traces) == 1
    assert not np.allclose(outputs[0], outputs[1])


def compiled(spec: ConvSpec, name: str):
    x, dy, values, *index = shapes.random_operands(spec)

    def run(x, values, dy, *index):
        y, pullback = jax.vjp(lambda x, v: conv(spec, name, x, v, *index), x, values)
        return y, *pullback(dy)

    return jax.jit(run).lower(x, values, dy, *index).compile()


@pytest.mark.parametrize("name", SPARSE)
def test_no_activation_is_transposed(name):
    spec = shapes.layer_spec(shapes.RESNET32[2], sparsity=0.8, batch=8)
    text = compiled(spec, name).as_text()
    for dims, order, op in re.findall(
        r"= \w+\[([\d,]+)\]\{([\d,]+)[^}]*\} (transpose|copy)\(", text
    ):
        if (
            math.prod(map(int, dims.split(",")))
            >= spec.kept * spec.height * spec.width * spec.batch
        ):
            ordered = sorted(map(int, order.split(",")), reverse=True) == list(
                map(int, order.split(","))
            )
            assert op == "copy", f"transposes [{dims}]"
            assert ordered, f"copies [{dims}] into the order {order}"
    assert "gather" in text
    dense = compiled(spec, "dense").as_text()
    assert re.search(r" (transpose|copy)\(", dense), (
        "the dense convolution transposes: the pattern must find it"
    )


@pytest.mark.parametrize("name", [name for name in SPARSE if not name.endswith("_loop")])
def test_each_pass_does_only_the_kept_work(name):
    spec = shapes.layer_spec(shapes.VGG19[4], sparsity=0.9, batch=8)
    kept = 3 * 2 * math.prod(spec.packed_shape) * spec.out_height * spec.out_width * spec.batch
    flops = {n: compiled(spec, n).cost_analysis()["flops"] for n in (name, "dense")}
    assert kept <= flops[name] < 1.5 * kept
    assert flops["dense"] > 3 * flops[name], (
        "XLA's dense convolution skips the padding, but not the zeros"
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": jnp.ones((9, 7, 6), jnp.float32)}, r"x: expected .* \[cin, h, w, n\]"),
        ({"x": jnp.ones((9, 7, 6, 3), jnp.int32)}, "x: expected float32, bfloat16 or float16"),
        ({"x": jnp.ones((8, 7, 6, 3), jnp.float32)}, r"x: expected \(C, H, W, N\) with C = 9"),
        ({"x": jnp.ones((9, 2, 6, 3), jnp.float32)}, "x: images of .* smaller than the reach"),
        ({"values": jnp.ones((2, 4, 12))}, "values: expected floats"),
        ({"values": jnp.ones((3, 4, 3, 4))}, "values: groups"),
        ({"values": jnp.ones((2, 10, 3, 4))}, "values: keeps 10 channels of 9"),
        ({"filters": jnp.ones((2, 3), jnp.int32)}, r"filters: expected integers \[2, 4\]"),
        ({"channels": jnp.ones((2, 4))}, r"channels: expected integers \[2, 4\]"),
        ({"taps": jnp.ones((1, 3), jnp.int32)}, r"taps: expected integers \[2, 3\]"),
        ({"kernel_shape": (3, 3, 9)}, "kernel_shape: expected"),
        ({"strides": 2}, "strides: expected two integers"),
        ({"strides": (0, 1)}, "strides: expected two integers of at least 1"),
        ({"dilation": (1, 1.5)}, "dilation: expected two integers"),
        ({"padding": "SAME"}, "padding: expected"),
        ({"padding": ((1, -1), (0, 0))}, r"padding\[0\]: expected two integers of at least 0"),
        ({"channel_block": 3}, "channel_block: 3 must divide kept=4"),
        ({"implementation": "xls"}, "implementation: expected .*'xla', 'cpu'.*got 'xls'"),
    ],
)
def test_bad_arguments_are_named(change, message):
    x, _, values, *index = shapes.random_operands(BASE)
    good = dict(zip(("x", "values", "filters", "channels", "taps"), (x, values, *index))) | {
        "kernel_shape": (3, 3, 9, 8)
    }
    block_sparse_conv(**good)
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(lambda: block_sparse_conv(**(good | change)))


@pytest.mark.parametrize("name", [n for n, reason in available_implementations().items() if reason])
def test_what_cannot_serve_says_why(name):
    x, _, values, *index = shapes.random_operands(BASE)
    with pytest.raises(NotImplementedError, match=re.escape(available_implementations()[name])):
        conv(BASE, name, x, values, *index)


def test_a_custom_implementation_runs_every_pass():
    calls = []

    def spy(name):
        def run(spec, *operands):
            calls.append(name)
            return getattr(xla.FORMULATIONS["rows"], name)(spec, *operands)

        return run

    custom = Implementation(
        "custom", lambda spec: "no batches of 3" if spec.batch == 3 else None, *map(spy, PASSES)
    )
    x, dy, values, *index = shapes.random_operands(dataclasses.replace(BASE, batch=2))
    run = functools.partial(block_sparse_conv, kernel_shape=(3, 3, 9, 8), implementation=custom)
    jax.jit(lambda x, v, dy: jax.vjp(lambda x, v: run(x, v, *index), x, v)[1](dy))(x, values, dy)
    assert sorted(calls) == sorted(PASSES)
    x, _, values, *index = shapes.random_operands(BASE)
    with pytest.raises(NotImplementedError, match="'custom': no batches of 3"):
        run(x, values, *index)
