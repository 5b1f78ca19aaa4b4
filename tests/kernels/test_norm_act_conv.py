"""Convolutions between batch norms, against Flax's batch norm, ReLU and convolution in turn."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from fused_passes import FUSED
from jax import lax

import blocksparse_jax as bsj
from pallas_kernels.block_sparse_conv import available_implementations, choice, norm_passes, xla

NAMES = [name for name, reason in available_implementations().items() if reason is None]
SHAPE = (3, 3, 16, 32)
LAYOUT = bsj.random_groups(jax.random.key(0), SHAPE, group_size=8, kept=6, kept_taps=4)
SQUARE = bsj.random_groups(jax.random.key(1), (3, 3, 16, 16), group_size=8, kept=6, kept_taps=4)
ORDINARY = [("fused", "CHWN"), ("cpu", "CHWN"), ("xla", "NHWC"), (None, "CHWN")]
"""The implementations and data formats that are not slow; `None` runs native kernels too."""


NORMALISING = dataclasses.replace(  # the same where an implementation normalises while it loads
    FUSED,
    weight_gradient=lambda spec, *a: xla.IMPLEMENTATION.weight_gradient(
        spec, *norm_passes.normalised(spec, *a)
    ),
    normalises=lambda spec: True,
)


@pytest.fixture(autouse=True)
def _fused(monkeypatch):
    monkeypatch.setitem(choice.IMPLEMENTATIONS, "fused", FUSED)


@jax.numpy_dtype_promotion("standard")  # which flax relies on
def flax_norm(z, scale, bias):
    """Flax's batch norm over NHWC, in training."""
    norm = nn.BatchNorm(use_running_average=False, epsilon=1e-5, dtype=z.dtype)
    variables = {
        "params": {"scale": scale, "bias": bias},
        "batch_stats": {"mean": jnp.zeros_like(scale), "var": jnp.ones_like(scale)},
    }
    return norm.apply(variables, z, mutable=["batch_stats"])[0]


def plain_conv(x, kernel, strides=1):
    return lax.conv_general_dilated(
        x, kernel, (strides, strides), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


def masked(kernels):
    """The kernels, with zeros where the layouts of the second and the third keep nothing."""
    layouts = {"second": SQUARE, "third": LAYOUT}
    return kernels | {
        name: jnp.where(bsj.layout_to_mask(layout), kernels[name], 0)
        for name, layout in layouts.items()
        if name in kernels
    }


def arrays(dtype=jnp.float32, seed=0):
    """Images, the kernels of three convolutions, and the parameters of the norms."""
    rng = np.random.default_rng(seed)

    def normal(*shape):
        return jnp.asarray(rng.standard_normal(shape), dtype)

    kernels = {"first": 0.3 * normal(3, 3, 5, 16)}
    kernels |= masked({"second": normal(*SQUARE.shape), "third": normal(*SHAPE)})
    norms = {
        name: (1 + 0.3 * normal(n), normal(n))
        for name, n in (("first", 16), ("second", 16), ("third", 32))
    }
    return normal(4, 6, 5, 5) + 1, kernels, norms


def flax_network(x, kernels, norms):
    """A stem, a residual block whose shortcut is the stem's output, and a strided convolution."""
    stream = nn.relu(flax_norm(plain_conv(x, kernels["first"]), *norms["first"]))
    branch = flax_norm(plain_conv(stream, kernels["second"]), *norms["second"])
    stream = nn.relu(branch + stream)
    z = plain_conv(stream, kernels["third"], 2)
    return nn.relu(flax_norm(z, *norms["third"])), stream


def network(x, kernels, norms, implementation, layouts, data_format="NHWC"):
    """The same in the convolutions between batch norms."""
    options = {"data_format": data_format, "implementation": implementation}
    second, third = layouts
    z, sums = bsj.conv_with_sums(x, kernels["first"], bsj.Dense(), data_format=data_format)
    stream, z, sums = bsj.norm_add_act_conv(
        z, sums, *norms["first"], None, kernels["second"], second, **options
    )
    stream, z, sums = bsj.norm_add_act_conv(
        z, sums, *norms["second"], stream, kernels["third"], third, strides=2, **options
    )
    x = bsj.norm_act_apply(z, sums, *norms["third"], data_format=data_format)
    return x, stream


def loss(outputs):
    """Depends on both outputs, in the order NHWC."""
    x, stream = outputs
    weights = jnp.cos(jnp.arange(x.size, dtype=x.dtype)).reshape(x.shape)
    return (weights * jnp.tanh(x)).sum() + (stream**2).mean()


def worst(results, expected):
    errors = [
        float(jnp.abs(a.astype(b.dtype) - b).max() / jnp.abs(b).max())
        for a, b in zip(jax.tree.leaves(results), jax.tree.leaves(expected), strict=True)
    ]
    return max(errors)


def value_and_gradients(f, *operands):
    """The outputs and the gradients of the loss, compiled."""

    def both(*operands):
        return f(*operands), jax.grad(lambda *a: loss(f(*a)), (0, 1, 2))(*operands)

    return jax.jit(both)(*operands)


@pytest.mark.parametrize("strides", [1, 2])
def test_a_norm_that_is_loaded_gives_what_flax_gives_in_float64(strides, monkeypatch):
    """And no normalised input is stored for the way back."""
    monkeypatch.setitem(choice.IMPLEMENTATIONS, "fused", NORMALISING)

    def flax_chain(x, kernels, norms):
        z = plain_conv(x, kernels["first"])
        stream = nn.relu(flax_norm(z, *norms["first"]))
        z = plain_conv(stream, masked(kernels)["second"], strides)
        return nn.relu(flax_norm(z, *norms["second"])), x

    def chain(x, kernels, norms):
        z, sums = bsj.conv_with_sums(x, kernels["first"], bsj.Dense(), data_format="NHWC")
        options = {"strides": strides, "data_format": "NHWC", "implementation": "fused"}
        kernel = kernels["second"]
        z, sums = bsj.norm_act_conv(z, sums, *norms["first"], kernel, SQUARE, **options)
        return bsj.norm_act_apply(z, sums, *norms["second"], data_format="NHWC"), x

    x, kernels, norms = arrays()
    del kernels["third"], norms["third"]
    results = value_and_gradients(chain, x, kernels, norms)
    gradient = jax.grad(lambda *a: loss(chain(*a)), (0, 1, 2))
    assert "optimization_barrier" not in str(jax.make_jaxpr(gradient)(x, kernels, norms))
    with jax.enable_x64(True):
        exact = jax.tree.map(lambda a: a.astype(jnp.float64), (x, kernels, norms))
        assert worst(results, value_and_gradients(flax_chain, *exact)) < 1e-5


def test_in_float64_values_and_gradients_are_those_of_flax():
    with jax.enable_x64(True):
        operands = arrays(jnp.float64)

        def ours(*operands):
            return network(*operands, None, (bsj.Dense(), bsj.Dense()))

        results = value_and_gradients(ours, *operands)
        expected = value_and_gradients(flax_network, *operands)
        assert all(leaf.dtype == jnp.float64 for leaf in jax.tree.leaves(results))
        assert worst(results, expected) < 1e-12


@pytest.mark.parametrize(
    ("name", "data_format"),
    [
        pytest.param(
            name, data_format, marks=[] if (name, data_format) in ORDINARY else pytest.mark.slow
        )
        for name in [*NAMES, "fused", None]
        for data_format in ("CHWN", "NHWC")
    ],
)
def test_every_implementation_gives_the_values_and_gradients_of_flax(name, data_format):
    operands = arrays()

    def ours(x, kernels, norms):
        if data_format == "CHWN":
            x = x.transpose(3, 1, 2, 0)
        outputs = network(x, kernels, norms, name, (SQUARE, LAYOUT), data_format)
        return outputs if data_format == "NHWC" else [a.transpose(3, 1, 2, 0) for a in outputs]

    def of_flax(x, kernels, norms):
        return flax_network(x, masked(kernels), norms)

    results = value_and_gradients(ours, *operands)
    with jax.enable_x64(True):
        exact = jax.tree.map(lambda a: a.astype(jnp.float64), operands)
        expected = value_and_gradients(of_flax, *exact)
        assert worst(results, expected) < 1e-5


@pytest.mark.parametrize("chosen", ["fused", "xla"])
def test_without_a_name_the_chosen_implementation_decides(chosen, monkeypatch):
    """Where it has the passes between batch norms they run, else the others do."""
    passes = []

    def counted(*operands):
        passes.append("forward with sums")
        return FUSED.forward_with_sums(*operands)

    fused = dataclasses.replace(FUSED, forward_with_sums=counted)
    monkeypatch.setitem(choice.IMPLEMENTATIONS, "fused", fused)
    specs = []

    def choose(spec):
        specs.append(spec)
        return choice.Choice(chosen, "", {})

    monkeypatch.setattr(choice, "choose_implementation", choose)
    x, kernels, norms = arrays()

    def outputs(name):
        return network(x.transpose(3, 1, 2, 0), kernels, norms, name, (SQUARE, LAYOUT), "CHWN")

    results = outputs(None)
    assert len(passes) == (2 if chosen == "fused" else 0)
    assert any(spec.gradients for spec in specs), "it is a choice for training"
    assert worst(results, outputs("dense")) < 1e-5


@pytest.mark.parametrize("name", ["fused", "xla", "cpu"])
def test_packed_values_give_what_the_dense_kernel_gives(name):
    if name in available_implementations() and available_implementations()[name] is not None:
        pytest.skip(available_implementations()[name])
    x, kernels, norms = arrays()
    x = x.transpose(3, 1, 2, 0)

    def outputs(second, third):
        packed = kernels | {"second": second, "third": third}
        return network(x, packed, norms, name, (SQUARE, LAYOUT), "CHWN")

    dense = kernels["second"], kernels["third"]
    values = bsj.pack(dense[0], SQUARE), bsj.pack(dense[1], LAYOUT)
    gradients = jax.jit(jax.grad(lambda *a: loss(outputs(*a)), (0, 1)))
    for packed, layout, whole in zip(gradients(*values), (SQUARE, LAYOUT), gradients(*dense)):
        np.testing.assert_allclose(packed, bsj.pack(whole, layout), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("relu", [True, False])
@pytest.mark.parametrize("name", ["fused", "xla"])
def test_the_gradient_of_the_sums_is_used(name, relu):
    """The sums may go into anything, and the ReLU may be absent."""
    x, kernels, norms = arrays()
    z = x.transpose(3, 1, 2, 0)[:, :4]
    options = {"data_format": "CHWN", "implementation": name}
    z = jnp.concatenate([z] * 3 + [z[:1]])

    def ours(z, sums, scale, bias, kernel):
        y, sums = bsj.norm_act_conv(z, sums, scale, bias, kernel, SQUARE, relu=relu, **options)
        return (jnp.sin(sums / 1000)).sum() + jnp.tanh(y).sum()

    def autodiff(z, sums, scale, bias, kernel):
        mean, variance = sums[0] / z[0].size, sums[1] / z[0].size - (sums[0] / z[0].size) ** 2
        by = (slice(None), None, None, None)
        h = scale[by] * (z - mean[by]) / jnp.sqrt(variance + 1e-5)[by] + bias[by]
        h = jnp.maximum(h, 0) if relu else h
        kernel = jnp.where(bsj.layout_to_mask(SQUARE), kernel, 0)
        y = plain_conv(h.transpose(3, 1, 2, 0), kernel).transpose(3, 1, 2, 0)
        sums = jnp.stack([y.sum((1, 2, 3)), (y * y).sum((1, 2, 3))])
        return (jnp.sin(sums / 1000)).sum() + jnp.tanh(y).sum()

    sums = jnp.stack([z.sum((1, 2, 3)), (z * z).sum((1, 2, 3))])
    operands = z, sums, *norms["first"], kernels["second"]
    results = jax.jit(jax.grad(ours, range(5)))(*operands)
    with jax.enable_x64(True):
        exact = jax.tree.map(lambda a: a.astype(jnp.float64), operands)
        assert worst(results, jax.grad(autodiff, range(5))(*exact)) < 1e-4


@pytest.mark.parametrize("name", ["fused", "xla", None])
def test_half_precision_is_no_worse_than_flax(name):
    operands = arrays()
    halved = jax.tree.map(lambda a: a.astype(jnp.bfloat16), operands[:2])
    exact = (*jax.tree.map(lambda a: a.astype(jnp.float32), halved), operands[2])
    expected = value_and_gradients(flax_network, *exact)

    def ours(x, kernels, norms):
        outputs = network(x.transpose(3, 1, 2, 0), kernels, norms, name, (SQUARE, LAYOUT), "CHWN")
        return [a.transpose(3, 1, 2, 0) for a in outputs]

    def in_the_kept(results):
        outputs, (x, kernels, norms) = results
        return outputs, (x, masked(kernels), norms)

    results = in_the_kept(value_and_gradients(ours, *halved, operands[2]))
    flax = in_the_kept(value_and_gradients(flax_network, *halved, operands[2]))
    expected = in_the_kept(expected)

    def error(results):
        return np.mean(
            [
                float(jnp.linalg.norm((a.astype(jnp.float32) - b).ravel()) / jnp.linalg.norm(b))
                for a, b in zip(jax.tree.leaves(results), jax.tree.leaves(expected), strict=True)
            ]
        )

    assert error(results) < 1.25 * error(flax)


def test_statistics_are_those_of_flax():
    z = 3 * jax.random.normal(jax.random.key(0), (4, 5, 5, 8)) + 2
    _, sums = bsj.conv_with_sums(z, jnp.eye(8).reshape(1, 1, 8, 8), bsj.Dense())
    mean, variance = bsj.mean_and_variance(sums, z.size // 8)
    np.testing.assert_allclose(mean, z.mean((0, 1, 2)), rtol=1e-5)
    np.testing.assert_allclose(variance, z.var((0, 1, 2)), rtol=1e-4)


def test_a_constant_channel_has_finite_gradients():
    z = jnp.full((4, 3, 3, 2), 0.1)
    sums = jnp.stack([z.sum((1, 2, 3)), (z * z).sum((1, 2, 3))])

    def total(z, sums):
        return bsj.norm_act_apply(z, sums, jnp.ones(4), jnp.ones(4), data_format="CHWN").sum()

    assert all(jnp.isfinite(a).all() for a in jax.grad(total, (0, 1))(z, sums))


@pytest.mark.parametrize("name", ["fused", pytest.param("xla", marks=pytest.mark.slow)])
def test_second_derivatives(name):
    x, kernels, norms = arrays()

    def value(kernel, which):
        outputs = network(
            x.transpose(3, 1, 2, 0),
            kernels | {"third": kernel},
            norms,
            which,
            (SQUARE, LAYOUT),
            "CHWN",
        )
        return loss([a.transpose(3, 1, 2, 0) for a in outputs])

    def penalty(kernel, which):
        return (jax.grad(value)(kernel, which) ** 2).sum()

    result, expected = (
        jax.jit(jax.grad(penalty), static_argnums=1)(kernels["third"], which)
        for which in (name, "dense")
    )
    np.testing.assert_allclose(result, expected, atol=1e-3 * float(jnp.abs(expected).max()))


def test_what_does_not_fit_is_named():
    z, kernel, sums, one = (jnp.ones(s, jnp.float32) for s in ((2, 4, 4, 16), SHAPE, (2, 16), 16))
    for bad, message in (
        ({"sums": one}, r"sums: expected shape \(2, 16\)"),
        ({"scale": jnp.ones(8)}, r"scale: expected shape \(16,\) for the 16 channels"),
        ({"bias": jnp.ones((16, 1))}, "bias: expected shape"),
        ({"z": z[0]}, "z: expected the raw output"),
        ({"implementation": "tritn"}, "implementation: expected .*'triton'"),
        ({"data_format": "NCHW"}, "data_format: expected"),
        ({"padding": "SOME"}, "padding: expected"),
    ):
        given = {"z": z, "sums": sums, "scale": one, "bias": one} | bad
        with pytest.raises(ValueError, match=message):
            bsj.norm_act_conv(**given, kernel=kernel, layout=LAYOUT)
    with pytest.raises(ValueError, match="shortcut: expected the shape of z"):
        bsj.norm_act_apply(z, sums, one, one, z[:1])
    with pytest.raises(TypeError, match="forward mode"):
        jax.jvp(
            lambda z: bsj.norm_act_conv(
                z, sums, one, one, kernel, LAYOUT, data_format="CHWN", implementation="fused"
            )[0],
            (z.transpose(3, 1, 2, 0),),
            (z.transpose(3, 1, 2, 0),),
        )
