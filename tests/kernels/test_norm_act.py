"""Batch norm with a residual and a ReLU: values and gradients against flax's in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from new_process import host_devices, run_python
from requirements import needs

import blocksparse_jax as bsj
from pallas_kernels.block_sparse_conv import cpu
from pallas_kernels.block_sparse_conv.cpu import kernels as native

needs_native = needs(cpu.unavailable())
SHAPES = {
    "odd": (3, 7, 5, 3),
    "vectors and a rest": (2, 33, 8, 9),
    "blocks and a rest": (3, 16, 13, 11),
    "one pixel": (5, 1, 1, 1),
    "rows": (4, 37),
    "many channels": (70, 2, 2, 16),
}
VARIANTS = native.variants()


def operands(shape, dtype="float32", mean=1.0):
    """x, scale, bias, residual, factor, and the cotangents of y, mean and variance."""
    keys = jax.random.split(jax.random.key(sum(shape)), 8)
    x, residual, dy = (jax.random.normal(key, shape, jnp.float32) for key in keys[:3])
    rows = (jax.random.normal(key, shape[:1], jnp.float32) for key in keys[3:7])
    scale, bias, dmean, dvar = rows
    x, residual, dy = (2 * x + mean).astype(dtype), residual.astype(dtype), dy.astype(dtype)
    return (x, scale, bias, residual, jnp.float32(0.7)), (dy, dmean, dvar)


@jax.numpy_dtype_promotion("standard")  # which flax relies on
def of_flax(x, scale, bias, residual, factor, *, relu=True, axis=0, dtype=jnp.float64):
    """What norm_act replaces, and the statistics by flax's own running averages."""
    norm = nn.BatchNorm(False, axis=axis, momentum=0.0, dtype=dtype, use_fast_variance=False)
    rows = jnp.zeros(scale.shape, scale.dtype)
    variables = {
        "params": {"scale": scale, "bias": bias},
        "batch_stats": {"mean": rows, "var": rows},
    }
    y, updated = norm.apply(variables, x, mutable=["batch_stats"])
    y = y * factor.astype(y.dtype)
    if residual is not None:
        y += residual
    statistics = updated["batch_stats"]
    return nn.relu(y) if relu else y, statistics["mean"], statistics["var"]


def of_ours(x, scale, bias, residual, factor, *, relu=True, **options):
    activation = "relu" if relu else None
    more = {"residual": residual, "factor": factor, "activation": activation}
    return bsj.norm_act(x, scale, bias, **more, **options)


def with_gradients(f, arrays, cotangents):
    out, pullback = jax.vjp(f, *arrays)
    cotangents = [c.astype(o.dtype) for c, o in zip(cotangents, out, strict=True)]
    return out, pullback(tuple(cotangents))


def in_float64(arrays):
    return jax.tree.map(lambda a: jnp.asarray(np.asarray(a, np.float64)), arrays)


def expected(arrays, cotangents, **options):
    """Values and gradients of flax in float64."""
    with jax.enable_x64(True):
        f = functools.partial(of_flax, **options)
        result = with_gradients(f, in_float64(arrays), in_float64(cotangents))
        return jax.tree.map(np.asarray, result)


def errors(result, reference):
    """The largest error of each array, relative to its largest value."""
    return [
        np.abs(np.asarray(a, np.float64) - b).max() / max(np.abs(b).max(), 1e-6)
        for a, b in zip(jax.tree.leaves(result), jax.tree.leaves(reference), strict=True)
    ]


@pytest.mark.parametrize("axis", [0, 1, -1])
@pytest.mark.parametrize("relu", [True, False])
@pytest.mark.parametrize("has_residual", [True, False])
def test_the_formulation_is_flax_in_float64(axis, relu, has_residual):
    arrays, cotangents = operands((3, 4, 5, 3))
    arrays = (*arrays[:3], arrays[3] if has_residual else None, arrays[4])
    if axis == 1:
        arrays = (*arrays[:1], *(jnp.resize(a, 4) for a in arrays[1:3]), *arrays[3:])
        cotangents = (cotangents[0], *(jnp.resize(c, 4) for c in cotangents[1:]))
    reference = expected(arrays, cotangents, relu=relu, axis=axis)
    with jax.enable_x64(True):
        for fast in (True, False):
            f = functools.partial(of_ours, relu=relu, channel_axis=axis, use_fast_variance=fast)
            result = with_gradients(f, in_float64(arrays), in_float64(cotangents))
            assert {a.dtype for a in jax.tree.leaves(result)} == {np.dtype("float64")}
            assert max(errors(result, reference)) < 1e-12


@needs_native
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("relu", [True, False])
@pytest.mark.parametrize("has_residual", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_every_variant_of_the_native_kernels(monkeypatch, shape, has_residual, relu, variant):
    monkeypatch.setenv(native.VARIABLE, variant)
    arrays, cotangents = operands(SHAPES[shape])
    arrays = (*arrays[:3], arrays[3] if has_residual else None, arrays[4])
    reference = expected(arrays, cotangents, relu=relu)
    f = functools.partial(of_ours, relu=relu, implementation="cpu")
    assert max(errors(with_gradients(f, arrays, cotangents), reference)) < 1e-5


@needs_native
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("has_residual", [True, False])
@pytest.mark.parametrize("shape", ["odd", "blocks and a rest"])
def test_half_precision_is_no_worse_than_flax(monkeypatch, shape, has_residual, variant):
    monkeypatch.setenv(native.VARIABLE, variant)
    arrays, cotangents = operands(SHAPES[shape], "bfloat16")
    arrays = (*arrays[:3], arrays[3] if has_residual else None, arrays[4])
    reference = expected(arrays, cotangents)
    ours = with_gradients(functools.partial(of_ours, implementation="cpu"), arrays, cotangents)
    theirs = with_gradients(functools.partial(of_flax, dtype=jnp.bfloat16), arrays, cotangents)
    assert ours[0][0].dtype == ours[1][0].dtype == jnp.bfloat16
    for our, their in zip(errors(ours, reference), errors(theirs, reference), strict=True):
        assert our <= max(1.1 * their, 1e-5)


@needs_native
@pytest.mark.parametrize("relu", [True, False])
@pytest.mark.parametrize("has_residual", [True, False])
def test_the_gradients_of_both_results_of_a_fork_add_up(has_residual, relu):
    arrays, (dy, *_) = operands(SHAPES["odd"])
    arrays = (*arrays[:3], arrays[3] if has_residual else None, arrays[4])
    more = jnp.cos(dy)

    def forked(*arrays):
        return of_ours(*arrays, relu=relu, fork=True, implementation="cpu")[0]

    def single(*arrays):
        return of_ours(*arrays, relu=relu, implementation="cpu")[0]

    (first, second), pullback = jax.vjp(forked, *arrays)
    y, expected_pullback = jax.vjp(single, *arrays)
    np.testing.assert_array_equal(first, y)
    np.testing.assert_array_equal(second, y)
    for a, b in zip(
        jax.tree.leaves(pullback((dy, more))),
        jax.tree.leaves(expected_pullback(dy + more)),
        strict=True,
    ):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


@needs_native
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_large_mean_cancels_nothing(monkeypatch, variant):
    monkeypatch.setenv(native.VARIABLE, variant)
    (x, scale, bias, *_), (dy, *rest) = operands((3, 16, 16, 5), mean=1e4)
    x = x.at[0, 0, 0, 0].set(-1e4)  # a first value that is far from the others
    f = functools.partial(of_ours, implementation="cpu")
    arrays = (x, scale, bias, None, jnp.float32(1))
    result = with_gradients(f, arrays, (dy, *rest))
    reference = expected(arrays, (dy, *rest))
    np.testing.assert_allclose(result[0][1], reference[0][1], rtol=1e-7)
    np.testing.assert_allclose(result[0][2], reference[0][2], rtol=1e-5)
    assert errors(result, reference)[0] < 1e-3  # a float32 near 1e4 is exact to 5e-4


@needs_native
def test_a_constant_channel_has_no_variance():
    x = jnp.full((2, 9, 5, 3), 0.1, jnp.float32)
    y, mean, variance = bsj.norm_act(x, bias=jnp.array([2.0, -1.0]), implementation="cpu")
    np.testing.assert_array_equal(mean, x[:, 0, 0, 0])
    np.testing.assert_array_equal(variance, [0, 0])
    np.testing.assert_array_equal(y[:, 0, 0, 0], [2, 0])
    gradient = jax.grad(lambda x: bsj.norm_act(x, implementation="cpu")[0].sum())(x)
    assert np.all(np.isfinite(gradient))


@needs_native
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("where", [0, 700, -1])
@jax.debug_nans(False)
def test_a_nan_spoils_its_channel_alone(monkeypatch, variant, where):
    monkeypatch.setenv(native.VARIABLE, variant)
    x = jax.random.normal(jax.random.key(0), (3, 1501), jnp.float32).at[1, where].set(jnp.nan)
    y, mean, variance = bsj.norm_act(x, implementation="cpu")
    for a in (y, mean, variance):
        assert np.all(np.isnan(np.asarray(a[1])))
        assert np.all(np.isfinite(np.asarray(a)[[0, 2]]))
    dx = jax.grad(lambda x: bsj.norm_act(x, implementation="cpu")[0].sum())(x)
    assert np.all(np.isnan(np.asarray(dx[1])))
    assert np.all(np.isfinite(np.asarray(dx)[[0, 2]]))


@needs_native
@pytest.mark.parametrize("has_residual", [True, False])
def test_second_derivatives(has_residual):
    arrays, _ = operands((3, 5, 4, 3))
    arrays = (*arrays[:3], arrays[3] if has_residual else None, arrays[4])
    places = tuple(i for i, a in enumerate(arrays) if a is not None)

    def loss(implementation):
        def f(*arrays):
            y, mean, variance = of_ours(*arrays, implementation=implementation)
            return jnp.sum(jnp.sin(y)) + jnp.sum(jnp.cos(mean)) + jnp.sum(variance**2)

        return f

    def twice(implementation):
        gradient = jax.grad(loss(implementation), places)

        def squares(*arrays):
            return sum(jnp.sum(g * g) for g in gradient(*arrays))

        tangents = jax.tree.map(jnp.cos, arrays)
        product = jax.jvp(gradient, arrays, tangents)[1]
        return jax.grad(squares, places)(*arrays), product

    ours, reference = jax.jit(lambda: twice("cpu"))(), jax.jit(lambda: twice("xla"))()
    assert max(errors(ours, jax.tree.map(np.asarray, reference))) < 1e-4


@needs_native
@pytest.mark.parametrize("mode", [jax.jvp, lambda f, x, t: jax.linearize(f, *x)[1](*t)])
def test_forward_mode_alone_names_the_way_out(mode):
    x = jnp.ones((2, 3), jnp.float32)
    with pytest.raises(TypeError, match=r"norm_act in the native.*implementation='xla'"):
        mode(lambda x: bsj.norm_act(x)[0], (x,), (x,))
    mode(lambda x: bsj.norm_act(x, implementation="xla")[0], (x,), (x,))


@needs_native
def test_a_batch_of_calls():
    (x, scale, bias, residual, factor), cotangents = operands(SHAPES["odd"])
    many = jnp.stack([x, -2 * x])
    run = functools.partial(with_gradients, functools.partial(of_ours, implementation="cpu"))
    result = jax.jit(jax.vmap(lambda x: run((x, scale, bias, residual, factor), cotangents)))(many)
    for i in range(2):
        single = run((many[i], scale, bias, residual, factor), cotangents)
        for a, b in zip(jax.tree.leaves(result), jax.tree.leaves(single), strict=True):
            np.testing.assert_allclose(a[i], b, rtol=1e-6, atol=1e-6)


def call(x, name="NormActForward", **changes):
    rows = jax.ShapeDtypeStruct(x.shape[:1], "float32")
    signs = jax.ShapeDtypeStruct((0, 0), "uint8")
    like_x = jax.ShapeDtypeStruct(x.shape, x.dtype)
    absent = jnp.zeros((0,) * x.ndim, x.dtype)
    options = {
        "scale": jnp.ones(x.shape[0], jnp.float32),
        "bias": jnp.zeros(x.shape[0], jnp.float32),
        "residual": absent,
        "y": like_x,
        "mean": rows,
        "signs": signs,
        "variant": "",
    } | changes
    forward = name == "NormActForward"
    results = (options["y"], options["mean"], rows, options["signs"])
    arrays = (x, options["scale"], options["bias"], options["residual"])
    if not forward:
        results = (like_x, rows, rows, jax.ShapeDtypeStruct(absent.shape, x.dtype))
        bits = options.get("bits", jnp.zeros((0, 0), jnp.uint8))
        arrays = (options.get("dy", x), options["residual"], x, bits, *[options["scale"]] * 6)
    f = jax.ffi.ffi_call(name, results)
    return f(*arrays, epsilon=np.float32(1e-5), relu=True, variant=options["variant"])


BAD = {
    "a short scale": (
        lambda x: call(x, scale=jnp.ones(2, jnp.float32)),
        r"scale \[2\] must have one number",
    ),
    "a square bias": (
        lambda x: call(x, bias=jnp.ones((3, 1), jnp.float32)),
        "bias .* must have one number",
    ),
    "a small residual": (lambda x: call(x, residual=x[:2]), r"residual \[2, 40\] must have the"),
    "another type": (
        lambda x: call(x, residual=x.astype(jnp.bfloat16)),
        "residual .* the shape and the type of x",
    ),
    "half precision of the other kind": (
        lambda x: call(x.astype(jnp.float16)),
        "x must be float32 or bfloat16",
    ),
    "an empty axis": (lambda x: call(x[:, :0]), "without empty axes"),
    "few signs": (
        lambda x: call(x, signs=jax.ShapeDtypeStruct((3, 5), "uint8")),
        r"signs \[3, 5\] must be \[3, 6\]",
    ),
    "a variant": (lambda x: call(x, variant="vax"), "no variant 'vax'"),
    "a small dy": (lambda x: call(x, "NormActBackward", dy=x[:1]), r"dy \[1, 40\] must have"),
    "few signs in the backward pass": (
        lambda x: call(x, "NormActBackward", bits=jnp.zeros((3, 4), jnp.uint8)),
        r"signs \[3, 4\] must be",
    ),
}


@needs_native
@pytest.mark.parametrize("what", BAD)
def test_malformed_buffers_are_refused_by_the_handlers(what):
    bad, message = BAD[what]
    with pytest.raises(jax.errors.JaxRuntimeError, match=message):
        jax.block_until_ready(bad(jnp.ones((3, 40), jnp.float32)))


WRONG = {
    "x: expected floating point": lambda x: bsj.norm_act(x.astype(int)),
    "channel_axis: expected an axis of x, from -2 to 1, got 2": lambda x: bsj.norm_act(
        x, channel_axis=2
    ),
    "scale: expected one number for each of the 3": lambda x: bsj.norm_act(x, jnp.ones(4)),
    "bias: expected one number for each of the 3": lambda x: bsj.norm_act(x, bias=jnp.ones(())),
    "factor: expected a scalar": lambda x: bsj.norm_act(x, factor=jnp.ones(3)),
    "residual: expected the shape of x": lambda x: bsj.norm_act(x, residual=x[:1]),
    "activation: expected": lambda x: bsj.norm_act(x, activation="gelu"),
    "implementation: expected": lambda x: bsj.norm_act(x, implementation="gpu"),
}


@pytest.mark.parametrize("message", WRONG)
def test_wrong_arguments_are_refused(message):
    with pytest.raises(ValueError, match=message):
        WRONG[message](jnp.ones((3, 4)))


@needs_native
def test_what_the_native_kernels_cannot_run_is_refused_with_the_reason():
    x = jnp.ones((3, 4), jnp.float32)
    for options, reason in (
        ({"channel_axis": 1}, "channels on axis 0"),
        ({"axis_name": "data"}, "axis_name asks for those of several"),
    ):
        with pytest.raises(NotImplementedError, match=reason):
            bsj.norm_act(x, implementation="cpu", **options)
    with pytest.raises(NotImplementedError, match="not in float16"):
        bsj.norm_act(x.astype(jnp.float16), implementation="cpu")
    bsj.norm_act(x.astype(jnp.float16), implementation="xla")


def test_statistics_of_a_sharded_batch_are_those_of_the_whole():
    done = run_python(__file__, **host_devices(8))
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    assert done.stdout.split() == ["auto", "explicit", "shard_map", "pmap", "local"]


def sharded():
    """The modes of sharing a batch out over devices, against the whole batch on one device."""
    from jax.sharding import AxisType, NamedSharding
    from jax.sharding import PartitionSpec as P

    arrays, cotangents = operands((3, 4, 4, 16))
    axes = (P(None, None, None, "data"), P(), P(), P(None, None, None, "data"), P())
    run = functools.partial(of_ours)
    reference = jax.tree.map(np.asarray, with_gradients(run, arrays, cotangents))

    def check(name, result):
        for a, b in zip(jax.tree.leaves(result), jax.tree.leaves(reference), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)
        print(name)

    for kind in (AxisType.Auto, AxisType.Explicit):
        mesh = jax.make_mesh((8,), ("data",), axis_types=(kind,))
        with jax.set_mesh(mesh):
            placed = [jax.device_put(a, NamedSharding(mesh, s)) for a, s in zip(arrays, axes)]
            dy = jax.device_put(cotangents[0], NamedSharding(mesh, axes[0]))
            both = jax.jit(functools.partial(with_gradients, run))
            check(kind.name.lower(), both(placed, (dy, *cotangents[1:])))
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))

    def loss(f):
        def total(*arrays):
            y, mean, variance = f(*arrays)
            return sum(jnp.sum(a * c) for a, c in zip((y, mean, variance), cotangents))

        return lambda *arrays: (f(*arrays), jax.grad(total, tuple(range(5)))(*arrays))

    def mapped(axis_name):
        return jax.shard_map(
            functools.partial(of_ours, axis_name=axis_name),
            mesh=mesh,
            in_specs=axes,
            out_specs=(axes[0], P() if axis_name else P("data"), P() if axis_name else P("data")),
        )

    check("shard_map", jax.jit(loss(mapped("data")))(*arrays))

    def shared(a):
        return a.reshape(3, 4, 4, 8, 2).transpose(3, 0, 1, 2, 4)

    x, scale, bias, residual, factor = arrays
    y, mean, variance = jax.pmap(
        lambda x, residual: of_ours(x, scale, bias, residual, factor, axis_name="data"),
        axis_name="data",
    )(shared(x), shared(residual))
    np.testing.assert_allclose(y, shared(reference[0][0]), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(mean[3], reference[0][1], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(variance[5], reference[0][2], rtol=1e-4)
    print("pmap")
    # Without axis_name every device has the statistics of its own images, in the native kernels.
    program = jax.jit(mapped(None))
    means = program(*arrays)[1].reshape(8, 3)
    np.testing.assert_allclose(means, shared(x).mean((2, 3, 4)), rtol=1e-4, atol=1e-5)
    assert cpu.unavailable() or "NormActForward" in program.lower(*arrays).as_text()
    print("local")


if __name__ == "__main__":
    sharded()
