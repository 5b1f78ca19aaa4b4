"""Every padding that `nn.Conv` takes gives its values and gradients, and an empty batch none."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from sparse_methods import slow_unless

import blocksparse_jax as bsj
from blocksparse_jax import linen as bs_linen
from blocksparse_jax import nnx as bs_nnx

CIN, COUT = 4, 8
PADDINGS = ["SAME", "same", "VALID", "SAME_LOWER", "CIRCULAR", "REFLECT", 0, 1, 3, (1, 0)]
PADDINGS += [((0, 2), (1, 0)), (2, (0, 1)), [(1, 1), (2, 2)]]
IMPLEMENTATIONS = [
    name
    for name, reason in bsj.available_implementations().items()
    if reason is None and name in ("xla", "cpu", "dense")
]


def normal(seed, shape):
    return jax.random.normal(jax.random.key(seed), shape)


def layout_of(kernel_size, seed=0):
    sizes = {"group_size": 4, "kept": 2, "kept_taps": max(1, int(np.prod(kernel_size)) // 2)}
    return bsj.random_groups(jax.random.key(seed), (*kernel_size, CIN, COUT), **sizes)


def flax_results(x, kernel, bias, dy, kernel_size, **options):
    """The output of `nn.Conv` and its gradients with respect to x, kernel and bias."""
    options["padding"] = (
        options["padding"].upper() if options["padding"] == "same" else options["padding"]
    )
    layer = nn.Conv(COUT, kernel_size, **options)

    def forward(x, kernel, bias):
        return layer.apply({"params": {"kernel": kernel, "bias": bias}}, x)

    y, pullback = jax.vjp(forward, x, kernel, bias)
    return y, *pullback(dy(y.shape))


def our_results(x, kernel, bias, layout, dy, data_format="NHWC", **options):
    """The same of `conv`, in NHWC."""
    axes = (3, 1, 2, 0)

    def forward(x, kernel, bias):
        if data_format == "CHWN":
            x = x.transpose(axes)
        y = bsj.conv(x, kernel, layout, bias=bias, data_format=data_format, **options)
        return y.transpose(axes) if data_format == "CHWN" else y

    y, pullback = jax.vjp(forward, x, kernel, bias)
    return y, *pullback(dy(y.shape))


def assert_equal_to_flax(kernel_size, size, padding, strides, dilation, **options):
    layout = layout_of(kernel_size)
    x, kernel = normal(1, (2, *size, CIN)), normal(2, layout.shape)
    bias = normal(3, (COUT,))
    mask = bsj.layout_to_mask(layout)
    arguments = {"padding": padding, "strides": strides}

    def dy(shape):
        return normal(4, shape)

    def expected_results(x, kernel, bias):
        others = {"kernel_dilation": dilation} | arguments
        return flax_results(x, kernel, bias, dy, kernel_size, **others)

    def found_results(x, kernel, bias):
        others = {"dilation": dilation} | arguments | options
        return our_results(x, kernel, bias, layout, dy, **others)

    expected = jax.jit(expected_results)(x, jnp.where(mask, kernel, 0), bias)
    found = jax.jit(found_results)(x, kernel, bias)
    expected = (*expected[:2], jnp.where(mask, expected[2], 0), expected[3])
    for a, b in zip(found, expected, strict=True):
        assert a.shape == b.shape
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


# Each padding in one implementation, and one that XLA pads and one of borders in all of them.
PAIRS = [
    slow_unless(
        padding in ("VALID", "CIRCULAR") or (i + j) % len(IMPLEMENTATIONS) == 0,
        *(padding, implementation),
        id=f"{padding}-{implementation}",
    )
    for i, padding in enumerate(PADDINGS)
    for j, implementation in enumerate(IMPLEMENTATIONS)
]


@pytest.mark.parametrize(("padding", "implementation"), PAIRS)
def test_each_padding_is_that_of_flax(padding, implementation):
    assert_equal_to_flax(
        (3, 2), (6, 5), padding, (1, 1), (1, 1), implementation=implementation, data_format="CHWN"
    )


@given(
    kernel_size=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    strides=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    dilation=st.tuples(st.integers(1, 2), st.integers(1, 2)),
    padding=st.sampled_from(["SAME_LOWER", "CIRCULAR", "REFLECT", 2]),
)
@settings(max_examples=4, deadline=None)
def test_paddings_of_any_geometry_are_those_of_flax(kernel_size, strides, dilation, padding):
    """The image is as small as the kernel's reach, so that borders are as wide as they can be."""
    size = tuple((k - 1) * d + 1 for k, d in zip(kernel_size, dilation))
    assert_equal_to_flax(kernel_size, size, padding, strides, dilation)


def test_a_border_wider_than_the_image_is_that_of_flax():
    for padding in ("CIRCULAR", "REFLECT"):
        assert_equal_to_flax((5, 5), (1, 2), padding, (1, 1), (2, 1))


@pytest.mark.parametrize("padding", ["CIRCULAR", "REFLECT", 1])
def test_the_full_kernel_gradient_reads_the_border(padding):
    layout = layout_of((3, 3))
    x, kernel = normal(1, (2, 5, 4, CIN)), normal(2, layout.shape)
    masked = jnp.where(bsj.layout_to_mask(layout), kernel, 0)
    options = {"padding": padding, "strides": (2, 1)}

    def loss(kernel, layout, **more):
        return (bsj.conv(x, kernel, layout, **options, **more) ** 2).sum()

    expected = jax.grad(loss)(masked, bsj.Dense())
    found = jax.grad(loss)(kernel, layout, kernel_gradient="dense")
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)
    y, pullback = jax.vjp(lambda w: bsj.conv(x, w, bsj.Dense(), **options), masked)
    gradient = bsj.dense_kernel_gradient(x, y, (3, 3), **options)
    np.testing.assert_allclose(gradient, pullback(y)[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("data_format", "padding", "form"),
    [
        slow_unless((i + j + k) % 2 == 0, data_format, padding, form)
        for i, data_format in enumerate(["NHWC", "CHWN"])
        for j, padding in enumerate(["SAME", "CIRCULAR", 1])
        for k, form in enumerate(["masked", "dense", "packed"])
    ],
)
def test_an_empty_batch_gives_no_images_and_gradients_of_zero(data_format, padding, form):
    layout = layout_of((3, 3))
    kernel = normal(2, layout.shape)
    options = {"kernel_gradient": "dense"} if form == "dense" else {}
    if form == "packed":
        kernel = bsj.pack(kernel, layout)
    x = jnp.zeros((0, 6, 5, CIN) if data_format == "NHWC" else (CIN, 6, 5, 0))

    def forward(x, kernel, bias):
        return bsj.conv(
            x, kernel, layout, bias=bias, padding=padding, data_format=data_format, **options
        )

    y, pullback = jax.vjp(jax.jit(forward), x, kernel, jnp.ones(COUT))
    assert y.shape == ((0, 6, 5, COUT) if data_format == "NHWC" else (COUT, 6, 5, 0))
    dx, dkernel, dbias = pullback(y)
    assert dx.shape == x.shape
    assert dkernel.shape == kernel.shape
    assert not dkernel.any()
    assert not dbias.any()
    choice = bsj.choose_implementation(x, layout, data_format=data_format)
    assert choice.reason == "the batch is empty"


def test_choose_implementation_counts_the_border():
    """Explicit pixels and a border of as many make the same convolution."""
    layout, x = layout_of((3, 3)), jnp.ones((2, 6, 6, CIN))
    wide = jnp.ones((2, 8, 8, CIN))
    assert bsj.choose_implementation(x, layout, padding="CIRCULAR") == bsj.choose_implementation(
        wide, layout, padding="VALID"
    )


@pytest.mark.parametrize(
    ("padding", "message"),
    [
        ("CAUSAL", r"'CAUSAL' is for sequences .* give the pixels"),
        ("CIRCULER", "did you mean 'CIRCULAR'"),
        ((1, 1, 1), r"padding: expected one of 'SAME', .*got \(1, 1, 1\)"),
        (((1, 1),), "padding: expected one of"),
        (1.5, "padding: expected one of .*got 1.5"),
        (((0.5, 1), (1, 1)), "padding: expected one of"),
        (None, "padding: expected one of .*got None"),
        (-1, "pixels of at least 0"),
    ],
    ids=str,
)
def test_other_paddings_are_refused(padding, message):
    layout = layout_of((3, 3))
    with pytest.raises(ValueError, match=message):
        bsj.conv(jnp.ones((1, 5, 5, CIN)), jnp.ones(layout.shape), layout, padding=padding)


def test_a_border_needs_pixels():
    layout = layout_of((3, 3))
    with pytest.raises(ValueError, match="x: expected no empty axis"):
        bsj.conv(jnp.ones((1, 0, 5, CIN)), jnp.ones(layout.shape), layout, padding="REFLECT")
    with pytest.raises(ValueError, match="padding: 'REFLECT' repeats pixels, but x has none"):
        bsj.conv(jnp.ones((1, 0, 5, CIN)), jnp.ones(layout.shape), bsj.Dense(), padding="REFLECT")


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("padding", ["CIRCULAR", "REFLECT", "SAME_LOWER"])
def test_the_layers_take_them_too(groups, padding):
    x = normal(0, (2, 5, 4, CIN))
    options = {"padding": padding, "strides": (2, 1), "feature_group_count": groups}
    reference = nn.Conv(COUT, (3, 3), **options)
    variables = reference.init(jax.random.key(0), x)
    expected = reference.apply(variables, x)
    found = bs_linen.BlockSparseConv(COUT, (3, 3), **options).apply(variables, x)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
    layer = bs_nnx.BlockSparseConv(CIN, COUT, (3, 3), **options, rngs=nnx.Rngs(0))
    expected = nnx.Conv(CIN, COUT, (3, 3), **options, rngs=nnx.Rngs(0))(x)
    np.testing.assert_allclose(layer(x), expected, rtol=1e-5, atol=1e-5)
