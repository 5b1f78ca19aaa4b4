"""The Flax layers: `Conv` where the kernel is dense, masked-dense results where it is sparse."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from sklearn.datasets import load_digits

import blocksparse_jax as bsj
from blocksparse_jax import linen as bs_linen
from blocksparse_jax import nnx as bs_nnx
from blocksparse_jax.layout import BlockLayout, block_index, layout_to_mask
from blocksparse_jax.layout_nodes import ConsecutiveGroups, Dense

SHAPE = (3, 3, 6, 8)
OPTIONS = [
    {},
    {"kernel_size": 3, "strides": 2},
    {"kernel_size": (2, 1), "strides": (2, 1), "padding": "VALID"},
    {"padding": 1, "kernel_dilation": 2, "use_bias": False},
    {"padding": ((0, 2), (1, 0)), "strides": (1, 2)},
    {"padding": (1, 0)},
    {"kernel_size": (1, 1), "strides": None},
    {"feature_group_count": 2},
    {"dtype": jnp.bfloat16},
]


def block_layout(shape=SHAPE, group_size=4, kept=3, kept_taps=4, seed=0):
    kh, kw, cin, cout = shape
    rng, groups = np.random.default_rng(seed), cout // group_size
    filters = rng.permutation(cout).reshape(groups, group_size)
    channels = np.stack([np.sort(rng.permutation(cin)[:kept]) for _ in range(groups)])
    taps = np.stack([np.sort(rng.permutation(kh * kw)[:kept_taps]) for _ in range(groups)])
    return BlockLayout(*(jnp.asarray(a, jnp.int32) for a in (filters, channels, taps)), shape=shape)


def pack(kernel, layout):
    return kernel.reshape(-1, *kernel.shape[2:])[block_index(layout)]


def normal(seed, shape):
    return jax.random.normal(jax.random.key(seed), shape)


def conv_options(options):
    """The options of a `BlockSparseConv`, and of Flax's `Conv`, where one integer means 1-D."""
    options = {"kernel_size": (3, 3)} | options
    return options, options | ({"kernel_size": (3, 3)} if options["kernel_size"] == 3 else {})


def test_linen_layer_has_the_params_and_batch_axes_of_conv():
    layer, conv, x = bs_linen.BlockSparseConv(8, 3), nn.Conv(8, (3, 3)), normal(0, (2, 7, 9, 6))
    params = jax.jit(conv.init)(jax.random.key(1), x)
    jax.tree.map(np.testing.assert_array_equal, jax.jit(layer.init)(jax.random.key(1), x), params)
    apply = jax.jit(lambda layer, x: layer.apply(params, x), static_argnums=0)
    for image in (x, x[0], x[:, None]):
        np.testing.assert_array_equal(apply(layer, image), apply(conv, image))


@pytest.mark.parametrize(
    ("features", "options"),
    [(32, options) for options in OPTIONS] + [(4, options) for options in OPTIONS[:4]],
    ids=str,
)
def test_linen_dense_layer_equals_conv_in_both_formats(features, options):
    """In CHWN 32 features run as one matrix product of the rows, 4 as XLA's convolution."""
    layer_options, flax_options = conv_options(options)
    layer, conv, x = (
        bs_linen.BlockSparseConv(features, **layer_options),
        nn.Conv(features, **flax_options),
        normal(0, (2, 7, 9, 6)),
    )
    shapes = jax.eval_shape(conv.init, jax.random.key(1), x)
    params = jax.tree.map(lambda s: normal(s.size, s.shape).astype(s.dtype), shapes)

    @jax.jit
    def outputs(params, x):
        native = (
            layer.clone(data_format="CHWN")
            .apply(params, x.transpose(3, 1, 2, 0))
            .transpose(3, 1, 2, 0)
        )
        return conv.apply(params, x), layer.apply(params, x), native

    expected, nhwc, chwn = outputs(params, x)
    assert expected.dtype == nhwc.dtype == chwn.dtype
    tolerance = {"rtol": 2e-2, "atol": 2e-1} if "dtype" in options else {"rtol": 1e-5, "atol": 1e-4}
    np.testing.assert_allclose(nhwc.astype(float), expected.astype(float), **tolerance)
    np.testing.assert_allclose(chwn.astype(float), expected.astype(float), **tolerance)


def test_dense_chwn_layer_is_a_matrix_product_where_the_rows_are_few():
    """Other kernels, and stems of many pixels, run in the native kernels.

    Without these XLA runs a convolution, but the stem stays a product.
    """

    def operations(cin, cout, size=3, batch=128):
        layer = bs_linen.BlockSparseConv(cout, size, data_format="CHWN")
        x = jax.ShapeDtypeStruct((cin, 32, 32, batch), jnp.float32)  # a tuned shape
        kernel = jax.ShapeDtypeStruct((size, size, cin, cout), jnp.float32)
        text = str(
            jax.make_jaxpr(
                lambda k, x: layer.apply({"params": {"kernel": k, "bias": jnp.ones(cout)}}, x)
            )(kernel, x)
        )
        names = ("dot_general", "conv_general_dilated", "ffi_call")
        return [name for name in names if name in text]

    native = bsj.available_implementations()["cpu"] is None
    assert operations(3, 16, batch=8) == operations(256, 64, size=1) == ["dot_general"]
    assert operations(3, 16) == ["ffi_call" if native else "dot_general"]
    assert operations(64, 64) == ["ffi_call" if native else "conv_general_dilated"]


@pytest.mark.parametrize("data_format", ["NHWC", "CHWN"])
@pytest.mark.parametrize("packed", [False, True])
def test_linen_sparse_layer_equals_masked_dense(data_format, packed):
    layout, x = block_layout(), normal(0, (2, 7, 9, 6))
    layer = bs_linen.BlockSparseConv(8, 3, 2, padding=1)
    params = layer.init(jax.random.key(1), x)["params"]
    masked = params | {"kernel": jnp.where(layout_to_mask(layout), params["kernel"], 0)}
    weight = normal(2, (2, 4, 5, 8))

    def dense_loss(params, x):
        return (layer.apply({"params": params}, x) * weight).sum()

    def sparse_loss(params, x):
        sparse = layer.clone(data_format=data_format)
        variables = {"params": params, "layouts": {"kernel": layout, "bias": Dense()}}
        if data_format == "CHWN":
            return (
                sparse.apply(variables, x.transpose(3, 1, 2, 0)).transpose(3, 1, 2, 0) * weight
            ).sum()
        return (sparse.apply(variables, x) * weight).sum()

    expected, (expected_params, expected_x) = jax.jit(jax.value_and_grad(dense_loss, (0, 1)))(
        masked, x
    )
    inputs = params | {"kernel": pack(params["kernel"], layout)} if packed else params
    result, (result_params, result_x) = jax.jit(jax.value_and_grad(sparse_loss, (0, 1)))(inputs, x)
    expected_kernel = (
        pack(expected_params["kernel"], layout)
        if packed
        else jnp.where(layout_to_mask(layout), expected_params["kernel"], 0)
    )
    for a, b in (
        (result, expected),
        (result_x, expected_x),
        (result_params["bias"], expected_params["bias"]),
        (result_params["kernel"], expected_kernel),
    ):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=2e-5)


def test_linen_sparse_layer_in_bfloat16_gives_float32_gradients():
    layout, x = block_layout(), normal(0, (2, 7, 9, 6))
    layer = bs_linen.BlockSparseConv(8, 3, dtype=jnp.bfloat16, use_bias=False)
    values = normal(1, layout.packed_shape)

    def loss(values, layer):
        y = layer.apply({"params": {"kernel": values}, "layouts": {"kernel": layout}}, x)
        assert y.dtype == (layer.dtype or jnp.float32)
        return (y.astype(jnp.float32) ** 2).sum()

    gradient = jax.jit(jax.grad(loss), static_argnums=1)
    result, expected = gradient(values, layer), gradient(values, layer.clone(dtype=None))
    assert result.dtype == expected.dtype == jnp.float32
    assert jnp.linalg.norm(result - expected) < 2e-2 * jnp.linalg.norm(expected)
    assert (result != result.astype(jnp.bfloat16)).any()  # not rounded on the way


def test_linen_kernel_gradient_dense_gives_the_full_gradient():
    layout, x = block_layout(), normal(0, (2, 7, 9, 6))
    layer = bs_linen.BlockSparseConv(8, 3, kernel_gradient="dense", use_bias=False)
    kernel = jnp.where(
        layout_to_mask(layout), layer.init(jax.random.key(1), x)["params"]["kernel"], 0
    )

    def loss(kernel, layout):
        return (
            layer.apply({"params": {"kernel": kernel}, "layouts": {"kernel": layout}}, x) ** 2
        ).sum()

    gradient = jax.jit(jax.grad(loss))
    np.testing.assert_allclose(
        gradient(kernel, layout), gradient(kernel, Dense()), rtol=1e-4, atol=1e-4
    )


class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        return bs_linen.BlockSparseConv(8, 3, name="inner")(x)


@pytest.mark.parametrize(
    ("kernel", "layout", "message"),
    [
        (
            SHAPE,
            block_layout((3, 3, 8, 8)),
            r"inner/kernel: its layout is of a kernel \(3, 3, 8, 8\), expected \(3, 3, 6, 8\)",
        ),
        (
            (2, 3, 4, 4),
            None,
            r"inner/kernel: expected shape \(3, 3, 6, 8\), got \(2, 3, 4, 4\); packed values need "
            r"their layout",
        ),
        (
            (2, 3, 3, 4),
            block_layout(),
            r"inner/kernel: .* or packed \(2, 3, 4, 4\), got \(2, 3, 3, 4\)",
        ),
        (
            SHAPE,
            ConsecutiveGroups(4),
            r"inner/kernel: expected a BlockLayout or Dense\(\).*get_layouts",
        ),
    ],
)
def test_linen_errors_name_the_module(kernel, layout, message):
    variables = {"params": {"inner": {"kernel": jnp.ones(kernel), "bias": jnp.ones(8)}}}
    if layout is not None:
        variables["layouts"] = {"inner": {"kernel": layout}}
    with pytest.raises(ValueError, match=message):
        Net().apply(variables, jnp.ones((1, 5, 5, 6)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"data_format": "CHW"}, "data_format: .*did you mean 'CHWN'"),
        ({"kernel_size": (3, 3, 3)}, "kernel_size: expected an integer or two"),
        ({"strides": 0}, "strides: expected an integer of at least 1, got 0"),
        ({"padding": "SAMES"}, "padding: .*did you mean 'SAME'"),
        ({"padding": (1, 1, 1)}, "padding: expected one of 'SAME'"),
    ],
)
def test_bad_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        bs_linen.BlockSparseConv(**({"features": 8, "kernel_size": 3} | options)).init(
            jax.random.key(0), jnp.ones((1, 5, 5, 6))
        )
    with pytest.raises(ValueError, match=message):
        bs_nnx.BlockSparseConv(6, 8, **({"kernel_size": 3} | options), rngs=nnx.Rngs(0))(
            jnp.ones((1, 5, 5, 6))
        )


def test_a_grouped_convolution_has_no_layout():
    layer, params = (
        bs_linen.BlockSparseConv(8, 3, feature_group_count=2),
        {"kernel": jnp.ones(SHAPE), "bias": jnp.ones(8)},
    )
    with pytest.raises(ValueError, match="feature_group_count=2 stays dense"):
        layer.apply(
            {"params": params, "layouts": {"kernel": block_layout()}}, jnp.ones((1, 5, 5, 12))
        )


def test_chwn_needs_its_batch_axis():
    with pytest.raises(ValueError, match=r"x: expected \[cin, h, w, n\]"):
        bs_linen.BlockSparseConv(8, 3, data_format="CHWN").init(
            jax.random.key(0), jnp.ones((6, 5, 5))
        )


@pytest.mark.parametrize(
    "options",
    [{}, {"kernel_size": 3, "strides": 2, "use_bias": False}, {"feature_group_count": 2}],
    ids=str,
)
def test_nnx_layer_is_a_drop_in_for_conv(options):
    layer_options, flax_options = conv_options(options)
    layer, conv = (
        bs_nnx.BlockSparseConv(6, 8, **layer_options, rngs=nnx.Rngs(0)),
        nnx.Conv(6, 8, **flax_options, rngs=nnx.Rngs(0)),
    )
    np.testing.assert_array_equal(layer.kernel[...], conv.kernel[...])
    x = normal(0, (2, 7, 9, 6))
    for image in (x, x[0]):
        np.testing.assert_array_equal(layer(image), conv(image))


class Classifier(nnx.Module):
    def __init__(self, rngs):
        self.stem = bs_nnx.BlockSparseConv(1, 32, 3, data_format="CHWN", rngs=rngs)
        self.blocks = nnx.List(
            [bs_nnx.BlockSparseConv(32, 64, 3, 2, data_format="CHWN", rngs=rngs)]
        )
        self.norm = nnx.BatchNorm(64, axis=0, momentum=0.9, rngs=rngs)
        self.head = nnx.Linear(64, 10, rngs=rngs)

    def __call__(self, images):
        x = nnx.relu(self.stem(images.transpose(3, 1, 2, 0)))
        x = nnx.relu(self.norm(self.blocks[0](x)))
        return self.head(x.mean((1, 2)).T)


def test_nnx_layouts_travel_and_stay_out_of_the_params():
    model, layout = (
        Classifier(nnx.Rngs(0)),
        block_layout((3, 3, 32, 64), group_size=16, kept=4, kept_taps=3),
    )
    params = nnx.state(model, nnx.Param)
    layouts = jax.tree.map(
        lambda p: layout if p.shape == layout.shape else Dense(), params
    )  # the structure of the params, keys end in /value
    masked = nnx.clone(model)
    masked.blocks[0].kernel[...] = jnp.where(layout_to_mask(layout), model.blocks[0].kernel[...], 0)
    x = normal(0, (3, 8, 8, 1))
    bs_nnx.set_layouts(model, layouts)
    assert jax.tree.structure(nnx.state(model, nnx.Param)) == jax.tree.structure(params)
    forward = nnx.jit(lambda m, x: m(x))
    np.testing.assert_allclose(forward(model, x), forward(masked, x), rtol=1e-4, atol=1e-5)
    model.blocks[0].kernel.set_value(pack(model.blocks[0].kernel[...], layout))
    copy = nnx.merge(*nnx.split(model))
    np.testing.assert_allclose(forward(copy, x), forward(masked, x), rtol=1e-4, atol=1e-5)
    bs_nnx.set_layouts(model, {})
    assert model.blocks[0].layout.get_value() == Dense()


@pytest.mark.parametrize(
    ("layouts", "message"),
    [
        (
            {"stem": {"kernel": block_layout()}},
            r"layouts: stem/kernel is of a kernel \(3, 3, 6, 8\), expected \(3, 3, 1, 32\)",
        ),
        (
            {"head": {"kernel": block_layout()}},
            r"layouts: head/kernel is of a kernel \(3, 3, 6, 8\), expected \(64, 10\)",
        ),
        (
            {"conv": {"kernel": block_layout()}},
            "layouts: conv/kernel is no parameter of this model, expected names among",
        ),
        (
            {"stem": {"kernel": ConsecutiveGroups(4)}},
            "layouts: at stem/kernel expected a BlockLayout.*get_layouts",
        ),
    ],
)
def test_nnx_set_layouts_refuses_what_does_not_fit(layouts, message):
    with pytest.raises(ValueError, match=message):
        bs_nnx.set_layouts(Classifier(nnx.Rngs(0)), layouts)


def test_nnx_example_trains_with_hrbp_on_digits():
    digits = load_digits()
    images, labels = (
        jnp.asarray(digits.images[..., None] / 8 - 1, jnp.float32),
        jnp.asarray(digits.target),
    )
    model = Classifier(nnx.Rngs(0))
    tx = bsj.keep_zeros(
        optax.chain(bsj.hrbp_prune(0.8, group_size=16, block_density=1 / 3), optax.adam(1e-2))
    )
    optimizer = bs_nnx.Optimizer(model, tx, wrt=nnx.Param)
    drawn = bsj.get_layouts(optimizer.opt_state)
    bs_nnx.set_layouts(model, drawn)
    traces = []

    @nnx.jit
    def step(model, optimizer, x, y):
        traces.append(None)

        def loss_fn(model):
            return optax.softmax_cross_entropy_with_integer_labels(model(x), y).mean()

        loss, grads = nnx.value_and_grad(loss_fn)(model)
        optimizer.update(model, grads)
        return loss

    for i in range(80):
        batch = slice(i % 10 * 128, i % 10 * 128 + 128)
        step(model, optimizer, images[batch], labels[batch])
    model.eval()
    assert (model(images[1280:]).argmax(-1) == labels[1280:]).mean() > 0.85  # not trained on
    layout = bsj.get_layouts(optimizer.opt_state)["blocks"][0]["kernel"].get_value()
    jax.tree.map(np.testing.assert_array_equal, layout, drawn["blocks"][0]["kernel"].get_value())
    np.testing.assert_array_equal(model.blocks[0].kernel[...] != 0, layout_to_mask(layout))
    assert len(traces) == 1
