"""JAX's global modes: every implementation computes the same numbers and gradients under each.

The operands are made before a mode is set, as a user's program may set one at any time.
"""

import contextlib
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conv_cases import CASES, IMPLEMENTATIONS, NAMES, assert_close
from flax import nnx
from requirements import needs
from sparse_methods import slow_unless

import blocksparse_jax as bsj
from experiments.bench import shapes
from pallas_kernels.block_sparse_conv import cpu
from pallas_kernels.dense_conv import dense_conv
from pallas_kernels.two_of_four import two_of_four_matmul

NATIVE = needs(cpu.unavailable())
# Modes that only refuse are switched on together, since none changes what another sees.
MODES = {
    "x64": {"jax_enable_x64": True},
    "all that raise": {
        "jax_numpy_rank_promotion": "raise",
        "jax_numpy_dtype_promotion": "strict",
        "jax_debug_nans": True,
        "jax_enable_checks": True,
    },
    "no jit": {"jax_disable_jit": True},
}
# Without jit every operation is compiled by itself: slow, but for the default choice.
WITH_JIT, NO_JIT = ("x64", "all that raise"), ("no jit",)
every_mode = pytest.mark.parametrize(
    "modes",
    [slow_unless(modes == WITH_JIT, modes) for modes in (WITH_JIT, NO_JIT)],
    ids=", ".join,
)


@contextlib.contextmanager
def switched_on(mode):
    before = {name: getattr(jax.config, name) for name in MODES[mode]}
    try:
        for name, value in MODES[mode].items():
            jax.config.update(name, value)
        yield
    finally:
        for name, value in before.items():
            jax.config.update(name, value)


def check(modes, run, *operands, tolerance=1e-5):
    """A function of arrays has the same dtypes and numbers in each mode as outside of it."""
    expected = jax.tree.leaves(jax.jit(lambda *operands: run(*operands))(*operands))
    assert all(np.asarray(a, np.float32).any() for a in expected)
    for mode in modes:
        with switched_on(mode):
            actual = jax.tree.leaves(jax.jit(lambda *operands: run(*operands))(*operands))
        assert [a.dtype for a in actual] == [a.dtype for a in expected], mode
        assert_close(actual, expected, tolerance)


def with_gradients(f, *operands):
    """The value of a function, and the gradients of a weighted sum of it."""
    y, pullback = jax.vjp(f, *operands)
    return y, pullback(jnp.linspace(-1, 1, y.size, dtype=y.dtype).reshape(y.shape))


def convolution(case, name, dtype="float32", relu=True):
    """A convolution with its epilogue, and all of its operands."""
    spec = dataclasses.replace(CASES[case], dtype=dtype)
    x, dy, values, *index = shapes.random_operands(spec)
    per_channel = (
        jnp.linspace(start, stop, spec.cout, dtype=jnp.float32)
        for start, stop in ((0.5, 2), (-1, 1))
    )

    def f(x, values, scale, bias, residual):
        more = {"scale": scale, "bias": bias, "residual": residual, "relu": relu}
        return shapes.convolve(spec, IMPLEMENTATIONS.get(name), x, values, *index, **more)

    return f, (x, values, *per_channel, dy)


@pytest.mark.parametrize(
    ("modes", "name"),
    [
        slow_unless(modes == WITH_JIT or name is None, modes, name, id=f"{', '.join(modes)}-{name}")
        for name in [None, *IMPLEMENTATIONS]
        for modes in (WITH_JIT, NO_JIT)
    ],
)
def test_all_passes_of_every_implementation(modes, name):
    f, operands = convolution("stride", name)
    check(modes, functools.partial(with_gradients, f), *operands)


@pytest.mark.parametrize("name", NAMES)
@every_mode
def test_half_precision(modes, name):
    f, operands = convolution("same", name, "bfloat16", relu=False)  # rounding would flip its steps
    check(modes, functools.partial(with_gradients, f), *operands, tolerance=1e-2)


@pytest.mark.parametrize("name", NAMES)
@every_mode
def test_second_derivatives(modes, name):
    f, operands = convolution("1x1, stride, batch 1", name)

    def gradient(*operands):
        positions = tuple(range(len(operands)))
        return jax.grad(lambda *o: jnp.sum(jnp.sin(f(*o))), positions)(*operands)

    def reverse(*operands):
        return jax.grad(lambda *o: sum(jnp.sum(g * g) for g in gradient(*o)), (0, 1))(*operands)

    check(modes, reverse, *operands, tolerance=1e-4)
    check(modes, lambda *o: jax.jvp(gradient, o, o)[1], *operands, tolerance=1e-4)


@pytest.mark.parametrize("name", NAMES)
@every_mode
def test_a_batch_of_calls(modes, name):
    f, operands = convolution("same", name)
    many = [jnp.stack([a, -a]) for a in operands]
    check(modes, jax.vmap(functools.partial(with_gradients, f)), *many)


KERNEL = jax.random.normal(jax.random.key(0), (3, 3, 16, 8), jnp.float32)
LAYOUT = bsj.random_groups(jax.random.key(1), KERNEL.shape, group_size=4, kept=5, kept_taps=3)
DOORS = {
    "native": {},
    "xla": {"implementation": "xla"},
    "dense": {"implementation": "dense"},
    "dense gradient": {"kernel_gradient": "dense"},
    "dense gradient of dense": {"kernel_gradient": "dense", "implementation": "dense"},
    "packed": {"packed": True},
    "packed, dense": {"packed": True, "implementation": "dense"},
    "CHWN": {"data_format": "CHWN"},
    "strides, circular": {"strides": (2, 1), "padding": "CIRCULAR"},
}


@pytest.mark.parametrize("door", DOORS)
@every_mode
def test_every_door_of_conv(modes, door):
    options = DOORS[door]
    x = jax.random.normal(jax.random.key(2), (3, 6, 5, 16), jnp.float32)
    if "data_format" in options:
        x = x.transpose(3, 1, 2, 0)
    bias = jnp.linspace(-1, 1, 8, dtype=jnp.float32)

    def f(x, kernel, bias):
        kernel = bsj.pack(kernel, LAYOUT) if "packed" in options else kernel
        return bsj.conv(x, kernel, LAYOUT, bias=bias, activation="relu", **options)

    check(modes, functools.partial(with_gradients, f), x, KERNEL, bias)


@pytest.mark.parametrize(
    ("formulation", "data_format"),
    [(None, "NHWC"), ("xla", "NHWC"), ("taps", "NHWC"), ("taps", "CHWN"), ("rows", "CHWN")],
)
@every_mode
def test_every_dense_formulation(modes, formulation, data_format):
    x = jax.random.normal(jax.random.key(0), (4, 4, 4, 4), jnp.float32)
    f = functools.partial(
        dense_conv,
        strides=(2, 1),
        padding=((1, 1), (0, 2)),
        data_format=data_format,
        formulation=formulation,
    )
    check(modes, functools.partial(with_gradients, f), x, KERNEL[:, :, :4])


@every_mode
def test_the_two_of_four_product(modes):
    weights = KERNEL.reshape(-1, 8)[:32]
    x = jax.random.normal(jax.random.key(0), (32, 6), jnp.float32)
    f = functools.partial(two_of_four_matmul, channel_major=True)
    check(modes, functools.partial(with_gradients, f), weights, x)
    halves = weights.astype(jnp.bfloat16), x.astype(jnp.bfloat16)
    check(modes, functools.partial(with_gradients, f), *halves, tolerance=1e-2)


@pytest.mark.parametrize("name", NAMES)
def test_debug_nans_finds_the_first_nan(name):
    """The mode does what it is for: it stops where a NaN arises, and only there."""
    f, (x, *others) = convolution("same", name)
    with jax.debug_nans(False):
        x = x.at[0, 3, 2, 1].set(jnp.nan)
    with switched_on("all that raise"), pytest.raises(FloatingPointError):
        jax.block_until_ready(jax.jit(f)(x, *others))


@pytest.mark.parametrize("implementation", ["xla", pytest.param("cpu", marks=NATIVE)])
@every_mode
def test_batch_norm_with_a_residual_and_a_relu(modes, implementation):
    keys = jax.random.split(jax.random.key(0), 4)
    x, residual = (jax.random.normal(key, (3, 4, 5, 6), jnp.float32) for key in keys[:2])
    scale, bias = (jax.random.normal(key, (3,), jnp.float32) for key in keys[2:])

    def run(x, residual, scale, bias):
        def forked(x, residual, scale, bias, factor):
            more = {"residual": residual, "factor": factor, "fork": True}
            ys, _, _ = bsj.norm_act(x, scale, bias, **more, implementation=implementation)
            return ys[0] + 2 * ys[1]

        return with_gradients(forked, x, residual, scale, bias, jnp.float32(0.7))

    check(modes, run, x, residual, scale, bias)
    halves = x.astype(jnp.bfloat16), residual.astype(jnp.bfloat16)
    check(modes, run, *halves, scale, bias, tolerance=2e-2)


def of_linen(x, kernel, with_sums):
    norm = bsj.linen.BatchNormAct(False, dtype=jnp.bfloat16)
    conv = bsj.linen.BlockSparseConv(8, 3, use_bias=False)
    y = conv.apply({"params": {"kernel": kernel}}, x, with_sums=with_sums)
    return norm.apply(norm.init(jax.random.key(0), y), y, mutable=["batch_stats"])[0]


def of_nnx(x, kernel, with_sums):
    norm = bsj.nnx.BatchNormAct(8, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    conv = bsj.nnx.BlockSparseConv(16, 8, 3, use_bias=False, rngs=nnx.Rngs(0))
    conv.kernel.set_value(kernel)
    return norm(conv(x, with_sums=with_sums))


@pytest.mark.parametrize("with_sums", [False, True])
@pytest.mark.parametrize("layers", [of_linen, of_nnx])
@every_mode
def test_a_batch_norm_in_half_precision_behind_a_convolution_in_single(modes, layers, with_sums):
    x = jax.random.normal(jax.random.key(0), (3, 6, 5, 16), jnp.float32)

    def f(x, kernel):
        return bsj.activations(layers(x, kernel, with_sums))

    check(modes, functools.partial(with_gradients, f), x, KERNEL, tolerance=1e-2)
