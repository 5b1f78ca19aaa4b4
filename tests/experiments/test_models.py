"""The zoo: networks have the published sizes, compute the same in both data formats, and transpose
no activations between stem and pool.
"""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from jax import lax
from requirements import needs

import blocksparse_jax as bsj
from blocksparse_jax.tree import conv_kernels, path_name
from experiments.models import create, names
from experiments.models.layers import DepthwiseConv, Parts
from experiments.models.pools import max_pool
from pallas_kernels.block_sparse_conv import cpu

# (name, classes, width, stem) -> number of parameters: torchvision's for 1000 classes; the CIFAR
# ResNets as GraSP has them (a 1x1 convolution and a norm in the shortcuts)
PUBLISHED = {
    ("resnet20", 10, 1, "cifar"): 272_474,
    ("resnet32", 10, 2, "cifar"): 1_860_522,
    ("resnet56", 10, 1, "cifar"): 855_770,
    ("vgg19", 10, 1, "cifar"): 20_035_018,
    ("resnet18", 1000, 1, "imagenet"): 11_689_512,
    ("resnet34", 1000, 1, "imagenet"): 21_797_672,
    ("resnet50", 1000, 1, "imagenet"): 25_557_032,
    ("resnet50_v1_5", 1000, 1, "imagenet"): 25_557_032,
    ("mobilenet_v1", 1000, 1, "imagenet"): 4_231_976,
}


def small_model(name, *, num_classes=10, blocks=None, **options):
    """The model by name; `blocks` makes a ResNet shallower, which compiles in less time."""
    model = create(name, num_classes=num_classes, **options)
    return model if blocks is None else model.clone(blocks=blocks)


def abstract(name, *, size=32, batch=2, **options):
    """The model, the shapes of its variables and of its images; nothing is computed."""
    model = small_model(name, **options)
    images = jax.ShapeDtypeStruct((batch, size, size, 3), jnp.float32)
    return model, jax.eval_shape(model.init, jax.random.key(0), images), images


def block_layout(shape, seed=0):
    """Random blocks: two groups keep a quarter of the channels and a third of the taps each."""
    kh, kw, cin, cout = shape
    rng = np.random.default_rng(seed)
    channels = np.stack([np.sort(rng.permutation(cin)[: cin // 4]) for _ in range(2)])
    taps = np.stack([np.sort(rng.permutation(kh * kw)[: -(-kh * kw // 3)]) for _ in range(2)])
    arrays = (
        jnp.asarray(a, jnp.int32) for a in (rng.permutation(cout).reshape(2, -1), channels, taps)
    )
    return bsj.BlockLayout(*arrays, shape=tuple(shape))


def sparse_layouts(params):
    """Block layouts for the convolutions that are sparse by default, but for 1x1 shortcuts."""

    def layout(path, leaf):
        name = path_name(path)
        return (
            block_layout(leaf.shape, len(name))
            if conv_kernels(name, leaf) and "downsample" not in name
            else bsj.Dense()
        )

    return jax.tree_util.tree_map_with_path(layout, params)


def on_layouts(f, layouts, *trees):
    return jax.tree.map(f, layouts, *trees, is_leaf=bsj.is_layout)


def random_variables(variables):
    """Random values for the shapes of `model.init`: small for kernels, around 1 for norms."""
    leaves, structure = jax.tree.flatten(variables)
    rng = np.random.default_rng(0)
    values = [
        rng.normal(size=s.shape) * math.sqrt(2 / math.prod(s.shape[:-1]))
        if len(s.shape) > 1
        else rng.uniform(0.5, 1.5, s.shape)
        for s in leaves
    ]
    return jax.tree.unflatten(structure, [jnp.asarray(v, jnp.float32) for v in values])


@pytest.mark.parametrize(("options", "expected"), PUBLISHED.items(), ids=str)
def test_parameter_counts_are_the_published_ones(options, expected):
    name, classes, width, stem = options
    size = 224 if stem == "imagenet" else 32
    model, variables, images = abstract(
        name, num_classes=classes, width=width, stem=stem, size=size
    )
    assert sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(variables["params"])) == expected
    logits, _ = jax.eval_shape(
        lambda v, x: model.apply(v, x, train=True, mutable=["batch_stats"]), variables, images
    )
    assert (logits.shape, logits.dtype) == ((2, classes), jnp.float32)


@pytest.mark.parametrize("name", names())
def test_names_say_which_kernels_stay_dense(name):
    _, variables, _ = abstract(name, dtype=jnp.bfloat16)
    kernels = [
        (path_name(path), leaf)
        for path, leaf in jax.tree.leaves_with_path(variables["params"])
        if leaf.ndim == 4
    ]
    assert kernels[[n for n, _ in kernels].index("stem/kernel")][1].shape[2] == 3
    assert variables["params"]["classifier"]["kernel"].shape[1] == 10
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(variables))
    dense = [n for n, leaf in kernels if not conv_kernels(n, leaf)]
    assert dense == [n for n, _ in kernels if n == "stem/kernel" or "depthwise" in n]
    shortcuts = {n: leaf.shape for n, leaf in kernels if "downsample" in n}
    assert all(shape[:2] == (1, 1) for shape in shortcuts.values())
    assert (len(shortcuts) > 1) == name.startswith("resnet")


def test_resnet50_v1_5_strides_in_the_3x3():
    def strides(name):
        model, variables, images = abstract(name, stem="imagenet", size=64)
        _, state = jax.eval_shape(
            lambda v, x: model.apply(v, x, capture_intermediates=True, mutable=["intermediates"]),
            variables,
            images,
        )
        return [
            state["intermediates"]["stage2_block1"][f"conv{i}"]["__call__"][0].shape[1]
            for i in (1, 2, 3)
        ]

    assert strides("resnet50") == [8, 8, 8]
    assert strides("resnet50_v1_5") == [16, 8, 8]


@pytest.mark.parametrize(
    ("options", "nearest"),
    [
        ({"name": "resnt20"}, "resnet20"),
        ({"stem": "imagnet"}, "imagenet"),
        ({"data_format": "CHW"}, "CHWN"),
    ],
)
def test_a_typo_gets_the_nearest_option(options, nearest):
    with pytest.raises(ValueError, match=f"did you mean '{nearest}'"):
        create(**{"name": "cnn", "num_classes": 10, **options})


def test_the_imagenet_stem_is_refused_where_there_is_none():
    with pytest.raises(ValueError, match="stem: 'vgg19' has only the 'cifar' stem"):
        create("vgg19", num_classes=10, stem="imagenet")


@pytest.mark.parametrize(("size", "strides", "padding"), [(2, 2, 0), (3, 2, 1), (3, 1, 1)])
@pytest.mark.parametrize("side", [6, 7])
def test_max_pool_equals_reduce_window(size, strides, padding, side):
    x = jax.random.normal(jax.random.key(0), (2, side, side + 1, 3))
    pads = ((padding, padding),) * 2
    expected, expected_vjp = jax.vjp(
        lambda x: nn.max_pool(x, (size, size), (strides, strides), pads), x
    )
    actual, actual_vjp = jax.vjp(lambda x: max_pool(x, size, strides, padding), x)
    cotangent = jax.random.normal(jax.random.key(1), expected.shape)
    np.testing.assert_array_equal(actual, expected)
    np.testing.assert_allclose(
        actual_vjp(cotangent)[0], expected_vjp(cotangent)[0], rtol=1e-6, atol=1e-6
    )


@pytest.mark.parametrize("size", [2, 3])
def test_the_first_of_equal_maxima_takes_the_gradient_as_in_reduce_window(size):
    x = jax.random.randint(jax.random.key(0), (2, 6, 6, 3), 0, 3).astype(jnp.float32)
    x = x.at[0, 0, 1, 0].set(jnp.nan)
    y, expected_vjp = jax.vjp(lambda x: nn.max_pool(x, (size, size), (size, size)), x)
    dy = jax.random.normal(jax.random.key(1), y.shape)
    actual, vjp = jax.vjp(lambda x: max_pool(x, size, size), x)
    np.testing.assert_array_equal(actual, y)
    is_finite = ~jnp.isnan(x.reshape(2, 6 // size, size, 6 // size, size, 3)).any((2, 4))
    dy *= is_finite  # the gradient of a window with NaN goes to the NaN
    (expected,) = expected_vjp(dy)
    np.testing.assert_array_equal(vjp(dy)[0], expected)
    dx = jax.random.normal(jax.random.key(2), x.shape)
    _, dy_forward = jax.jvp(lambda x: max_pool(x, size, size), (x,), (dx,))
    np.testing.assert_allclose((dy_forward * dy).sum(), (dx * expected).sum(), rtol=1e-5)


@pytest.mark.parametrize("strides", [1, 2])
def test_depthwise_conv_equals_the_grouped_convolution(strides):
    x = jax.random.normal(jax.random.key(0), (2, 7, 6, 5))
    kernel = jax.random.normal(jax.random.key(1), (3, 3, 1, 5))
    expected = lax.conv_general_dilated(
        x,
        kernel,
        (strides, strides),
        ((1, 1), (1, 1)),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=5,
    )
    variables = {"params": {"kernel": kernel}}
    nhwc = DepthwiseConv(3, strides, Parts("NHWC")).apply(variables, x)
    chwn = DepthwiseConv(3, strides, Parts("CHWN")).apply(variables, x.transpose(3, 1, 2, 0))
    np.testing.assert_allclose(nhwc, expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(chwn.transpose(3, 1, 2, 0), expected, rtol=1e-5, atol=1e-5)


FAMILIES = [
    ("cnn", {"width": 0.25}, 8),
    ("cnn", {"width": 0.125}, 20),
    ("resnet20", {"width": 0.5, "blocks": (1, 2, 1)}, 8),
    ("vgg19", {"width": 0.125}, 16),
    ("resnet50_v1_5", {"width": 0.125, "stem": "imagenet", "blocks": (1, 2, 1, 1)}, 64),
    ("mobilenet_v1", {"width": 0.25}, 16),
    pytest.param("resnet20", {"width": 0.5}, 8, marks=pytest.mark.slow),
    pytest.param("resnet50_v1_5", {"width": 0.125, "stem": "imagenet"}, 64, marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("name", "options", "size"), FAMILIES, ids=str)
def test_both_data_formats_are_one_function(name, options, size):
    model, variables, _ = abstract(name, size=size, **options)
    variables = random_variables(variables)
    images = jax.random.normal(jax.random.key(0), (4, size, size, 3))

    @jax.jit
    def outputs(variables, images):
        return [
            m.apply(variables, images, train=True, mutable=["batch_stats"])
            for m in (model, small_model(name, data_format="NHWC", **options))
        ]

    chwn, nhwc = outputs(variables, images)
    for a, b in zip(jax.tree.leaves(chwn), jax.tree.leaves(nhwc), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-3)


def training_step(model):
    """A whole step of SGD, which returns `(params, batch_stats, loss, grads)`."""

    def step(params, batch_stats, layouts, images, labels):
        def loss_fn(params):
            variables = {"params": params, "batch_stats": batch_stats, "layouts": layouts}
            logits, new = model.apply(variables, images, train=True, mutable=["batch_stats"])
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
            return losses.mean(), new["batch_stats"]

        (loss, batch_stats), grads = jax.value_and_grad(loss_fn, has_aux=True)(params)
        return jax.tree.map(lambda p, g: p - 0.1 * g, params, grads), batch_stats, loss, grads

    return step


def test_packed_sparse_and_masked_training_steps_agree():
    model, variables, _ = abstract("cnn", size=8, width=0.25)
    variables = random_variables(variables)
    params = variables["params"]
    layouts = sparse_layouts(params)
    kept = on_layouts(
        lambda node, p: (
            bsj.layout_to_mask(node) if isinstance(node, bsj.BlockLayout) else jnp.asarray(True)
        ),
        layouts,
        params,
    )
    params = jax.tree.map(lambda p, m: p * m, params, kept)
    values = on_layouts(
        lambda node, p: bsj.pack(p, node) if isinstance(node, bsj.BlockLayout) else p,
        layouts,
        params,
    )
    images, labels = jax.random.normal(jax.random.key(0), (8, 8, 8, 3)), jnp.arange(8)
    step = jax.jit(training_step(model))
    _, _, loss, grads = step(params, variables["batch_stats"], {}, images, labels)
    _, _, sparse_loss, sparse_grads = step(
        params, variables["batch_stats"], layouts, images, labels
    )
    _, _, packed_loss, packed_grads = step(
        values, variables["batch_stats"], layouts, images, labels
    )
    np.testing.assert_allclose([sparse_loss, packed_loss], [loss, loss], rtol=1e-5)
    unpacked = on_layouts(
        lambda node, g: bsj.unpack(g, node) if isinstance(node, bsj.BlockLayout) else g,
        layouts,
        packed_grads,
    )
    expected = jax.tree.map(lambda g, mask: g * mask, grads, kept)
    for tree in (sparse_grads, unpacked):
        for a, b in zip(jax.tree.leaves(tree), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-3, atol=2e-4)


INSTRUCTION = re.compile(
    r"^\s*(?:ROOT )?%?([\w.-]+) = \w+\[([\d,]*)\]\{([\d,]*)[^}]*\} ([\w-]+)\((?:\w+\[\S+ "
    r")?%?([\w.-]+)(.*)",
    re.MULTILINE,
)


def moved_activations(text, least):
    """The instructions of a compiled program that move arrays of at least `least` elements.

    These are transposes and copies into another layout, also inside fusions. A transpose that only
    renames the axes of the same bytes (a bitcast) moves nothing and does not count.
    """
    instructions = {
        name: (_numbers(dims), _numbers(order), op, operand, rest)
        for name, dims, order, op, operand, rest in INSTRUCTION.findall(text)
    }
    moved = []
    for name, (dims, order, op, operand, rest) in instructions.items():
        if op not in ("transpose", "copy") or math.prod(dims) < least:
            continue
        if operand not in instructions:
            continue
        if op == "transpose":
            permutation = _numbers(re.search(r"dimensions=\{([\d,]*)\}", rest)[1])
        else:
            permutation = list(range(len(dims)))
        operand_dims, operand_order, *_ = instructions[operand]
        before = [axis for axis in operand_order if operand_dims[axis] > 1]
        after = [permutation[axis] for axis in order if dims[axis] > 1]
        if before != after:
            moved.append(f"{op} {name} {dims}")
    return moved


def _numbers(text):
    return [int(number) for number in text.split(",") if number]


def compiled_step(name, data_format, size, batch, **options):
    model, variables, images = abstract(
        name, size=size, batch=batch, data_format=data_format, **options
    )
    layouts = sparse_layouts(variables["params"])
    values = jax.eval_shape(
        lambda params: on_layouts(
            lambda node, p: bsj.pack(p, node) if isinstance(node, bsj.BlockLayout) else p,
            layouts,
            params,
        ),
        variables["params"],
    )
    labels = jax.ShapeDtypeStruct((batch,), jnp.int32)
    return (
        jax.jit(training_step(model))
        .lower(values, variables["batch_stats"], layouts, images, labels)
        .compile()
        .as_text()
    )


def test_moved_activations_counts_transposes_and_not_bitcasts():
    x = jax.ShapeDtypeStruct((8, 16, 32), jnp.float32)

    def count(f, least=8 * 16 * 32):
        return len(moved_activations(jax.jit(f).lower(x).compile().as_text(), least))

    assert count(lambda x: jnp.sin(x) + 1) == 0
    assert count(lambda x: jnp.sin(x).reshape(8, 1, 16, 32).transpose(1, 0, 2, 3)) == 0
    assert count(lambda x: jnp.sin(x).transpose(2, 0, 1)) > 0
    assert count(lambda x: jnp.sin(x).T, least=8 * 16 * 32 + 1) == 0


@pytest.mark.parametrize(
    ("name", "size", "batch", "least", "options"),
    [
        ("cnn", 8, 64, 16 * 16 * 64, {"width": 0.25}),
        ("resnet20", 16, 64, 4 * 4 * 64 * 64, {"blocks": (1, 2, 1)}),
        pytest.param("vgg19", 32, 16, 2 * 2 * 128 * 16, {"width": 0.25}, marks=pytest.mark.slow),
        ("mobilenet_v1", 32, 16, 2 * 2 * 512 * 16, {"width": 0.5}),
        ("resnet50", 16, 16, 2 * 2 * 128 * 16, {"width": 0.25, "blocks": (1, 2, 1, 1)}),
        pytest.param("resnet20", 16, 64, 4 * 4 * 64 * 64, {}, marks=pytest.mark.slow),
        pytest.param("resnet50", 16, 16, 2 * 2 * 128 * 16, {"width": 0.25}, marks=pytest.mark.slow),
    ],
)
def test_a_chwn_training_step_moves_no_activations(name, size, batch, least, options):
    """`least` is the size of the smallest activation between stem and pool.

    Weights are smaller; they may be transposed, and so may the images.
    """
    assert moved_but_images(name, size, batch, least, **options) == []


def moved_but_images(name, size, batch, least, **options):
    moved = moved_activations(compiled_step(name, "CHWN", size, batch, **options), least)
    return [text for text in moved if not text.endswith(f" [3, {size}, {size}, {batch}]")]


@pytest.mark.parametrize(("channels", "copies"), [(13, True), (14, False)])
def test_a_stem_of_fewer_than_14_channels_is_copied(channels, copies):
    """The docstring of the models gives this limit."""
    moved = moved_but_images("cnn", 8, 64, channels * 8 * 8 * 64, width=channels / 64)
    assert any(f" [{channels}, 8, 8, 64]" in text for text in moved) == bool(moved) == copies


@needs(cpu.unavailable())
def test_in_training_all_between_the_convolutions_is_one_operation():
    """One call for each norm forward and one backward; no pass joins gradients of activations."""
    step = compiled_step("resnet20", "CHWN", 16, 64, blocks=(1, 2, 1))
    norms = 1 + 2 * 4 + 2
    for name in ("NormActForward", "NormActBackward"):
        assert step.count(f'custom_call_target="{name}"') == norms
    activations = re.findall(r"= f32\[\d+,\d+,\d+,64\]\S* (?:add|maximum|select|rsqrt)\(", step)
    assert activations == []


def test_an_nhwc_training_step_moves_activations():
    step = compiled_step("cnn", "NHWC", 8, 64, width=0.25)
    assert len(moved_activations(step, 16 * 16 * 64)) >= 6


@pytest.mark.parametrize(
    "name", ["cnn", "resnet20", pytest.param("mobilenet_v1", marks=pytest.mark.slow)]
)
def test_at_inference_the_convolutions_apply_the_norms(name):
    """The logits equal those of a network that normalises after each convolution."""
    model = create(name, num_classes=4, width=0.25)
    images = jax.random.normal(jax.random.key(0), (3, 16, 16, 3))
    variables = model.init(jax.random.key(1), images)
    rng = np.random.default_rng(2)
    variables = jax.tree.map(
        lambda a: a + 0.3 * np.abs(rng.standard_normal(a.shape, np.float32)) if a.ndim == 1 else a,
        variables,
    )

    def separate(next_call, args, kwargs, context):
        """Calls the convolution and the norm one after the other."""
        if not isinstance(context.module, bsj.linen.BlockSparseConv) or kwargs.get("scale") is None:
            return next_call(*args, **kwargs)
        stats, params = variables["batch_stats"], variables["params"]
        *scope, conv = context.module.path
        norm = {"stem": "stem_norm"}.get(
            conv, conv.replace("conv", "norm") if scope else f"{conv}_norm"
        )
        norm = "downsample_norm" if conv == "downsample" else norm
        for part in scope:
            stats, params = stats[part], params[part]
        axes = nn.BatchNorm(True, epsilon=1e-5, axis=0)
        y = axes.apply({"params": params[norm], "batch_stats": stats[norm]}, next_call(*args))
        y = y if kwargs["residual"] is None else y + kwargs["residual"]
        return nn.relu(y) if kwargs["activation"] else y

    with nn.intercept_methods(separate):
        expected = model.apply(variables, images)
    scale = float(jnp.abs(expected).max())
    assert scale > 0.01
    np.testing.assert_allclose(
        model.apply(variables, images), expected, rtol=1e-4, atol=1e-4 * scale
    )
