"""The dense convolution: every formulation against the definition, and which one is chosen."""

import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import blocksparse_jax as bsj
from blocksparse_jax.linen import BlockSparseConv
from pallas_kernels.block_sparse_conv import ConvSpec, cpu, reference
from pallas_kernels.dense_conv import choose_formulation, dense_conv, taps_up_to

GEOMETRIES = {
    "same": {"padding": ((1, 1), (1, 1))},
    "strided": {"strides": (2, 2), "padding": ((0, 1), (1, 1))},
    "wide padding": {"kernel": (2, 5), "strides": (3, 1), "padding": ((4, 0), (0, 3))},
    "dilated": {"kernel": (3, 2), "dilation": (2, 3), "padding": ((2, 1), (3, 0))},
    "1x1, strided": {"kernel": (1, 1), "strides": (2, 3)},
    "tiny image": {"size": (2, 2), "padding": ((1, 1), (1, 1))},
}
FORMATS = {"NHWC": (0, 1, 2, 3), "CHWN": (3, 1, 2, 0)}
TO_NHWC = FORMATS  # both permutations are their own inverse
CASES = [("xla", "NHWC"), ("xla", "CHWN"), ("taps", "NHWC"), ("taps", "CHWN"), ("rows", "CHWN")]


def whole_numbers(seed, shape):
    """Small whole numbers: their sums are exact in any order."""
    return np.random.default_rng(seed).integers(-3, 4, shape).astype(np.float32)


def numpy_conv(x, weights, strides, padding, dilation):
    """NHWC, by the definition: one product of pixels and weights for each tap."""
    x = np.pad(x, ((0, 0), *padding, (0, 0)))
    kh, kw = weights.shape[:2]
    reach = [(k - 1) * d + 1 for k, d in zip((kh, kw), dilation)]
    height, width = ((n - r) // s + 1 for n, r, s in zip(x.shape[1:3], reach, strides))
    y = np.zeros((x.shape[0], height, width, weights.shape[3]), np.float32)
    for row, column in np.ndindex(height, width):
        for i, j in np.ndindex(kh, kw):
            pixel = x[:, row * strides[0] + i * dilation[0], column * strides[1] + j * dilation[1]]
            y[:, row, column] += pixel @ weights[i, j]
    return y


@pytest.mark.parametrize(("formulation", "data_format"), CASES)
@pytest.mark.parametrize("case", GEOMETRIES)
def test_every_formulation_is_the_definition_and_has_its_gradients(case, formulation, data_format):
    geometry = {"strides": (1, 1), "padding": ((0, 0), (0, 0)), "dilation": (1, 1)}
    geometry |= GEOMETRIES[case]
    kernel, size = geometry.pop("kernel", (3, 3)), geometry.pop("size", (7, 6))
    x, weights = whole_numbers(0, (2, *size, 3)), whole_numbers(1, (*kernel, 3, 4))
    y = numpy_conv(x, weights, **geometry)
    dy = whole_numbers(2, y.shape)

    def conv(x, weights):
        x = x.transpose(FORMATS[data_format])
        y = dense_conv(x, weights, data_format=data_format, formulation=formulation, **geometry)
        return y.transpose(TO_NHWC[data_format])

    @jax.jit
    def passes(x, weights, dy):
        y, pullback = jax.vjp(conv, x, weights)
        return y, *pullback(dy)

    result, dx, dweights = passes(x, weights, dy)
    np.testing.assert_array_equal(result, y)
    # The convolution is linear in each operand, so its gradient is known from single entries.
    rng = np.random.default_rng(3)
    for _ in range(5):
        entry = tuple(rng.integers(0, x.shape))
        unit = np.zeros_like(x)
        unit[entry] = 1
        assert dx[entry] == (numpy_conv(unit, weights, **geometry) * dy).sum()
        entry = tuple(rng.integers(0, weights.shape))
        unit = np.zeros_like(weights)
        unit[entry] = 1
        assert dweights[entry] == (numpy_conv(x, unit, **geometry) * dy).sum()


@pytest.mark.parametrize("data_format", ["NHWC", "CHWN"])
def test_a_grouped_convolution_is_that_of_each_group(data_format):
    x, weights = whole_numbers(0, (2, 5, 4, 6)), whole_numbers(1, (3, 3, 3, 4))
    y = dense_conv(
        jnp.asarray(x.transpose(FORMATS[data_format])),
        weights,
        data_format=data_format,
        feature_group_count=2,
    ).transpose(TO_NHWC[data_format])
    geometry = {"strides": (1, 1), "padding": ((0, 0), (0, 0)), "dilation": (1, 1)}
    for group in range(2):
        inputs, filters = slice(3 * group, 3 * group + 3), slice(2 * group, 2 * group + 2)
        np.testing.assert_array_equal(
            y[..., filters], numpy_conv(x[..., inputs], weights[..., filters], **geometry)
        )


def test_taps_sum_in_float32():
    x = jnp.ones((1, 1, 1, 4096), jnp.bfloat16)
    y = dense_conv(x, jnp.ones((1, 1, 4096, 2), jnp.bfloat16), formulation="taps")
    assert (y.dtype, float(y[0, 0, 0, 0])) == (jnp.bfloat16, 4096.0)


def test_padding_beyond_the_kernels_reach_gives_finite_gradients():
    """XLA's input gradient reads memory that nobody wrote there (jax 0.10.2, CPU)."""
    x, weights = jnp.ones((1, 3, 3, 2)), jnp.ones((1, 2, 2, 2))
    padding = ((3, 2), (0, 4))

    def total(x):
        return dense_conv(x, weights, padding=padding, formulation="xla").sum()

    gradient = jax.jit(jax.grad(total))(x)
    np.testing.assert_array_equal(gradient, gradient_of_sum(x, weights, padding))


def gradient_of_sum(x, weights, padding):
    """The input gradient of the sum of a convolution, by the definition."""
    gradient = np.zeros(x.shape, np.float32)
    for entry in np.ndindex(x.shape):
        unit = np.zeros(x.shape, np.float32)
        unit[entry] = 1
        gradient[entry] = numpy_conv(unit, np.asarray(weights), (1, 1), padding, (1, 1)).sum()
    return gradient


@pytest.mark.parametrize(
    ("arguments", "formulation"),
    [
        (((3, 3, 256, 128), 16, "NHWC"), "taps"),
        (((3, 3, 256, 128), 16, "CHWN"), "taps"),
        (((3, 3, 256, 128), 17, "NHWC"), "xla"),  # too many pixels
        (((3, 3, 256, 127), 16, "NHWC"), "xla"),  # too few weights
        (((1, 1, 256, 128), 16, "NHWC"), "xla"),  # one tap
        (((3, 3, 256, 128), 16, "NCHW"), "xla"),
        (((1, 1, 256, 128), 16, "CHWN"), "rows"),
        (((3, 3, 3, 14), 1024, "CHWN"), "rows"),
        (((3, 3, 3, 13), 1024, "CHWN"), "xla"),  # the rows take more than twice the output
        (((3, 3, 3, 14), 1024, "NHWC"), "xla"),
        (((3, 3, 3, 14), 1024, "CHWN", 2), "xla"),  # grouped
    ],
)
def test_the_choice(arguments, formulation):
    assert choose_formulation(*arguments) == formulation


def test_taps_are_chosen_on_cpus_only(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert choose_formulation((3, 3, 256, 128), 16, "NHWC") == "xla"
    assert choose_formulation((1, 1, 256, 128), 16, "CHWN") == "rows"


def test_a_benchmark_can_choose_taps_for_larger_images():
    kernel = (3, 3, 512, 512)
    elsewhere = []

    def in_another_thread():
        elsewhere.append(choose_formulation(kernel, 49, "NHWC"))

    with taps_up_to(64):
        assert choose_formulation(kernel, 49, "NHWC") == "taps"
        assert choose_formulation(kernel, 65, "NHWC") == "xla"
        thread = threading.Thread(target=in_another_thread)
        thread.start()
        thread.join()
    assert elsewhere == [choose_formulation(kernel, 49, "NHWC")] == ["xla"]
    with taps_up_to(0):
        assert choose_formulation(kernel, 1, "NHWC") == "xla"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"formulation": "tabs"}, "formulation: expected None or one of 'xla', .*'tabs'"),
        ({"formulation": "rows"}, "'rows' runs in CHWN .* data_format='NHWC'"),
        ({"formulation": "taps", "feature_group_count": 2}, "feature_group_count=2; use 'xla'"),
    ],
)
def test_a_formulation_that_cannot_run_says_so(arguments, message):
    with pytest.raises(ValueError, match=message):
        dense_conv(jnp.ones((1, 4, 4, 2)), jnp.ones((3, 3, 2, 2)), **arguments)


# The library's doors all lead here.


@pytest.mark.parametrize(("size", "strides", "data_format"), [(4, 1, "NHWC"), (8, 2, "CHWN")])
@pytest.mark.parametrize("door", ["layer", "conv", "masked"])
def test_small_images_of_many_channels_run_as_taps_through_every_door(
    door, size, strides, data_format
):
    x = whole_numbers(0, (1, size, size, 256))
    kernel = whole_numbers(1, (3, 3, 256, 128))
    layout = bsj.random_groups(jax.random.key(0), kernel.shape, group_size=32, kept=64, kept_taps=3)
    mask = bsj.layout_to_mask(layout) if door == "masked" else True
    kept = np.where(mask, kernel, 0)
    expected = numpy_conv(x, kept, (strides, strides), ((1, 1), (1, 1)), (1, 1))
    layer = BlockSparseConv(
        128, (3, 3), strides, padding=1, use_bias=False, data_format=data_format
    )
    options = {"strides": strides, "padding": ((1, 1), (1, 1)), "data_format": data_format}
    doors = {
        "layer": lambda x: layer.apply({"params": {"kernel": kernel}}, x),
        "conv": lambda x: bsj.conv(x, kernel, bsj.Dense(), **options),
        "masked": lambda x: bsj.conv(x, kernel, layout, implementation="dense", **options),
    }
    x = jnp.asarray(x.transpose(FORMATS[data_format]))
    native = data_format == "CHWN" and door != "masked" and cpu.unavailable() is None
    assert native or "conv_general_dilated" not in str(jax.make_jaxpr(doors[door])(x))
    y = jax.jit(doors[door])(x).transpose(TO_NHWC[data_format])
    np.testing.assert_array_equal(y, expected)
    # On CPUs a whole kernel has a table of its own in CHWN (tests/kernels/test_whole_kernel.py).
    with taps_up_to(0):  # another function: JAX keeps the trace of the first one
        jaxpr = str(jax.make_jaxpr(lambda x: doors[door](x))(x))
        assert native or "conv_general_dilated" in jaxpr


def test_a_layout_wins_over_the_product_for_each_tap():
    x, kernel = (jnp.ones(s, jnp.float32) for s in ((1, 4, 4, 256), (3, 3, 256, 128)))
    channels, taps = np.tile(np.arange(3), (4, 1)), np.tile(np.arange(2), (4, 1))
    arrays = (jnp.asarray(a, jnp.int32) for a in (np.arange(128).reshape(4, 32), channels, taps))
    layout = bsj.BlockLayout(*arrays, shape=kernel.shape)
    apply = jax.jit(BlockSparseConv(128, (3, 3), padding=1, use_bias=False).apply)
    y = apply({"params": {"kernel": kernel}, "layouts": {"kernel": layout}}, x)
    assert float(y.max()) == 6
    with pytest.raises(ValueError, match="packed values need their layout"):
        apply({"params": {"kernel": jnp.ones(layout.packed_shape)}}, x)


def test_the_dense_implementation_is_xlas_convolution():
    """What all other implementations are compared with does not depend on a choice."""
    spec = ConvSpec(
        cin=256,
        height=4,
        width=4,
        batch=2,
        kernel=(3, 3),
        cout=128,
        groups=1,
        kept=256,
        kept_taps=9,
        group_size=128,
    )
    shapes = [spec.in_shape, spec.packed_shape, (1, 128), (1, 256), (1, 9)]
    dtypes = [jnp.float32] * 2 + [jnp.int32] * 3
    operands = [jax.ShapeDtypeStruct(s, d) for s, d in zip(shapes, dtypes)]
    jaxpr = jax.make_jaxpr(lambda *a: reference.IMPLEMENTATION.forward(spec, *a))(*operands)
    assert "conv_general_dilated" in str(jaxpr)
