"""`BatchNormAct` in linen and nnx: flax's batch norm, with what follows it in a network."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from new_process import host_devices, run_python

import blocksparse_jax as bsj

X = 2 * jax.random.normal(jax.random.key(0), (3, 4, 5, 6)) + 1
RESIDUAL = jax.random.normal(jax.random.key(1), X.shape)
OPTIONS = {
    "defaults": {},
    "channels first": {"axis": 0},
    "momentum and epsilon": {"axis": 0, "momentum": 0.7, "epsilon": 0.1},
    "no scale": {"axis": 0, "use_scale": False},
    "no bias": {"use_bias": False},
    "half precision": {"axis": 0, "dtype": jnp.bfloat16},
    "half precision of params": {"axis": 0, "param_dtype": jnp.bfloat16},
    "exact variance": {"use_fast_variance": False},
}
CALLS = {
    "norm": {"activation": None},
    "ReLU": {},
    "all": {"residual": RESIDUAL, "factor": 0.7},
}


def finished(y, residual=None, factor=None, activation="relu"):
    y = y if factor is None else factor * y
    y = y if residual is None else y + residual.astype(y.dtype)
    return nn.relu(y) if activation else y


def assert_alike(actual, expected):
    def close(a, b):
        assert a.dtype == b.dtype
        assert a.shape == b.shape
        tolerance = 2e-2 if a.dtype == jnp.bfloat16 else 2e-5
        a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)

    jax.tree.map(close, actual, expected)


def variables_of(norm, x=X):
    """Params and statistics with values of their own, from flax's layer."""
    variables = norm.init(jax.random.key(2), x)
    leaves, tree = jax.tree.flatten(variables)
    changed = [
        (leaf + 0.3 * jnp.cos(jnp.arange(leaf.size) + i)).astype(leaf.dtype)
        for i, leaf in enumerate(leaves)
    ]
    return jax.tree.unflatten(tree, changed)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("options", OPTIONS)
def test_linen_is_flax_in_training_and_at_inference(options, call, dtype):
    x, arguments = X.astype(dtype), CALLS[call]
    flax = nn.BatchNorm(**OPTIONS[options])
    ours = bsj.linen.BatchNormAct(**OPTIONS[options])
    variables = variables_of(nn.BatchNorm(True, **OPTIONS[options]), x)
    started = ours.init(jax.random.key(2), x, False)
    assert_alike(started, flax.init(jax.random.key(2), x, False))
    for running in (True, False):
        y, updated = flax.apply(variables, x, running, mutable=["batch_stats"])
        expected = finished(y, **arguments), updated
        result = ours.apply(variables, x, running, mutable=["batch_stats"], **arguments)
        assert_alike(result, expected)


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("options", OPTIONS)
def test_nnx_is_flax_in_training_and_at_inference(options, call):
    arguments, axis = CALLS[call], OPTIONS[options].get("axis", -1)
    flax = nnx.BatchNorm(X.shape[axis], **OPTIONS[options], rngs=nnx.Rngs(0))
    ours = bsj.nnx.BatchNormAct(X.shape[axis], **OPTIONS[options], rngs=nnx.Rngs(0))
    nnx.update(ours, nnx.state(flax))
    for running in (False, True):
        y = finished(flax(X, use_running_average=running), **arguments)
        assert_alike(ours(X, use_running_average=running, **arguments), y)
        assert_alike(nnx.to_pure_dict(nnx.state(ours)), nnx.to_pure_dict(nnx.state(flax)))


def test_a_mask_and_several_axes_run_as_in_flax():
    mask = jnp.arange(6) < 4
    for options, call in (({}, {"mask": mask}), ({"axis": (0, 3)}, {})):
        flax, ours = nn.BatchNorm(False, **options), bsj.linen.BatchNormAct(False, **options)
        variables = flax.init(jax.random.key(0), X)
        run = {"mutable": ["batch_stats"], **call}
        y, updated = flax.apply(variables, X, **run)
        assert_alike(ours.apply(variables, X, **run), (nn.relu(y), updated))
    norm = bsj.nnx.BatchNormAct(6, rngs=nnx.Rngs(0))
    y = nnx.BatchNorm(6, rngs=nnx.Rngs(0))(X, mask=mask)
    assert_alike(norm(X, mask=mask), nn.relu(y))


@pytest.mark.parametrize("running", [False, True])
def test_a_fork_returns_the_result_twice(running):
    layer = bsj.linen.BatchNormAct(running, axis=0)
    variables = layer.init(jax.random.key(0), X)
    run = functools.partial(layer.apply, variables, X, mutable=["batch_stats"])
    (first, second), _ = run(fork=True)
    np.testing.assert_array_equal(first, run()[0])
    np.testing.assert_array_equal(second, first)
    layer = bsj.nnx.BatchNormAct(3, axis=0, rngs=nnx.Rngs(0))
    first, second = layer(X, running, fork=True)
    np.testing.assert_array_equal(first, layer(X, running))
    np.testing.assert_array_equal(second, first)


def test_nnx_trains():
    class Model(nnx.Module):
        def __init__(self, rngs):
            self.norm = bsj.nnx.BatchNormAct(3, axis=0, rngs=rngs)

        def __call__(self, x):
            return self.norm(x)

    model = Model(nnx.Rngs(0))
    gradient = nnx.jit(nnx.grad(lambda model: (model(X) * RESIDUAL).sum()))(model)
    expected = jax.grad(
        lambda scale: (bsj.norm_act(X, scale, implementation="xla")[0] * RESIDUAL).sum()
    )(jnp.ones(3))
    np.testing.assert_allclose(gradient["norm"]["scale"][...], expected, rtol=1e-4)
    np.testing.assert_allclose(model.norm.mean[...], 0.01 * X.mean((1, 2, 3)), rtol=1e-4)


def test_axis_name_means_the_whole_batch():
    done = run_python(__file__, **host_devices(2))
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    assert done.stdout.split() == ["linen", "nnx"]


def shared_out():
    from jax.sharding import PartitionSpec as P

    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    layer = bsj.linen.BatchNormAct(False, axis=0, axis_name="data")
    variables = layer.init(jax.random.key(0), X)
    whole = P(None, None, None, "data")

    def run(x):
        return layer.apply(variables, x, mutable=["batch_stats"])

    mapped = jax.shard_map(run, mesh=mesh, in_specs=whole, out_specs=(whole, P()))
    expected = bsj.linen.BatchNormAct(False, axis=0).apply(variables, X, mutable=["batch_stats"])
    assert_alike(jax.jit(mapped)(X), expected)
    print("linen")
    norm = bsj.nnx.BatchNormAct(3, axis=0, axis_name="data", rngs=nnx.Rngs(0))
    graph, state = nnx.split(norm)
    mapped = jax.shard_map(
        lambda x: nnx.merge(graph, state, copy=True)(x), mesh=mesh, in_specs=whole, out_specs=whole
    )
    assert_alike(jax.jit(mapped)(X), expected[0])
    print("nnx")


if __name__ == "__main__":
    shared_out()
