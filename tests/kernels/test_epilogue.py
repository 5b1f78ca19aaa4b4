"""relu(scale * conv + bias + residual), in every implementation and at every door."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import blocksparse_jax as bsj
from experiments.bench import shapes
from pallas_kernels.block_sparse_conv import ConvSpec, available_implementations

NAMES = [name for name, reason in available_implementations().items() if reason is None]
SPEC = ConvSpec(
    cin=9,
    height=7,
    width=6,
    batch=5,
    kernel=(3, 3),
    cout=24,
    groups=3,
    kept=4,
    kept_taps=3,
    group_size=8,
    strides=(2, 1),
    padding=((1, 1), (0, 2)),
)
PARTS = {"scale": (SPEC.cout,), "bias": (SPEC.cout,), "residual": SPEC.out_shape}


def random_parts(dtype="float32"):
    rng = np.random.default_rng(7)
    parts = {
        name: jnp.asarray(rng.standard_normal(shape).astype(np.float32))
        for name, shape in PARTS.items()
    }
    return parts | {"residual": parts["residual"].astype(dtype)}


def defined(y, scale=None, bias=None, residual=None, relu=False):
    y = y if scale is None else y * scale[:, None, None, None]
    y = y if bias is None else y + bias[:, None, None, None]
    y = y if residual is None else y + residual
    return jnp.where(y > 0, y, 0) if relu else y


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize(
    "names",
    [
        pytest.param(names, marks=[pytest.mark.slow] if n == 2 else [], id="+".join(names))
        for n in range(4)
        for names in itertools.combinations(PARTS, n)
    ],
)
@pytest.mark.parametrize("name", NAMES)
def test_value_and_gradients_are_those_of_the_definition(name, names, relu):
    x, dy, values, *index = shapes.random_operands(SPEC)
    parts = {part: value for part, value in random_parts().items() if part in names}

    def fused(x, values, parts):
        return shapes.convolve(SPEC, name, x, values, *index, **parts, relu=relu)

    def reference(x, values, parts):
        return defined(shapes.convolve(SPEC, "dense", x, values, *index), **parts, relu=relu)

    def results(f):
        y, pullback = jax.vjp(f, x, values, parts)
        return y, pullback(dy)

    for a, b in zip(
        *(jax.tree.leaves(jax.jit(results, static_argnums=0)(f)) for f in (fused, reference)),
        strict=True,
    ):
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * np.abs(b).max())


@pytest.mark.parametrize("name", NAMES)
def test_half_precision_is_rounded_once_or_twice(name):
    spec = dataclasses.replace(SPEC, dtype="bfloat16")
    x, _, values, *index = shapes.random_operands(spec)
    parts = random_parts("bfloat16")
    y = jax.jit(lambda: shapes.convolve(spec, name, x, values, *index, **parts, relu=True))()
    assert y.dtype == jnp.bfloat16
    exact = shapes.convolve(
        SPEC, "dense", x.astype(jnp.float32), values.astype(jnp.float32), *index
    )
    expected = defined(
        exact, **{part: value.astype(jnp.float32) for part, value in parts.items()}, relu=True
    )
    np.testing.assert_allclose(
        y.astype(jnp.float32), expected, rtol=0, atol=2e-2 * float(expected.max())
    )


@jax.debug_nans(False)
def test_nan_passes_through_the_relu():
    for name in NAMES:
        x, _, values, *index = shapes.random_operands(SPEC)
        y = shapes.convolve(
            SPEC, name, x, values, *index, bias=jnp.full(SPEC.cout, jnp.nan), relu=True
        )
        assert jnp.isnan(y).all(), name


def test_nothing_kept_leaves_the_epilogue():
    x, _, values, filters, channels, taps = shapes.random_operands(SPEC)
    parts = random_parts()
    y = shapes.convolve(
        SPEC, None, x, values[:, :0], filters, channels[:, :0], taps, **parts, relu=True
    )
    np.testing.assert_allclose(y, defined(jnp.zeros(SPEC.out_shape), **parts, relu=True), atol=1e-6)


DENSE = bsj.Dense()
LAYOUT = bsj.random_groups(jax.random.key(0), (3, 3, 16, 32), group_size=8, kept=4, kept_taps=3)


@pytest.mark.parametrize("data_format", ["NHWC", "CHWN"])
@pytest.mark.parametrize(
    "door", ["dense kernel", "packed", "full gradient", "masked dense", "Dense()"]
)
def test_every_door_of_conv(door, data_format):
    rng = np.random.default_rng(0)
    kernel, x, residual = (
        jnp.asarray(rng.standard_normal(s).astype(np.float32))
        for s in ((3, 3, 16, 32), (2, 6, 5, 16), (2, 6, 5, 32))
    )
    scale, bias = jnp.linspace(-1, 2, 32), jnp.linspace(1, -1, 32)
    mask = jnp.ones(kernel.shape, bool) if door == "Dense()" else bsj.layout_to_mask(LAYOUT)
    plain = bsj.conv(x, jnp.where(mask, kernel, 0), DENSE)
    by_channel = (None, None, None)
    expected = jax.nn.relu(scale[by_channel] * plain + bias[by_channel] + residual)
    if data_format == "CHWN":
        x, residual, expected = (a.transpose(3, 1, 2, 0) for a in (x, residual, expected))
    options = {
        "full gradient": {"kernel_gradient": "dense"},
        "masked dense": {"implementation": "dense"},
    }.get(door, {})
    values, layout = (
        bsj.pack(kernel, LAYOUT) if door == "packed" else kernel,
        DENSE if door == "Dense()" else LAYOUT,
    )
    epilogue = {"scale": scale, "bias": bias, "residual": residual, "activation": "relu"}
    fused = bsj.conv(x, values, layout, data_format=data_format, **epilogue, **options)
    np.testing.assert_allclose(fused, expected, atol=1e-4)
    for part, bad, message in (
        (
            "scale",
            jnp.ones(31),
            r"scale: expected one number for each of 32 output channels, got shape \(31,\)",
        ),
        ("bias", jnp.ones((1, 32)), r"bias: expected one number for each of 32"),
        ("residual", residual[:1], "residual: expected the shape of the output"),
        ("activation", "rellu", "activation: .*relu"),
    ):
        with pytest.raises(ValueError, match=message):
            bsj.conv(
                x, values, layout, data_format=data_format, **(epilogue | {part: bad}), **options
            )
