"""Variational dropout: the divergence against integrals, layers against closed forms."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import references as ref
from flax import linen as nn
from flax import nnx
from scipy.integrate import quad

import blocksparse_jax as bsj
from blocksparse_jax.variational import log_alpha

X = jax.random.normal(jax.random.key(1), (2, 5, 5, 3))
ROWS = jax.random.normal(jax.random.key(2), (6, 4))


def everything(name, leaf):
    return name.endswith("kernel")


def divergence(rate):
    """`KL(N(w, alpha w^2) || log-uniform)` by quadrature, 0 where alpha is infinite."""
    alpha = np.exp(rate)
    root = -1 / np.sqrt(alpha)

    def integrand(z):
        return np.log(abs(1 + np.sqrt(alpha) * z)) * np.exp(-z * z / 2) / np.sqrt(2 * np.pi)

    middle = max(root, -12.0)  # where the logarithm is infinite
    expected = quad(integrand, -12, middle, limit=200)[0] + quad(integrand, middle, 12)[0]
    at_infinity = (np.euler_gamma + np.log(2)) / 2  # -E log |z|
    return -(0.5 * rate - expected - at_infinity)


@pytest.mark.parametrize("rate", [-7.5, -4.0, -2.0, -1.0, 0.0, 0.5, 1.0, 2.0, 3.0, 5.0, 7.5])
def test_the_divergence_is_that_of_an_integral(rate):
    params = {"kernel": jnp.full(7, 1.5), "log_sigma2": jnp.full(7, rate + 2 * np.log(1.5))}
    np.testing.assert_allclose(bsj.variational_dropout_kl(params) / 7, divergence(rate), atol=0.01)


def test_the_divergence_sums_over_layers_and_moves_no_clipped_weight():
    kernel, small = jnp.array([1.0, 0.0, 2.0]), jnp.array([-3.0, 4.0, -30.0])
    layer = {"kernel": kernel, "log_sigma2": small}
    one = bsj.variational_dropout_kl(layer)
    two = bsj.variational_dropout_kl({"a": layer, "b": {"c": layer}, "bias": jnp.ones(3)})
    np.testing.assert_allclose(two, 2 * one, rtol=1e-6)
    grads = jax.grad(bsj.variational_dropout_kl)(layer)
    assert grads["log_sigma2"][0] < 0  # more noise costs less
    np.testing.assert_array_equal(grads["log_sigma2"][1:], 0)
    np.testing.assert_array_equal(log_alpha(kernel, small), [-3, 8, -8])
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(grads))


def test_masks_keep_what_is_certain():
    rng = np.random.default_rng(0)
    params = {
        name: {
            "kernel": jnp.asarray(rng.normal(size=shape).astype(np.float32)),
            "log_sigma2": jnp.asarray(rng.normal(2, 3, size=shape).astype(np.float32)),
        }
        for name, shape in (("a", (3, 3, 8, 8)), ("b", (1, 1, 8, 16)))
    } | {"bias": jnp.ones(3)}
    rates = {
        name: np.asarray(params[name]["log_sigma2"] - jnp.log(params[name]["kernel"] ** 2 + 1e-8))
        for name in "ab"
    }
    masks = bsj.variational_masks(params)
    for name in "ab":
        np.testing.assert_array_equal(masks[name]["kernel"], rates[name] <= 3)
        assert np.shape(masks[name]["log_sigma2"]) == ()
    assert 0.2 < float(bsj.metrics.density(masks)) < 0.8
    masks = bsj.variational_masks(params, sparsity=0.75)
    cut = np.sort(np.concatenate([rates[name].ravel() for name in "ab"]))[(576 + 128) // 4 - 1]
    for name in "ab":
        np.testing.assert_array_equal(masks[name]["kernel"], rates[name] <= cut)


@pytest.mark.parametrize("kind", ["ties", "equal", "zeros", "one channel"])
def test_masks_break_ties_by_index(kind):
    """Over both layers together; each keeps its surest weight."""
    rng = np.random.default_rng(0)
    draw = {
        "ties": lambda shape: rng.integers(-1, 2, shape),
        "equal": lambda shape: np.full(shape, 0.5),
        "zeros": np.zeros,
        "one channel": lambda shape: rng.normal(size=shape) * (np.arange(shape[-2]) == 0)[:, None],
    }[kind]
    shapes = {"a": (3, 3, 4, 8), "b": (1, 1, 1, 8)}
    params = {
        name: {
            "kernel": jnp.asarray(draw(shape), jnp.float32),
            "log_sigma2": jnp.full(shape, -2.0),
        }
        for name, shape in shapes.items()
    }
    squares = {name: np.asarray(layer["kernel"]) ** 2 for name, layer in params.items()}
    for sparsity in (0.0, 0.75, 0.99):
        masks = bsj.variational_masks(params, sparsity=sparsity)
        expected = ref.global_masks(squares, round((1 - sparsity) * 296))
        for name in shapes:
            np.testing.assert_array_equal(masks[name]["kernel"], expected[name])


def test_what_is_missing_is_named():
    with pytest.raises(ValueError, match="expected 'log_sigma2' beside some kernels"):
        bsj.variational_dropout_kl({"kernel": jnp.ones(3)})
    with pytest.raises(ValueError, match="expected 'a/kernel' of the shape"):
        bsj.variational_masks({"a": {"kernel": jnp.ones(3), "log_sigma2": jnp.ones(2)}})
    with pytest.raises(ValueError, match="named 'kernel', got 'w' chosen"):
        bsj.with_log_variances({"w": jnp.ones((3, 3, 8, 8))})
    with pytest.raises(ValueError, match="sparsity"):
        bsj.variational_masks({"kernel": jnp.ones(3), "log_sigma2": jnp.ones(3)}, sparsity=1.0)


def test_a_summary_shows_no_target_where_the_threshold_decides():
    params = bsj.with_log_variances({"conv": {"kernel": jnp.ones((3, 3, 8, 8))}})
    for sparsity, target in ((0.0, "-"), (0.9, "0.1000")):
        state = bsj.variational_dropout(sparsity).init(params)
        assert f"(target {target})" in str(bsj.summarize(params, state))


def with_variances(params, seed=3):
    """Random log variances, some so large that their weights are pruned."""
    params = bsj.with_log_variances(params, where=everything)

    def draw(path, leaf):
        if path[-1].key != "log_sigma2":
            return leaf
        return jax.random.uniform(jax.random.key(seed), leaf.shape, minval=-5, maxval=3)

    return jax.tree_util.tree_map_with_path(draw, params)


def moments(layer, params, x):
    """Mean and variance of a plain layer's output when its weights are Gaussian."""
    no_bias = layer.clone(use_bias=False)
    mean = layer.apply({"params": {k: v for k, v in params.items() if k != "log_sigma2"}}, x)
    kernel = jnp.exp(log_alpha(params["kernel"], params["log_sigma2"])) * params["kernel"] ** 2
    return mean, no_bias.apply({"params": {"kernel": kernel}}, x**2)


PLAIN = {
    "conv": (nn.Conv(4, (3, 3), strides=2, padding="VALID"), X),
    "grouped": (nn.Conv(6, (3, 3), feature_group_count=3), X),
    "dense": (nn.Dense(5), ROWS),
}


@pytest.mark.parametrize("name", PLAIN)
def test_the_interceptor_adds_the_noise_of_the_closed_form(name):
    layer, x = PLAIN[name]
    params = with_variances(layer.init(jax.random.key(0), x)["params"])
    key = jax.random.key(5)

    @jax.jit
    def noisy(key):
        with bsj.linen.use_variational_dropout(key):
            return layer.apply({"params": params}, x)

    mean, variance = moments(layer, params, x)
    noise = jax.random.normal(jax.random.fold_in(key, 0), mean.shape)
    np.testing.assert_allclose(noisy(key), mean + jnp.sqrt(variance) * noise, rtol=2e-4, atol=1e-4)


def test_block_sparse_convs_of_the_native_format_are_noisy_too():
    conv = bsj.linen.BlockSparseConv(4, (3, 3))
    native = conv.clone(data_format="CHWN")
    params = with_variances(conv.init(jax.random.key(0), X)["params"])

    def noise_variance(layer, x):
        def draw(key):
            with bsj.linen.use_variational_dropout(key):
                return layer.apply({"params": params}, x)

        return jax.vmap(draw)(jax.random.split(jax.random.key(0), 3000)).var(0)

    by_rows = noise_variance(native, X.transpose(3, 1, 2, 0)).transpose(3, 1, 2, 0)
    np.testing.assert_allclose(by_rows, moments(conv, params, X)[1], rtol=0.2)


class Net(nn.Module):
    """Two equal layers inside of a network that knows nothing of noise."""

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(8, (3, 3), name="first")(x)
        x = nn.remat(nn.Conv)(8, (3, 3), name="second")(nn.relu(x))
        return nn.Dense(3)(x.mean((1, 2)))


def test_a_network_is_noisy_inside_the_block_alone_and_is_not_compiled_again():
    net = Net()
    params = net.init(jax.random.key(0), X)["params"]
    noisy_params = with_variances(params)
    traced = []

    @jax.jit
    def loss(params, key):
        traced.append(0)
        with bsj.linen.use_variational_dropout(key):
            return net.apply({"params": params}, X).sum()

    values = [float(loss(noisy_params, jax.random.key(i))) for i in (0, 1, 0)]
    assert values[0] != values[1]
    assert values[0] == values[2]
    assert len(traced) == 1
    plain = net.apply({"params": params}, X)
    np.testing.assert_array_equal(net.apply({"params": noisy_params}, X), plain)
    grads = jax.jit(jax.grad(loss))(noisy_params, jax.random.key(0))
    assert all(float(jnp.abs(leaf).max()) > 0 for leaf in jax.tree.leaves(grads))

    apply = jax.jit(lambda params: net.apply({"params": params}, X))
    np.testing.assert_allclose(apply(noisy_params), plain, rtol=1e-5)
    with bsj.linen.use_variational_dropout(jax.random.key(0)):  # outside of jit: compiled anew
        assert not np.allclose(apply(noisy_params), plain, rtol=1e-3)


def test_a_noisy_layer_takes_its_input_alone():
    conv = bsj.linen.BlockSparseConv(4, (3, 3))
    params = with_variances(conv.init(jax.random.key(0), X)["params"])
    with (
        pytest.raises(ValueError, match="expected a noisy layer to be called with its input alone"),
        bsj.linen.use_variational_dropout(jax.random.key(0)),
    ):
        conv.apply({"params": params}, X, activation="relu")


LINEN = {
    "conv": (bsj.linen.VariationalConv(4, (3, 3), padding="VALID"), nn.Conv, X),
    "dense": (bsj.linen.VariationalDense(5), nn.Dense, ROWS),
}


@pytest.mark.parametrize("name", LINEN)
def test_linen_layers_have_the_moments_of_the_closed_form(name):
    layer, plain, x = LINEN[name]
    params = with_variances(layer.init(jax.random.key(0), x, deterministic=True)["params"])
    options = {"padding": "VALID", "kernel_size": (3, 3)} if name == "conv" else {}
    plain = plain(layer.features, **options)

    @jax.jit
    @jax.vmap
    def draw(key):
        rngs = {"dropout": key}
        return layer.apply({"params": params}, x, rngs=rngs, deterministic=False)

    drawn = draw(jax.random.split(jax.random.key(9), 4000))
    mean, variance = moments(plain, params, x)
    np.testing.assert_allclose(drawn.var(0), variance, rtol=0.15)
    assert float(jnp.abs((drawn.mean(0) - mean) / jnp.sqrt(variance / 4000)).max()) < 4.5
    kept = bsj.apply_masks(params, bsj.variational_masks(params))
    assert 0 < float((kept["kernel"] == 0).mean()) < 1
    kept.pop("log_sigma2")
    np.testing.assert_allclose(
        layer.apply({"params": params}, x, deterministic=True),
        plain.apply({"params": kept}, x),
        rtol=1e-5,
    )


NNX = {
    "conv": (bsj.nnx.VariationalConv, (3, 4, (3, 3)), "conv"),
    "dense": (bsj.nnx.VariationalDense, (4, 5), "dense"),
}


@pytest.mark.parametrize("name", NNX)
def test_nnx_layers_have_the_moments_of_the_closed_form(name):
    kind, sizes, twin = NNX[name]
    layer = kind(*sizes, **({"padding": "VALID"} if name == "conv" else {}), rngs=nnx.Rngs(0))
    linen, plain, x = LINEN[twin]
    log_sigma2 = jax.random.uniform(jax.random.key(3), layer.kernel.shape, minval=-5, maxval=3)
    layer.log_sigma2[...] = log_sigma2
    params = {
        "kernel": layer.kernel[...],
        "bias": layer.bias[...],
        "log_sigma2": layer.log_sigma2[...],
    }
    options = {"padding": "VALID", "kernel_size": (3, 3)} if name == "conv" else {}

    drawn = nnx.jit(lambda layer, x: layer(x))(layer, jnp.repeat(x[None], 2000, 0))
    mean, variance = moments(plain(linen.features, **options), params, x)
    np.testing.assert_allclose(drawn.var(0), variance, rtol=0.25)
    assert float(jnp.abs((drawn.mean(0) - mean) / jnp.sqrt(variance / 2000)).max()) < 4.5
    layer.eval()
    expected = linen.apply({"params": params}, x, deterministic=True)
    np.testing.assert_allclose(layer(x), expected, rtol=1e-5, atol=1e-5)


def test_an_nnx_network_trains_and_prunes():
    model = bsj.nnx.VariationalDense(4, 3, initial_log_sigma2=-1.0, rngs=nnx.Rngs(0))
    tx = bsj.sparse(
        bsj.variational_dropout(where=lambda name, leaf: leaf.ndim == 2), optax.adam(0.05)
    )
    optimizer = bsj.nnx.Optimizer(model, tx, wrt=nnx.Param)
    target = ROWS @ jnp.zeros((4, 3)).at[0].set(3.0)

    @nnx.jit
    def step(model, optimizer):
        def loss(model):
            kl = bsj.variational_dropout_kl(nnx.state(model, nnx.Param))
            return jnp.square(model(ROWS) - target).sum() + kl

        optimizer.update(model, nnx.grad(loss)(model))

    for _ in range(400):
        step(model, optimizer)
    rates = log_alpha(model.kernel[...], model.log_sigma2[...])
    assert float(rates[0].max()) + 1 < float(rates[1:].min())  # the target needs the first row
    masks = bsj.variational_masks(nnx.state(model, nnx.Param))
    np.testing.assert_array_equal(masks["kernel"].get_value(), rates <= 3)
    assert not masks["kernel"].get_value().all()


def test_a_summary_knows_the_variances_from_the_conv_kernels():
    """They are no layers that `where` passed over, and no weights of the network."""
    params = {
        "conv": {"kernel": jnp.ones((3, 3, 8, 8))},
        "depthwise": {"kernel": jnp.ones((3, 3, 1, 8))},
        "other": {"log_sigma2": jnp.ones((3, 3, 8, 4))},  # of another meaning: it has no kernel
    }
    noisy = bsj.with_log_variances(params)
    state = bsj.variational_dropout(0.5).init(noisy)
    masks = bsj.variational_masks({"conv": noisy["conv"]}, sparsity=0.5)
    state = bsj.replace_masks(state, bsj.get_masks(state) | masks)
    summary = bsj.summarize(noisy, state)
    assert summary.own_parameters == {"conv/log_sigma2"}
    assert [row.name for row in summary.dense_convs] == ["depthwise/kernel", "other/log_sigma2"]
    sizes = {row.name: row.weights for row in summary.rows}
    of_network = sum(sizes.values()) - sizes["conv/log_sigma2"]
    assert summary.total_density == 1 - 0.5 * sizes["conv/kernel"] / of_network
