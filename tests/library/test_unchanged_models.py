"""Plain Flax models on block-sparse convolutions: `linen.use_layouts` and `nnx.sparsify`."""

import re
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from sparse_methods import slow_unless
from unchanged import assert_linen_equals_masked_dense, pruned

import blocksparse_jax as bsj

OPTIONS: list[dict[str, Any]] = [
    {},
    {"kernel_size": (2, 1), "strides": (2, 1), "padding": "VALID"},
    {"strides": 2, "padding": 1, "kernel_dilation": 2, "use_bias": False},
    {"padding": ((0, 2), (1, 0)), "strides": (1, 2)},
    {"padding": (1, (0, 2))},
    {"padding": "CIRCULAR", "kernel_dilation": (2, 1)},
    {"padding": "REFLECT", "kernel_size": (4, 3)},
    {"kernel_size": (1, 1), "strides": None, "input_dilation": None},
    {"dtype": jnp.bfloat16},
    {"param_dtype": jnp.bfloat16},
    {"promote_dtype": lambda *arrays, dtype: [None if a is None else a + 1 for a in arrays]},
]
X = jax.random.normal(jax.random.key(0), (2, 9, 8, 16))


def initial(model):
    """The params of a linen model."""
    return jax.jit(model.init)(jax.random.key(1), X)["params"]


def applied(model, params, **options):
    """What a linen model makes of `X`, compiled as a whole."""
    return jax.jit(lambda params: model.apply({"params": params}, X, **options))(params)


def conv(options, **others):
    return {"features": 32, "kernel_size": (3, 3)} | options | others


@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: "-".join(options) or "default")
def test_linen_conv_equals_masked_dense(options):
    options = dict(options)
    if "promote_dtype" in options:  # a function of the user's own is called
        options["promote_dtype"] = lambda *arrays, dtype: nn.dtypes.promote_dtype(
            *arrays, dtype=jnp.float16
        )
    executions = assert_linen_equals_masked_dense(nn.Conv(**conv(options)), X)
    assert executions == {"kernel": "block-sparse"}


# The forward pass is that of the linen layers, and so most options are slow tests here.
NNX_OPTIONS = [slow_unless(i % 3 == 0, options) for i, options in enumerate(OPTIONS[:-1])]


@pytest.mark.parametrize("options", NNX_OPTIONS, ids=lambda options: "-".join(options))
def test_nnx_conv_equals_masked_dense(options):
    def outputs(model, params):
        nnx.update(model, params)
        loss = lambda model, x: (model(x).astype(jnp.float32) ** 2).mean()  # noqa: E731
        run = nnx.jit(lambda model: (model(X), *nnx.grad(loss, argnums=(0, 1))(model, X)))
        return run(model)

    model = nnx.Conv(in_features=16, out_features=32, rngs=nnx.Rngs(0), **nnx_options(options))
    params = nnx.state(model, nnx.Param)
    params, state, layouts = pruned(params)
    expected = outputs(model, params)
    assert bsj.nnx.sparsify(model) is model
    bsj.nnx.set_layouts(model, layouts)
    assert bsj.nnx.executions(model) == {"kernel": "block-sparse"}
    actual = outputs(model, params)
    masks = bsj.get_masks(state)
    tolerance = 3e-2 if jnp.bfloat16 in options.values() else 1e-5
    assert actual[0].dtype == expected[0].dtype
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        mask = masks["kernel"] if a.shape == masks["kernel"].shape else 1
        scale = np.abs(np.asarray(e, float)).max()
        np.testing.assert_allclose(
            np.asarray(a, float), np.asarray(e * mask, float), atol=tolerance * scale
        )


def nnx_options(options):
    return {"kernel_size": (3, 3)} | options


class Block(nn.Module):
    conv: Any = nn.Conv

    @nn.compact
    def __call__(self, x):
        shared = self.conv(16, (3, 3), name="shared")
        return shared(nn.relu(shared(x))) + x


class Network(nn.Module):
    """What Flax networks are made of: setup, shared layers, remat, batch norm, other layers."""

    def setup(self):
        self.first = nn.Conv(16, (3, 3))
        self.block = nn.remat(Block)()
        self.norm = nn.WeightNorm(nn.Conv(16, (1, 1), use_bias=False))
        self.transposed = nn.ConvTranspose(16, (3, 3), strides=(2, 2))
        self.masked = nn.Conv(16, (3, 3), mask=jnp.ones((3, 3, 16, 16)).at[0].set(0))
        self.head = nn.DenseGeneral((2, 5))

    def __call__(self, x):
        x = self.block(nn.relu(self.first(x)))
        x = self.masked(self.transposed(self.norm(x)))
        return self.head(x.mean((1, 2)))

    def features(self, x):
        return self.first(x)


def test_linen_network_runs_its_plain_convolutions_sparse_and_all_else_as_written():
    executions = assert_linen_equals_masked_dense(Network(), X)
    assert executions == {
        "first/kernel": "block-sparse",
        "block/shared/kernel": "block-sparse",
        "norm/layer_instance/kernel": "block-sparse",
        "transposed/kernel": "dense: ConvTranspose",
        "masked/kernel": "dense: Conv",
    }


def test_summarize_lists_which_layers_ran_block_sparse():
    params, state, layouts = pruned(initial(Network()))
    with bsj.linen.use_layouts(layouts) as executions:
        applied(Network(), params)
    summary = str(bsj.summarize(params, state, executions=executions))
    ran = [line for line in summary.splitlines() if line.startswith("ran block-sparse: ")]
    assert ran == [
        "ran block-sparse: block/shared/kernel, first/kernel, norm/layer_instance/kernel"
    ]
    assert (
        "did not run block-sparse: masked/kernel (dense: Conv), transposed/kernel (dense: "
        "ConvTranspose)" in summary
    )
    assert "ran block-sparse" not in str(bsj.summarize(params, state))
    nothing = str(bsj.summarize(params, state, executions={}))
    assert "ran block-sparse: no layer" in nothing
    assert "first/kernel (dense: no layout reached it)" in nothing


def test_linen_other_methods_and_bound_modules_run_sparse():
    model = Network()
    params, _, layouts = pruned(initial(model))
    expected = applied(model, params, method="features")
    with bsj.linen.use_layouts(layouts) as executions:
        actual = applied(model, params, method="features")
        bound = model.bind({"params": params}).first(X)
    assert executions == {"first/kernel": "block-sparse"}
    np.testing.assert_allclose(actual, expected, atol=1e-5)
    np.testing.assert_allclose(bound, expected, atol=1e-5)


def test_linen_packed_values_need_no_dense_kernel():
    model = Block()
    params, state, layouts = pruned(initial(model))
    values, _ = bsj.pack_tree(params, state, layouts)
    assert values["shared"]["kernel"].shape == layouts["shared"]["kernel"].packed_shape
    with bsj.linen.use_layouts(layouts):
        packed = applied(model, values)
    np.testing.assert_allclose(packed, applied(model, params), atol=1e-5)


def test_linen_keywords_reach_the_convolution():
    model = Block()
    params, _, layouts = pruned(initial(model))

    def gradient(**keywords):
        def loss(params):
            with bsj.linen.use_layouts(layouts, **keywords):
                return model.apply({"params": params}, X).sum()

        return jax.jit(jax.grad(loss))(params)["shared"]["kernel"]

    mask = bsj.layout_to_mask(layouts["shared"]["kernel"])
    assert not jnp.any(jnp.where(mask, 0, gradient()))
    full = gradient(kernel_gradient="dense", implementation="xla", precision="highest")
    assert jnp.count_nonzero(jnp.where(mask, 0, full)) == (~mask).sum()
    with pytest.raises(ValueError, match="kernel_gradient: expected"):
        gradient(kernel_gradient="full")
    with pytest.raises(ValueError, match="implementation: expected"):
        gradient(implementation="cudnn")


def test_linen_initialization_runs_as_written():
    model = Block()
    params, _, layouts = pruned(initial(model))
    with bsj.linen.use_layouts(layouts) as executions:
        again = initial(model)
    assert jax.tree.map(jnp.shape, again) == jax.tree.map(jnp.shape, params)
    assert executions == {}


def test_linen_jitted_functions_never_run_with_the_layouts_of_another_block():
    """Entered outside of jit, where the compiled program would keep the first layouts for ever."""
    model = Block()
    params = initial(model)
    apply = jax.jit(lambda params: model.apply({"params": params}, X))
    for scores in (params, jax.tree.map(jnp.negative, jax.tree.map(jnp.flip, params))):
        state = bsj.hrbp_prune(0.75, group_size=8, block_density=1).init(scores)
        layouts = bsj.get_layouts(state)
        with bsj.linen.use_layouts(layouts):
            sparse = apply(params)
        kept = bsj.apply_masks(params, bsj.get_masks(state))
        np.testing.assert_allclose(sparse, apply(kept), atol=1e-5)
    with bsj.linen.use_layouts(layouts) as executions:
        apply(params)
    assert executions == {}  # the same layouts: compiled before


def test_linen_new_layouts_do_not_recompile_a_function_of_the_layouts():
    model, traces = Block(), []
    params = initial(model)

    @jax.jit
    def apply(params, layouts):
        traces.append(1)
        with bsj.linen.use_layouts(layouts):
            return model.apply({"params": params}, X)

    for scale in (1.0, -1.0):
        shifted = jax.tree.map(lambda p: p + scale * jnp.arange(p.shape[-1]), params)  # noqa: B023
        masked, _, layouts = pruned(shifted)
        expected = model.apply({"params": masked}, X)
        np.testing.assert_allclose(apply(masked, layouts), expected, rtol=1e-4, atol=1e-2)
    assert len(traces) == 1


def test_linen_innermost_block_counts():
    student, teacher = Block(), Block()
    params, _, layouts = pruned(student.init(jax.random.key(1), X)["params"])
    dense = student.init(jax.random.key(2), X)["params"]
    with bsj.linen.use_layouts(layouts) as outer, bsj.linen.use_layouts({}) as inner:
        y = teacher.apply({"params": dense}, X)
    np.testing.assert_array_equal(y, teacher.apply({"params": dense}, X))
    assert outer == inner == {}
    with bsj.linen.use_layouts({}), bsj.linen.use_layouts(layouts) as inner:
        student.apply({"params": params}, X)
    assert list(inner) == ["shared/kernel"]


class StandardizedConv(nn.Conv):
    """A convolution that changes its kernel on the way out, as in Big Transfer."""

    def param(self, name, *args, **kwargs):
        value = super().param(name, *args, **kwargs)
        return value / 2 if name == "kernel" else value


class SmallConv(nn.Conv):
    """A convolution with other defaults."""

    use_bias: bool = False


@pytest.mark.parametrize(
    ("layer", "runs"),
    [(StandardizedConv, "dense: StandardizedConv"), (SmallConv, "block-sparse")],
)
def test_linen_subclasses_run_sparse_only_where_they_compute_as_conv(layer, runs):
    executions = assert_linen_equals_masked_dense(layer(16, (3, 3)), X)
    assert executions == {"kernel": runs}


def test_linen_block_sparse_conv_takes_its_layout_from_the_block_too():
    assert assert_linen_equals_masked_dense(Block(bsj.linen.BlockSparseConv), X) == {
        "shared/kernel": "block-sparse"
    }


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"input_dilation": (2, 1), "padding": 1},
            "Conv/kernel: a layer with input_dilation=(2, 1)",
        ),
        (
            {"conv_general_dilated": jax.lax.conv_general_dilated},
            "Conv/kernel: a layer with a conv_general_dilated of its own",
        ),
        ({"feature_group_count": 2}, "Conv/kernel: a convolution with feature_group_count=2"),
        ({"kernel_size": (2, 3, 3)}, "Conv/kernel: a layer with kernel_size=(2, 3, 3)"),
    ],
)
def test_linen_layer_that_cannot_run_says_so_by_name(options, message):
    model = nn.Conv(**conv(options))
    x = X if len(model.kernel_size) == 2 else X[:, None]
    params = model.init(jax.random.key(1), x)["params"]
    _, _, layouts = pruned(params, where=lambda name, leaf: leaf.ndim >= 4)
    with pytest.raises(ValueError, match=re.escape(message)), bsj.linen.use_layouts(layouts):
        model.apply({"params": params}, x)


def test_linen_packed_values_of_a_layer_that_runs_as_written_are_refused_by_name():
    model = nn.ConvTranspose(32, (3, 3))
    params, state, layouts = pruned(initial(model))
    values, _ = bsj.pack_tree(params, state, layouts)
    with (
        pytest.raises(ValueError, match="kernel: ConvTranspose runs as it is written and needs"),
        bsj.linen.use_layouts(layouts),
    ):
        model.apply({"params": values}, X)


@pytest.mark.parametrize(
    ("wrap", "message"),
    [
        (lambda layouts: {"params": layouts}, "'params/shared/kernel' is no parameter of Block"),
        (lambda layouts: {"shared": {"kernel": 3}}, "expected a BlockLayout or Dense"),
    ],
)
def test_linen_layouts_of_another_tree_are_refused(wrap, message):
    model = Block()
    params, _, layouts = pruned(initial(model))
    with pytest.raises(ValueError, match=message), bsj.linen.use_layouts(wrap(layouts)):
        model.apply({"params": params}, X)


class NnxNetwork(nnx.Module):
    """Shared modules, a tied kernel, containers, and layers that stay as they are."""

    def __init__(self, rngs):
        def layer(cls=nnx.Conv, **options):
            return cls(16, 16, (3, 3), rngs=rngs, **options)

        self.z = layer()
        self.a = self.z
        self.tied = layer()
        self.tied_too = layer()
        self.tied_too.kernel = self.tied.kernel
        self.list = nnx.List([layer(strides=1, padding="CIRCULAR")])
        self.sequential = nnx.Sequential(layer(), nnx.relu)
        self.transposed = layer(nnx.ConvTranspose)
        self.masked = layer(mask=jnp.ones((3, 3, 16, 16)).at[0].set(0))
        self.grouped = layer(feature_group_count=4)

    def __call__(self, x):
        layers = (self.z, self.a, self.tied, self.tied_too, *self.list, self.sequential)
        for layer in (*layers, self.transposed, self.masked, self.grouped):
            x = x + nnx.relu(layer(x))
        return x


def test_nnx_network_keeps_its_objects_parameters_and_paths():
    model = NnxNetwork(nnx.Rngs(0))
    before, layer, y = nnx.state(model, nnx.Param), model.z, model(X)
    assert bsj.nnx.sparsify(model) is model
    assert model.z is model.a is layer
    assert model.tied.kernel is model.tied_too.kernel
    after = nnx.state(model, nnx.Param)
    assert jax.tree.structure(before) == jax.tree.structure(after)
    np.testing.assert_array_equal(model(X), y)
    assert type(model.masked) is type(model.sequential.layers[0]).__mro__[1] is nnx.Conv


def test_nnx_network_trains_as_masked_dense():
    def train(model):
        tx = bsj.sparse(bsj.hrbp_prune(0.75, group_size=8, block_density=1), optax.sgd(0.01))
        optimizer = bsj.nnx.Optimizer(model, tx, wrt=nnx.Param)
        if isinstance(model.a, bsj.nnx.BlockSparseConv):
            bsj.nnx.set_layouts(model, bsj.get_layouts(optimizer.opt_state))
        masks = bsj.get_masks(optimizer.opt_state)
        nnx.update(model, bsj.apply_masks(nnx.state(model, nnx.Param), masks))

        @nnx.jit
        def step(model, optimizer):
            loss, grads = nnx.value_and_grad(lambda model: (model(X) ** 2).mean())(model)
            optimizer.update(model, grads)
            return loss

        return [float(step(model, optimizer)) for _ in range(3)]

    dense, sparse = NnxNetwork(nnx.Rngs(0)), bsj.nnx.sparsify(NnxNetwork(nnx.Rngs(0)))
    np.testing.assert_allclose(train(sparse), train(dense), rtol=1e-5)
    assert bsj.nnx.executions(dense) == {}
    assert sorted(bsj.nnx.executions(sparse)) == [
        "a/kernel",
        "list/0/kernel",
        "sequential/layers/0/kernel",
        "tied/kernel",
    ]
    assert isinstance(sparse.tied_too.layout.get_value(), bsj.BlockLayout)


def test_nnx_grouped_convolutions_stay_dense_by_default():
    """Their kernels of 8 channels a group look like those of ordinary convolutions."""
    rngs = nnx.Rngs(0)
    grouped = nnx.Conv(32, 32, (3, 3), feature_group_count=4, rngs=rngs)
    model = bsj.nnx.sparsify(nnx.Sequential(nnx.Conv(32, 32, (3, 3), rngs=rngs), grouped))

    def optimizer(**options):
        method = bsj.hrbp_prune(0.75, group_size=8, block_density=1, **options)
        return bsj.nnx.Optimizer(model, bsj.sparse(method, optax.sgd(0.1)), wrt=nnx.Param)

    layouts = bsj.get_layouts(optimizer().opt_state)
    bsj.nnx.set_layouts(model, layouts)
    assert bsj.nnx.executions(model) == {"layers/0/kernel": "block-sparse"}
    assert model(jnp.ones((1, 5, 5, 32))).shape == (1, 5, 5, 32)
    asked_for = optimizer(where=lambda name, leaf: leaf.ndim == 4)
    assert bsj.get_masks(asked_for.opt_state)["layers"][1]["kernel"].ndim == 4
    functional = bsj.hrbp_prune(0.75, group_size=8).init(nnx.state(model, nnx.Param))
    assert bsj.get_masks(functional)["layers"][1]["kernel"].ndim == 4, "the choice ended"


def test_nnx_layouts_that_do_not_fit_change_nothing():
    model = bsj.nnx.sparsify(nnx.List([nnx.Conv(16, 32, (3, 3), rngs=nnx.Rngs(0))]))
    layout = pruned({"kernel": jnp.ones((3, 3, 16, 32)) * jnp.arange(32)})[2]["kernel"]
    bsj.nnx.set_layouts(model, {0: {"kernel": layout}})
    for bad in ({0: {"kernel": layout}, 1: {"kernel": layout}}, {0: {"bias": layout, "kernel": 3}}):
        with pytest.raises(ValueError, match="layouts: "):
            bsj.nnx.set_layouts(model, bad)
        kept = model[0].layout.get_value()
        assert kept.channels is layout.channels


@pytest.mark.parametrize("annotate", [nn.with_partitioning, nn.with_logical_partitioning])
def test_linen_params_in_boxes_have_layouts_in_boxes(annotate):
    """As metadata of their sharding: `use_layouts`, and the collection of our layers."""
    init = annotate(nn.initializers.lecun_normal(), (None, None, None, "features"))
    plain, layer = (
        kind(32, (3, 3), kernel_init=init) for kind in (nn.Conv, bsj.linen.BlockSparseConv)
    )
    params, state, layouts = pruned(initial(plain))
    assert isinstance(params["kernel"], nn.meta.AxisMetadata)
    expected = plain.apply({"params": params}, X)
    for weights in (params, bsj.pack_tree(params, state, layouts)[0]):
        with bsj.linen.use_layouts(layouts) as executions:
            actual = plain.apply({"params": weights}, X)
        assert executions == {"kernel": "block-sparse"}
        np.testing.assert_allclose(actual, expected, atol=1e-5)
        actual = layer.apply({"params": weights, "layouts": layouts}, X)
        np.testing.assert_allclose(actual, expected, atol=1e-5)


def dense_kernels(name, leaf):
    return leaf.ndim == 2


class Mlp(nn.Module):
    """Dense layers alone, as in an MLP or in ConvNeXt's pointwise layers."""

    dense: Any = nn.Dense

    @nn.compact
    def __call__(self, x):
        x = nn.gelu(self.dense(64, name="hidden")(x))
        return self.dense(16, use_bias=False, dtype=jnp.float32, name="out")(x)


@pytest.mark.parametrize("layer", [nn.Dense, bsj.linen.BlockSparseLinear])
def test_linen_dense_layers_equal_masked_dense(layer):
    for x in (X, X[0, 0, 0]):
        ran = assert_linen_equals_masked_dense(
            Mlp(layer), x, where=lambda name, leaf: leaf.ndim == 2
        )
        assert ran == {"hidden/kernel": "block-sparse", "out/kernel": "block-sparse"}


def test_linen_linear_layer_takes_the_collection_and_packed_values():
    model, plain = Mlp(bsj.linen.BlockSparseLinear), Mlp()
    params = initial(model)
    expected = initial(plain)
    jax.tree.map(np.testing.assert_array_equal, params, expected)
    params, state, layouts = pruned(params, where=dense_kernels)
    values, _ = bsj.pack_tree(params, state, layouts)
    expected = applied(plain, params)
    for weights in (params, values):
        y = jax.jit(model.apply)({"params": weights, "layouts": layouts}, X)
        np.testing.assert_allclose(y, expected, atol=1e-5)
    with pytest.raises(ValueError, match="hidden/kernel: expected shape"):
        model.apply({"params": values, "layouts": {}}, X)
    with pytest.raises(ValueError, match="'hiden/kernel' is no parameter"):
        model.apply({"params": params, "layouts": {"hiden": layouts["hidden"]}}, X)


def test_nnx_linear_layers_equal_masked_dense():
    def network():
        rngs = nnx.Rngs(0)
        return nnx.Sequential(nnx.Linear(16, 64, rngs=rngs), nnx.relu, nnx.Linear(64, 8, rngs=rngs))

    model, dense = bsj.nnx.sparsify(network()), network()
    params, _, layouts = pruned(nnx.state(dense, nnx.Param), where=dense_kernels)
    bsj.nnx.set_layouts(model, layouts)
    for each in (model, dense):
        nnx.update(each, params)
    value_and_grad = nnx.jit(nnx.value_and_grad(lambda model: (model(X) ** 2).mean()))
    (actual, grads), (expected, full) = value_and_grad(model), value_and_grad(dense)
    np.testing.assert_allclose(actual, expected, rtol=1e-5)
    for layout, gradient, whole in zip(
        [layouts["layers"][i]["kernel"].get_value() for i in (0, 2)],
        [grads["layers"][i]["kernel"][...] for i in (0, 2)],
        [full["layers"][i]["kernel"][...] for i in (0, 2)],
        strict=True,
    ):
        kept = jnp.where(bsj.layout_to_mask(layout), whole, 0)
        np.testing.assert_allclose(gradient, kept, atol=1e-6)
    assert sorted(bsj.nnx.executions(model)) == ["layers/0/kernel", "layers/2/kernel"]


class ScannedNetwork(nn.Module):
    """A stack of layers in nn.scan."""

    layer: Any = nn.Conv
    axes: Any = None

    @nn.compact
    def __call__(self, x):
        def body(layer, x, _):
            return nn.relu(layer(x)), None

        scan = nn.scan(
            body,
            variable_axes={"params": 0, **(self.axes or {})},
            split_rngs={"params": True},
            length=3,
        )
        return scan(self.layer(16, (3, 3), name="layers"), x, None)[0]


def test_linen_scanned_layers_are_refused_with_what_works():
    model = ScannedNetwork()
    params, _, layouts = pruned(initial(model))
    expected = model.apply({"params": params}, X)
    with (
        pytest.raises(ValueError, match="layers/kernel: its layout is that of 3 stacked layers"),
        bsj.linen.use_layouts(layouts),
    ):
        model.apply({"params": params}, X)
    model = ScannedNetwork(bsj.linen.BlockSparseConv, {"layouts": 0})
    y = model.apply({"params": params, "layouts": layouts}, X)
    np.testing.assert_allclose(y, expected, atol=1e-5)
    ensemble = jax.vmap(lambda params, layouts: with_layouts(Block(), params, layouts))
    members = jax.vmap(lambda key: Block().init(key, X)["params"])(
        jax.random.split(jax.random.key(1))
    )
    members, _, layouts = pruned(members)
    expected = jax.vmap(lambda params: Block().apply({"params": params}, X))(members)
    np.testing.assert_allclose(ensemble(members, layouts), expected, atol=1e-5)


def with_layouts(model, params, layouts):
    with bsj.linen.use_layouts(layouts):
        return model.apply({"params": params}, X)
