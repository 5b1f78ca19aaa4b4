"""Networks of `BlockSparseConv` and `BatchNormAct` between which outputs travel raw: flax's own.

The networks have a stem, a max pool, a residual block with a strided shortcut, and a convolution
with a bias; each is written twice, in flax's layers and in this library's, with the same names.
"""

import functools
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from fused_passes import FUSED
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from new_process import host_devices, run_python

import blocksparse_jax as bsj
from blocksparse_jax.tree import conv_kernels, path_name
from pallas_kernels.block_sparse_conv import choice

LAYERS = {
    "stem": (3, 16, 3, 1),
    "conv1": (16, 16, 3, 1),
    "conv2": (16, 24, 3, 2),
    "conv3": (24, 24, 3, 1),
    "downsample": (16, 24, 1, 2),
    "conv4": (24, 8, 3, 1),
}
"""Input and output channels, size and stride."""
SLOW = pytest.mark.slow
IMAGES = 1 + jax.random.normal(jax.random.key(0), (8, 12, 12, 3))
WEIGHTS = jax.random.normal(jax.random.key(1), (8, 5))


class Flax(nn.Module):
    """The network in flax's layers; NHWC."""

    dtype: Any = None
    axis_name: str | None = None

    @nn.compact
    def __call__(self, x, train):
        def conv_norm(name, x):
            _, features, size, strides = LAYERS[name]
            window = (size, size)
            more = {"use_bias": name == "conv4", "dtype": self.dtype, "name": name}
            x = nn.Conv(features, window, strides, **more)(x)
            more = {"axis_name": self.axis_name, "dtype": self.dtype, "name": f"{name}_norm"}
            return nn.BatchNorm(not train, momentum=0.9, **more)(x)

        x = nn.max_pool(nn.relu(conv_norm("stem", x)), (2, 2), strides=(2, 2))
        x = nn.relu(conv_norm("conv1", x))
        y = nn.relu(conv_norm("conv2", x))
        x = nn.relu(conv_norm("conv3", y) + conv_norm("downsample", x))
        x = nn.relu(conv_norm("conv4", x))
        return nn.Dense(5, name="head", dtype=self.dtype)(x.mean((1, 2)))


class Linen(nn.Module):
    """The network in this library's layers; images in NHWC."""

    dtype: Any = None
    axis_name: str | None = None
    data_format: str = "CHWN"
    implementation: str | None = None

    @nn.compact
    def __call__(self, x, train):
        axis = self.data_format.index("C")
        if self.data_format == "CHWN":
            x = x.transpose(3, 1, 2, 0)

        def conv(name, x, **more):
            _, features, size, strides = LAYERS[name]
            layer = bsj.linen.BlockSparseConv(
                features,
                size,
                strides,
                use_bias=name == "conv4",
                dtype=self.dtype,
                data_format=self.data_format,
                implementation=self.implementation,
                name=name,
            )
            return layer(x, with_sums=train, **more)

        def norm(name, y, **more):
            options = {"axis_name": self.axis_name, "dtype": self.dtype, "name": f"{name}_norm"}
            layer = bsj.linen.BatchNormAct(not train, axis=axis, momentum=0.9, **options)
            return layer(y, **more)

        x = bsj.max_pool(norm("stem", conv("stem", x)))
        x = norm("conv1", conv("conv1", x))
        y, x = conv("conv2", x, with_input=True)
        y = conv("conv3", norm("conv2", y))
        shortcut = norm("downsample", conv("downsample", x), activation=None)
        x = norm("conv3", y, residual=shortcut)
        x = bsj.activations(norm("conv4", conv("conv4", x))).mean((1, 2))
        x = x.T if self.data_format == "CHWN" else x
        return nn.Dense(5, name="head", dtype=self.dtype)(x)


class FlaxNnx(nnx.Module):
    """The network in flax's nnx layers; NHWC."""

    def __init__(self, rngs, axis_name=None):
        for name, (cin, cout, size, strides) in LAYERS.items():
            more = {"use_bias": name == "conv4", "rngs": rngs}
            setattr(self, name, nnx.Conv(cin, cout, (size, size), strides, **more))
            more = {"axis_name": axis_name, "rngs": rngs}
            setattr(self, f"{name}_norm", nnx.BatchNorm(cout, momentum=0.9, **more))
        self.head = nnx.Linear(8, 5, rngs=rngs)

    def __call__(self, x):
        def conv_norm(name, x):
            return getattr(self, f"{name}_norm")(getattr(self, name)(x))

        x = nnx.max_pool(nnx.relu(conv_norm("stem", x)), (2, 2), strides=(2, 2))
        x = nnx.relu(conv_norm("conv1", x))
        y = nnx.relu(conv_norm("conv2", x))
        x = nnx.relu(conv_norm("conv3", y) + conv_norm("downsample", x))
        x = nnx.relu(conv_norm("conv4", x))
        return self.head(x.mean((1, 2)))


class Nnx(nnx.Module):
    """The network in this library's nnx layers; images in NHWC."""

    def __init__(self, rngs, axis_name=None, implementation=None):
        for name, (cin, cout, size, strides) in LAYERS.items():
            more = {"use_bias": name == "conv4", "data_format": "CHWN", "rngs": rngs}
            more |= {"implementation": implementation}
            setattr(self, name, bsj.nnx.BlockSparseConv(cin, cout, size, strides, **more))
            more = {"axis": 0, "axis_name": axis_name, "rngs": rngs}
            setattr(self, f"{name}_norm", bsj.nnx.BatchNormAct(cout, momentum=0.9, **more))
        self.head = nnx.Linear(8, 5, rngs=rngs)

    def __call__(self, x):
        train = not self.stem_norm.use_running_average
        x = self.stem(x.transpose(3, 1, 2, 0), with_sums=train)
        x = bsj.max_pool(self.stem_norm(x))
        x = self.conv1_norm(self.conv1(x, with_sums=train))
        y, x = self.conv2(x, with_sums=train, with_input=True)
        y = self.conv3(self.conv2_norm(y), with_sums=train)
        shortcut = self.downsample_norm(self.downsample(x, with_sums=train), activation=None)
        x = self.conv3_norm(y, residual=shortcut)
        x = self.conv4_norm(self.conv4(x, with_sums=train))
        return self.head(bsj.activations(x).mean((1, 2)).T)


def start(dtype=jnp.float32):
    """Parameters and statistics with values of their own, from flax's network."""
    variables = Flax().init(jax.random.key(2), IMAGES, False)
    leaves, tree = jax.tree.flatten(variables)
    changed = [
        (leaf + 0.2 * jnp.cos(jnp.arange(leaf.size)).reshape(leaf.shape)).astype(dtype)
        for leaf in leaves
    ]
    return jax.tree.unflatten(tree, changed)


def step(model, variables, images=IMAGES, layouts=None, mean=lambda total: total):
    """Logits, statistics and the gradients of a training step."""

    def loss(params, images):
        given = {**variables, "params": params}
        given |= {"layouts": layouts} if layouts else {}
        logits, updated = model.apply(given, images, True, mutable=["batch_stats"])
        weights = WEIGHTS[: len(images)].astype(logits.dtype)
        return mean((weights * jnp.sin(logits)).sum()), (logits, updated["batch_stats"])

    gradients = jax.grad(loss, (0, 1), has_aux=True)
    return jax.jit(gradients)(variables["params"], images)


def worst(results, expected):
    """The largest error of an array, relative to its largest value.

    A bias before a batch norm has a gradient of 0, so there is a least value.
    """
    assert jax.tree.structure(results) == jax.tree.structure(expected)
    errors = [
        float(jnp.abs(a.astype(b.dtype) - b).max() / jnp.maximum(jnp.abs(b).max(), 0.1))
        for a, b in zip(jax.tree.leaves(results), jax.tree.leaves(expected), strict=True)
    ]
    return max(errors)


def shapes(tree):
    return jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), tree)


@pytest.mark.parametrize("data_format", ["CHWN", pytest.param("NHWC", marks=SLOW)])
def test_in_float64_a_linen_step_is_that_of_flax(data_format):
    with jax.enable_x64(True):
        variables, images = start(jnp.float64), IMAGES.astype(jnp.float64)
        expected = step(Flax(), variables, images)
        results = step(Linen(data_format=data_format), variables, images)
        assert worst(results, expected) < 1e-12
        inference = Linen(data_format=data_format).apply(variables, images, False)
        assert worst(inference, Flax().apply(variables, images, False)) < 1e-12


def test_variables_have_the_names_shapes_and_first_values_of_flax():
    expected = Flax().init(jax.random.key(3), IMAGES, False)
    for train in (True, False):
        variables = Linen().init(jax.random.key(3), IMAGES, train)
        assert jax.tree.structure(variables) == jax.tree.structure(expected)
        jax.tree.map(np.testing.assert_array_equal, variables, expected)
    flax, ours = FlaxNnx(nnx.Rngs(0)), Nnx(nnx.Rngs(0))
    kinds = nnx.Any(nnx.Param, nnx.BatchStat)
    first, second = (nnx.to_pure_dict(nnx.state(model, kinds)) for model in (ours, flax))
    assert shapes(first) == shapes(second)
    jax.tree.map(np.testing.assert_array_equal, first, second)


def layouts_of(params):
    """A layout for every convolution but the stem."""

    def layout(path, leaf):
        name = path_name(path)
        if not conv_kernels(name, leaf) or "stem" in name:
            return bsj.Dense()
        counts = {"group_size": 8, "kept": 6, "kept_taps": min(4, leaf.shape[0] * leaf.shape[1])}
        return bsj.random_groups(jax.random.key(len(name)), leaf.shape, **counts)

    return jax.tree_util.tree_map_with_path(layout, params)


def with_zeros(params, layouts):
    """The parameters with zeros where the layouts have no weight."""
    return jax.tree.map(
        lambda at, leaf: leaf * bsj.layout_to_mask(at) if isinstance(at, bsj.BlockLayout) else leaf,
        layouts,
        params,
        is_leaf=bsj.is_layout,
    )


@pytest.mark.parametrize(
    "implementation", ["fused", *(pytest.param(name, marks=SLOW) for name in (None, "xla"))]
)
def test_a_block_sparse_step_is_that_of_flax_with_zeros(implementation, monkeypatch):
    monkeypatch.setitem(choice.IMPLEMENTATIONS, "fused", FUSED)
    variables = start()
    layouts = layouts_of(variables["params"])
    variables["params"] = with_zeros(variables["params"], layouts)
    model = Linen(implementation=implementation)
    (params, images), aux = step(model, variables, layouts=layouts)
    with jax.enable_x64(True):
        exact = jax.tree.map(lambda leaf: leaf.astype(jnp.float64), variables)
        (grads, dimages), expected = step(Flax(), exact, IMAGES.astype(jnp.float64))
        expected = (with_zeros(grads, layouts), dimages), expected
        assert worst(((params, images), aux), expected) < 2e-5


def test_use_layouts_gives_a_fused_network_its_layouts(monkeypatch):
    variables = start()
    layouts = layouts_of(variables["params"])
    model = Linen()
    expected = model.apply({**variables, "layouts": layouts}, IMAGES, True, mutable=["batch_stats"])
    with bsj.linen.use_layouts(layouts):
        results = model.apply(variables, IMAGES, True, mutable=["batch_stats"])
    assert worst(results, expected) < 1e-6


@pytest.mark.slow
def test_packed_values_train_alike(monkeypatch):
    monkeypatch.setitem(choice.IMPLEMENTATIONS, "fused", FUSED)
    variables = start()
    layouts = layouts_of(variables["params"])

    def pack(params):
        return jax.tree.map(
            lambda at, leaf: bsj.pack(leaf, at) if isinstance(at, bsj.BlockLayout) else leaf,
            layouts,
            params,
            is_leaf=bsj.is_layout,
        )

    model = Linen(implementation="fused")
    (grads, images), aux = step(model, variables, layouts=layouts)
    packed = {**variables, "params": pack(variables["params"])}
    results = step(model, packed, layouts=layouts)
    assert worst(results, ((pack(grads), images), aux)) < 1e-5


def test_half_precision_is_no_worse_than_flax():
    variables, images = start(), IMAGES.astype(jnp.bfloat16)
    exact = step(Flax(), variables, images.astype(jnp.float32))

    def error(results):
        return np.mean(
            [
                float(jnp.linalg.norm((a.astype(jnp.float32) - b).ravel()) / jnp.linalg.norm(b))
                for a, b in zip(jax.tree.leaves(results), jax.tree.leaves(exact), strict=True)
            ]
        )

    ours, flax = (error(step(kind(jnp.bfloat16), variables, images)) for kind in (Linen, Flax))
    assert ours < 1.25 * flax


def copies(state, *models):
    """The models with the parameters and statistics of a state."""
    for model in models:
        nnx.update(model, state)
    return models


def nnx_step(model, images, mean=lambda total: total):
    """Logits, gradients and statistics."""

    def loss(model):
        logits = model(images)
        return mean((WEIGHTS[: len(images)] * jnp.sin(logits)).sum()), logits

    gradients, logits = nnx.grad(loss, has_aux=True)(model)
    statistics = nnx.to_pure_dict(nnx.state(model, nnx.BatchStat))
    return logits, nnx.to_pure_dict(gradients), statistics


@pytest.mark.parametrize("implementation", [pytest.param(None, marks=SLOW), "fused"])
def test_an_nnx_step_is_that_of_flax(implementation, monkeypatch):
    monkeypatch.setitem(choice.IMPLEMENTATIONS, "fused", FUSED)
    ours = Nnx(nnx.Rngs(0), implementation=implementation)
    (flax,) = copies(nnx.state(ours, nnx.Any(nnx.Param, nnx.BatchStat)), FlaxNnx(nnx.Rngs(1)))
    assert worst(nnx.jit(nnx_step)(ours, IMAGES), nnx.jit(nnx_step)(flax, IMAGES)) < 2e-5
    for model in (ours, flax):
        model.eval()
    assert worst(ours(IMAGES), flax(IMAGES)) < 2e-5


OPTIONS = {
    "defaults": {},
    "no scale": {"use_scale": False},
    "no bias": {"use_bias": False},
    "momentum and epsilon": {"momentum": 0.7, "epsilon": 0.1},
    "half precision": {"dtype": jnp.bfloat16},
    "half precision of params": {"param_dtype": jnp.bfloat16},
    "exact variance": {"use_fast_variance": False},
}


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("kind", ["linen", "nnx"])
def test_any_batch_norm_of_flax_between_two_convolutions(kind, options, dtype):
    """In values, statistics and the dtypes of both, whatever the convolutions compute in."""
    rng, options = np.random.default_rng(0), OPTIONS[options]
    x = jnp.asarray(rng.standard_normal((6, 5, 5, 3)) + 1, dtype)
    kernels = [jnp.asarray(rng.standard_normal((3, 3, n, 8)) / 5, dtype) for n in (3, 8)]

    def ours_linen():
        first, second = (bsj.linen.BlockSparseConv(8, 3, use_bias=False, dtype=dtype),) * 2
        y = first.apply({"params": {"kernel": kernels[0]}}, x, with_sums=True)
        norm = bsj.linen.BatchNormAct(False, **options)
        y, updated = norm.apply(norm.init(jax.random.key(0), x_like), y, mutable=["batch_stats"])
        z = second.apply({"params": {"kernel": kernels[1]}}, y, with_sums=True)
        return bsj.activations(y), z.z, updated["batch_stats"]

    def flax_linen():
        first, second = (nn.Conv(8, (3, 3), use_bias=False, dtype=dtype),) * 2
        y = first.apply({"params": {"kernel": kernels[0]}}, x)
        norm = nn.BatchNorm(False, **options)
        y, updated = norm.apply(norm.init(jax.random.key(0), x_like), y, mutable=["batch_stats"])
        y = nn.relu(y)
        return y, second.apply({"params": {"kernel": kernels[1]}}, y), updated["batch_stats"]

    def of_nnx(conv, norm, **more):
        layers = [conv(n, 8, (3, 3), use_bias=False, dtype=dtype, rngs=nnx.Rngs(0)) for n in (3, 8)]
        for layer, kernel in zip(layers, kernels):
            layer.kernel.set_value(kernel)
        norm = norm(8, rngs=nnx.Rngs(0), **options)
        y = norm(layers[0](x, **more))
        y = nnx.relu(y) if not more else y
        z = layers[1](y, **more)
        statistics = {"mean": norm.mean[...], "var": norm.var[...]}
        return bsj.activations(y), z.z if more else z, statistics

    x_like = jnp.zeros((6, 5, 5, 8), dtype)
    if kind == "linen":
        results, expected = ours_linen(), flax_linen()
    else:
        results = of_nnx(bsj.nnx.BlockSparseConv, bsj.nnx.BatchNormAct, with_sums=True)
        expected = of_nnx(nnx.Conv, nnx.BatchNorm)
    assert shapes(results) == shapes(expected)
    assert worst(results, expected) < (2e-5 if dtype == jnp.float32 and not options else 2e-2)


def test_a_depthwise_convolution_gives_its_sums():
    x = jax.random.normal(jax.random.key(0), (4, 6, 6, 8))
    layer = bsj.linen.BlockSparseConv(8, 3, feature_group_count=8)
    y, variables = layer.init_with_output(jax.random.key(1), x, with_sums=True)
    z = layer.apply(variables, x)
    np.testing.assert_array_equal(y.z, z)
    expected = jnp.stack([z.sum((0, 1, 2)), (z**2).sum((0, 1, 2))])
    np.testing.assert_allclose(y.sums, expected, rtol=1e-4, atol=1e-4)


def pending(shape=(4, 8, 8, 6), shortcut=False, **more):
    z = jax.random.normal(jax.random.key(0), shape)
    sums = jnp.stack([z.sum((1, 2, 3)), (z**2).sum((1, 2, 3))])
    rows = (jnp.linspace(-1, 1, shape[0]), jnp.linspace(0.2, -0.5, shape[0]))
    added = jnp.cos(z) if shortcut else None
    return bsj.PendingActivations(z, sums, *rows, added, data_format="CHWN", **more)


@pytest.mark.parametrize(
    ("size", "more"),
    [
        (2, {}),
        (4, {}),
        (2, {"relu": False}),
        (3, {}),  # leaves rows out
        (2, {"shortcut": True}),
    ],
)
def test_a_max_pool_of_pending_activations(size, more):
    """Values and gradients are those of the pool behind the activations."""

    def plain(x):
        x = bsj.activations(x).transpose(3, 1, 2, 0)
        return nn.max_pool(x, (size, size), strides=(size, size)).transpose(3, 1, 2, 0)

    def with_gradient(pool):
        def total(x):
            y = pool(x)
            return (jnp.cos(jnp.arange(y.size)).reshape(y.shape) * jnp.sin(y)).sum(), y

        return jax.jit(jax.value_and_grad(total, has_aux=True))

    with jax.enable_x64(True):
        x = jax.tree.map(lambda leaf: leaf.astype(jnp.float64), pending(dtype="float64", **more))
        results = with_gradient(lambda x: bsj.max_pool(x, size))(x)
        assert worst(results, with_gradient(plain)(x)) < 1e-12


def test_what_does_not_fit_is_named():
    x = jnp.ones((1, 6, 6, 4))
    conv, norm = bsj.linen.BlockSparseConv(8, 3), bsj.linen.BatchNormAct(False)
    key = jax.random.key(0)
    raw, variables = conv.init_with_output(key, x, with_sums=True)
    other = bsj.linen.BlockSparseConv(8, 3, data_format="CHWN")
    calls = {
        "x: expected activations, got a RawOutput": lambda: conv.apply(variables, raw),
        "got a RawOutput; give it to BatchNormAct": lambda: bsj.activations(raw),
        "residual: with_sums=True leaves": lambda: conv.apply(
            variables, x, residual=x, with_sums=True
        ),
        "axis: expected 3, .*NHWC.* got 0": lambda: bsj.linen.BatchNormAct(False, axis=0).init(
            key, raw
        ),
        "residual: expected the shape of x": lambda: norm.init(key, raw, residual=x),
        "activation: expected": lambda: norm.init(key, raw, activation="gelu"),
        "x: expected activations in data_format='CHWN'": lambda: other.init(
            key, norm.init_with_output(key, raw)[0], with_sums=True
        ),
        "size: expected an integer of at least 1": lambda: bsj.max_pool(x, 0),
        "size: expected at most the image's size": lambda: bsj.max_pool(x, 7),
    }
    for message, call in calls.items():
        with pytest.raises(ValueError, match=message):
            call()
    layer = bsj.nnx.BlockSparseConv(4, 8, 3, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="got a RawOutput"):
        layer(layer(x, with_sums=True))


def test_inputs_are_captured_as_activations():
    """`capture_inputs` records what is convolved, also where it is pending."""
    variables = start()
    run = functools.partial(bsj.linen.capture_inputs, train=True, mutable=["batch_stats"])
    captured, expected = (run(model, variables, IMAGES) for model in (Linen(), Flax()))
    assert captured.keys() == expected.keys()
    for name in set(LAYERS) - {"stem"}:
        name = f"{name}/kernel"
        np.testing.assert_allclose(captured[name].x, expected[name].x, atol=1e-4)


def test_synchronised_statistics_are_those_of_flax():
    done = run_python(__file__, **host_devices(8))
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    assert done.stdout.split() == ["linen-2", "nnx-2", "linen-8", "nnx-8"]


def synchronised(devices):
    """Both frameworks' steps with `axis_name`, over so many devices, against flax's."""
    kinds = {"axis_types": (AxisType.Auto,), "devices": jax.devices()[:devices]}
    mesh = jax.make_mesh((devices,), ("data",), **kinds)
    mean = functools.partial(jax.lax.psum, axis_name="data")
    choice.IMPLEMENTATIONS["fused"] = FUSED
    variables = start()
    layouts = layouts_of(variables["params"])
    variables["params"] = with_zeros(variables["params"], layouts)
    images = IMAGES + jnp.arange(8.0).reshape(8, 1, 1, 1)  # the devices' means differ

    def over_devices(run, *out_specs):
        mapped = jax.shard_map(run, mesh=mesh, in_specs=P("data"), out_specs=out_specs)
        return jax.jit(mapped)(images)

    def of(model, **more):
        def run(images):
            (dparams, dimages), (logits, statistics) = step(
                model, variables, images, mean=mean, **more
            )
            return with_zeros(dparams, layouts), dimages, logits, statistics

        return over_devices(run, P(), P("data"), P("data"), P())

    expected = of(Flax(axis_name="data"))
    fused = Linen(axis_name="data", implementation="fused")
    assert worst(of(fused, layouts=layouts), expected) < 5e-5
    print(f"linen-{devices}")

    def of_nnx(model):
        graph, state = nnx.split(model)

        def run(images):
            return nnx_step(nnx.merge(graph, state, copy=True), images, mean)

        return over_devices(run, P("data"), P(), P())

    ours = Nnx(nnx.Rngs(0), axis_name="data")
    state = nnx.state(ours, nnx.Any(nnx.Param, nnx.BatchStat))
    (flax,) = copies(state, FlaxNnx(nnx.Rngs(0), axis_name="data"))
    assert worst(of_nnx(ours), of_nnx(flax)) < 5e-5
    print(f"nnx-{devices}")


if __name__ == "__main__":
    for count in (2, 8):
        synchronised(count)
    sys.exit(0)
