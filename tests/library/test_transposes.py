"""`cancel_transposes`: the same results, with transposes only where an operation needs them."""

import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax

import blocksparse_jax as bsj

X = jax.random.normal(jax.random.key(0), (2, 6, 8, 4))
TO_CHWN, TO_NHWC = (3, 1, 2, 0), (3, 1, 2, 0)


def kernel(x):
    """What a block-sparse convolution does at its door: any operation on a CHWN array."""
    return jnp.transpose(lax.cumsum(jnp.transpose(x, TO_CHWN), axis=1), TO_NHWC)


def batch_norm(x):
    mean = x.mean((0, 1, 2))
    variance = ((x - mean) ** 2).mean((0, 1, 2))
    return (x - mean) * lax.rsqrt(variance + 1e-5) * jnp.arange(1.0, 5.0) + jnp.ones(4)


BETWEEN = {
    "nothing": lambda x: x,
    "batch norm": batch_norm,
    "relu": jax.nn.relu,
    "gelu": jax.nn.gelu,
    "shortcut": lambda x: kernel(x) + x,
    "other order": lambda x: (
        x + jnp.transpose(kernel(jnp.transpose(x, (1, 0, 2, 3))), (1, 0, 2, 3))
    ),
    "array": lambda x: x * jnp.sin(X) + jnp.where(X > 0, x, 2),
    "scalars": lambda x: jnp.clip(x, -1, 1) * 3 + 1,
    "max pool": lambda x: nn.max_pool(x, (2, 3), (2, 1), "SAME"),
    "average pool": lambda x: nn.avg_pool(x, (3, 2), (1, 2), ((1, 2), (0, 1))),
    "own pool": lambda x: lax.reduce_window(
        x, 0.0, lambda a, b: a + 2 * b, (1, 2, 1, 1), (1, 2, 1, 1), "VALID"
    ),
    "pad": lambda x: jnp.pad(x, ((0, 0), (1, 2), (0, 0), (0, 3))),
    "negative pad": lambda x: lax.pad(x, 0.0, ((0, 0, 0), (1, -1, 1), (0, 0, 0), (0, 1, 0))),
    "concatenate": lambda x: jnp.concatenate([x, 2 * x, X], axis=-1),
    "reverse": lambda x: jnp.flip(x, (1, 3)),
    "slice": lambda x: x[:, 1:5:2, :, 1:],
    "mean of some axes": lambda x: x * x.mean((1, 3), keepdims=True),
    "max of an axis": lambda x: jnp.expand_dims(x.max(1), 1) - x,
    "softmax": lambda x: jax.nn.softmax(x, axis=1),
    "reshape": lambda x: (x.reshape(2, 48, 2, 2).mean(2, keepdims=True) * jnp.ones((2, 1))).reshape(
        X.shape
    ),
    "dtype": lambda x: x.astype(jnp.bfloat16).astype(jnp.float32),
    "dense conv": lambda x: nn.Conv(4, (3, 3)).apply(
        {"params": {"kernel": jnp.ones((3, 3, 4, 4)), "bias": jnp.ones(4)}}, x
    ),
    "checkpoint": lambda x: jax.checkpoint(lambda x: jnp.sin(kernel(jnp.cos(kernel(x)))))(x),
    "scan": lambda x: lax.scan(lambda c, _: (jnp.sin(kernel(kernel(c))), c.sum()), x, length=2)[0],
    "cond": lambda x: lax.cond(x.sum() > 0, lambda x: kernel(kernel(x)), jnp.sin, x),
    "while": lambda x: lax.fori_loop(0, 3, lambda _, c: jnp.sin(kernel(kernel(c))), x),
    "jit": lambda x: jax.jit(lambda x, y: x @ y)(x, jnp.ones((4, 4))),
}
CANCEL = (
    "nothing",
    "batch norm",
    "relu",
    "gelu",
    "shortcut",
    "scalars",
    "max pool",
    "average pool",
)


def transposes_of_activations(fun, *args):
    """How many activations are transposed in the program, inside of its calls too.

    Arrays with three axes of size 1 are one number for each channel.
    """
    transpose = re.compile(r":\w+\[(.*)\] = transpose\[permutation=\(\d, \d, \d, \d\)\] (\w+)")
    found = transpose.findall(str(jax.make_jaxpr(fun)(*args)))
    return len({operand for shape, operand in found if shape.split(",").count("1") < 3})


@pytest.mark.parametrize("name", BETWEEN)
def test_values_and_gradients_are_those_of_the_function(name):
    def fun(x):
        return kernel(BETWEEN[name](kernel(x)))

    def loss(x):
        return (fun(x) ** 2).mean()

    moved = bsj.cancel_transposes(fun)(X)
    np.testing.assert_allclose(moved, fun(X), rtol=1e-5, atol=1e-5)
    assert moved.dtype == fun(X).dtype
    if name in ("while", "own pool"):
        return  # JAX has no gradient of these in reverse mode
    expected = jax.value_and_grad(loss)(X)
    inside = bsj.cancel_transposes(jax.value_and_grad(loss))(X)
    outside = jax.value_and_grad(bsj.cancel_transposes(loss))(X)
    for actual in (inside, outside):
        jax.tree.map(
            lambda a, e: np.testing.assert_allclose(a, e, rtol=1e-4, atol=1e-5), actual, expected
        )


@pytest.mark.parametrize("name", CANCEL)
def test_transposes_between_two_kernels_cancel(name):
    def fun(x):
        return (kernel(BETWEEN[name](kernel(x))) ** 2).mean()

    assert transposes_of_activations(bsj.cancel_transposes(fun), X) == 1  # of the input
    gradient = bsj.cancel_transposes(jax.grad(fun))
    assert transposes_of_activations(gradient, X) <= 2  # and of its gradient
    assert transposes_of_activations(jax.grad(fun), X) >= 8


@pytest.mark.parametrize("name", ["checkpoint", "scan", "cond", "while"])
def test_transposes_inside_of_bodies_cancel(name):
    fun = BETWEEN[name]
    moved = transposes_of_activations(bsj.cancel_transposes(fun), X)
    assert moved == 2 < transposes_of_activations(fun, X)


def test_a_step_of_a_plain_network_keeps_the_transposes_of_its_door_only():
    class Network(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.relu(nn.Conv(16, (3, 3), name="stem")(x))
            for _ in range(3):
                y = nn.Conv(16, (3, 3), use_bias=False)(x)
                y = nn.relu(nn.BatchNorm(use_running_average=False)(y))
                x = nn.max_pool(nn.Conv(16, (3, 3))(y) + x, (2, 2), (2, 2))
            return nn.Dense(3)(x.mean((1, 2)))

    x = jax.random.normal(jax.random.key(1), (4, 16, 16, 3))
    variables = Network().init(jax.random.key(2), x)
    params, stats = variables["params"], variables["batch_stats"]
    tx = bsj.sparse(bsj.hrbp_prune(0.75, block_density=1), optax.sgd(0.1))
    state = tx.init(params)
    params = bsj.apply_masks(params, bsj.get_masks(state))

    def step(params, state, x):
        def loss(params):
            with bsj.linen.use_layouts(bsj.get_layouts(state)):
                y, new = Network().apply(
                    {"params": params, "batch_stats": stats}, x, mutable="batch_stats"
                )
            return (y**2).mean(), new

        grads, new = jax.grad(loss, has_aux=True)(params)
        updates, state_ = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state_, new

    assert transposes_of_activations(step, params, state, x) >= 24
    moved = bsj.cancel_transposes(step)
    assert transposes_of_activations(moved, params, state, x) <= 3
    expected, actual = jax.jit(step)(params, state, x), jax.jit(moved)(params, state, x)
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    jax.tree.map(
        lambda a, e: np.testing.assert_allclose(a, e, rtol=1e-4, atol=1e-5), actual, expected
    )


def test_gradients_of_a_moved_function_of_sparse_convolutions_are_right():
    params = {"conv": jax.random.normal(jax.random.key(1), (3, 3, 4, 8))}
    where = lambda name, leaf: True  # noqa: E731
    method = bsj.hrbp_prune(0.75, group_size=4, block_density=1, where=where)
    layouts = bsj.get_layouts(method.init(params))

    def loss(params, layouts, index):
        y = jax.nn.relu(bsj.conv(X, params["conv"], layouts["conv"]))
        return (y**2).mean() * index

    moved = bsj.cancel_transposes(loss)
    for through in (lambda fun: fun, jax.jit):
        actual = jax.grad(through(moved))(params, layouts, 3)["conv"]
        np.testing.assert_allclose(actual, jax.grad(loss)(params, layouts, 3)["conv"], rtol=1e-5)


def test_pytrees_and_keywords_pass_as_they_are():
    def fun(tree, *, scale):
        """Doc."""
        return {"y": kernel(kernel(tree["x"])) * scale, "none": None}, tree["i"]

    result, index = bsj.cancel_transposes(fun)({"x": X, "i": 3}, scale=jnp.float32(2))
    np.testing.assert_allclose(result["y"], kernel(kernel(X)) * 2, rtol=1e-6)
    assert result["none"] is None
    assert index == 3
    assert bsj.cancel_transposes(fun).__doc__ == "Doc."


def test_vmap_and_sharding_constraints_pass_through():
    mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    sharding = jax.NamedSharding(mesh, jax.P("data"))

    def fun(x):
        return kernel(lax.with_sharding_constraint(jnp.sin(kernel(x)), sharding))

    expected = fun(X)
    np.testing.assert_allclose(jax.jit(bsj.cancel_transposes(fun))(X), expected, rtol=1e-6)
    batched = jax.vmap(bsj.cancel_transposes(lambda x: kernel(jnp.sin(kernel(x)))))(X[None])
    np.testing.assert_allclose(batched[0], expected, rtol=1e-6)
