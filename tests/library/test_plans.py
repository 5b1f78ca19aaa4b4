"""Plans beside layouts: where they go, where they do not, and who reads them."""

import dataclasses
import functools

import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import plan_reader
import pytest
from flax import linen as nn
from flax import nnx

import blocksparse_jax as bsj
from pallas_kernels.block_sparse_conv import choice

SHAPE = (3, 3, 32, 40)
COUNTS = {"group_size": 20, "kept": 16, "kept_taps": 4, "channel_block": 8}


@pytest.fixture(autouse=True)
def reader(monkeypatch):
    monkeypatch.setitem(choice.IMPLEMENTATIONS, plan_reader.NAME, plan_reader.IMPLEMENTATION)


def random_layout(seed=0, shape=SHAPE):
    return bsj.random_groups(jax.random.key(seed), shape, **COUNTS)


def normal(seed, shape):
    return jax.random.normal(jax.random.key(seed), shape)


def assert_same(one, other):
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_array_equal(a, b, strict=True)


def assert_close(one, other):
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-4 * float(jnp.abs(b).max()))


@pytest.mark.parametrize("kernel_gradient", ["masked", "dense"])
@pytest.mark.parametrize("strides", [1, 2])
def test_conv_reads_the_plan_in_all_passes(kernel_gradient, strides):
    layout = random_layout()
    x, kernel = normal(1, (2, 5, 6, 32)), normal(2, SHAPE)

    @functools.partial(jax.jit, static_argnums=0)
    def gradients(implementation, layout, plan):
        def loss(x, kernel):
            options = {"kernel_gradient": kernel_gradient, "strides": strides, "plan": plan}
            return jnp.sin(
                bsj.conv(x, kernel, layout, implementation=implementation, **options)
            ).sum()

        return jax.value_and_grad(loss, (0, 1))(x, kernel)

    expected = gradients("dense", layout, None)
    plan = bsj.with_plans(layout).plan
    assert_close(gradients(plan_reader.NAME, layout, plan), expected)
    assert_close(gradients(plan_reader.NAME, bsj.with_plans(layout), None), expected)
    assert_close(gradients("xla", bsj.with_plans(layout), None), expected)
    with pytest.raises(TypeError, match="plan"):
        gradients(plan_reader.NAME, layout, None)
    other = bsj.with_plans(random_layout(shape=(3, 3, 64, 40))).plan
    with pytest.raises(ValueError, match=r"plan\.weights: expected int32.*make the plan from this"):
        gradients("xla", layout, other)
    with pytest.raises(ValueError, match=r"plan: a Dense\(\) layout has no lists"):
        bsj.conv(x, kernel, bsj.Dense(), plan=plan)


def test_a_scan_over_stacked_layers_takes_each_layer_its_plan():
    stack = [random_layout(seed, shape=(3, 3, 40, 40)) for seed in range(2)]
    stacked = jax.tree.map(lambda *a: jnp.stack(a), *stack)
    planned, kernels = bsj.with_plans(stacked), normal(3, stacked.full_shape)
    for i, one in enumerate(stack):
        assert_same(jax.tree.map(lambda a, i=i: a[i], planned), bsj.with_plans(one))

    def network(implementation, layouts, x):
        def layer(x, kernel_and_layout):
            return bsj.conv(x, *kernel_and_layout, implementation=implementation), None

        return jax.lax.scan(layer, x, (kernels, layouts))[0].sum()

    x = normal(4, (1, 4, 4, 40))
    results = [
        jax.grad(functools.partial(network, *by))(x)
        for by in ((plan_reader.NAME, planned), ("dense", stacked))
    ]
    assert_close(*results)


def test_flax_layers_read_the_plan_of_their_layout():
    layout, x = bsj.with_plans(random_layout()), normal(1, (2, 4, 4, 32))
    kernel, bias = normal(2, SHAPE), jnp.zeros(40)
    expected = bsj.conv(x, kernel, layout, implementation="dense")
    own = bsj.linen.BlockSparseConv(40, (3, 3), implementation=plan_reader.NAME)
    params = {"kernel": bsj.pack(kernel, layout), "bias": bias}
    variables = {"params": params, "layouts": {"kernel": layout}}
    assert_close(own.apply(variables, x), expected)
    with bsj.linen.use_layouts({"kernel": layout}, implementation=plan_reader.NAME):
        assert_close(nn.Conv(40, (3, 3)).apply({"params": params}, x), expected)

    model = bsj.nnx.sparsify(
        nnx.List([nnx.Conv(32, 40, (3, 3), rngs=nnx.Rngs(0))]), implementation=plan_reader.NAME
    )
    model[0].kernel[...] = kernel
    bsj.nnx.set_layouts(model, {0: {"kernel": layout}})
    assert_close(nnx.jit(lambda model, x: model[0](x))(model, x), expected)

    dense = bsj.with_plans(
        bsj.mask_to_layout(jnp.zeros((32, 16), bool).at[:8].set(True), np.arange(16)[None])
    )
    assert dense.plan is not None
    weights, rows = normal(5, (32, 16)), normal(6, (3, 32))
    results = [bsj.linear(rows, weights, dense, implementation=i) for i in ("dense", "xla")]
    assert_close(bsj.linear(rows, weights, dense, implementation=plan_reader.NAME), results[0])
    assert_close(*results)


def test_states_and_files_hold_no_plan():
    params = {"kernel": normal(0, SHAPE), "bias": jnp.zeros(40)}
    tx = bsj.sparse(
        bsj.hrbp_prune(0.75, group_size=20, channel_block=8, block_density=1),
        optax.sgd(0.1, momentum=0.9),
    )
    state = tx.init(params)
    layouts = bsj.get_layouts(state)
    planned = bsj.with_plans(layouts)
    assert planned["bias"] == bsj.Dense()
    plain = bsj.pack_tree(params, state, layouts)
    packed = bsj.pack_tree(params, state, planned)
    assert_same(packed, plain)
    assert_same(bsj.unpack_tree(*packed, planned), bsj.unpack_tree(*plain, layouts))
    assert_same(jax.jit(bsj.pack_tree)(params, state, planned), plain)

    written = flax.serialization.to_state_dict(planned["kernel"])
    assert written.keys() == {"filters", "channels", "taps"}
    other = random_layout(5)
    target = bsj.with_plans(random_layout())
    restored = flax.serialization.from_state_dict(target, flax.serialization.to_state_dict(other))
    assert_same(restored, bsj.with_plans(other))
    plain = flax.serialization.from_state_dict(
        dataclasses.replace(target, plan=None), flax.serialization.to_state_dict(restored)
    )
    assert_same(plain, other)


def test_new_masks_compile_neither_the_plans_nor_the_step_again():
    traces = []

    @functools.partial(jax.jit, donate_argnums=0)
    def step(values, layout, x):
        traces.append(1)

        def loss(values):
            return bsj.conv(x, values, layout, implementation=plan_reader.NAME).sum()

        return values - 0.1 * jax.grad(loss)(values)

    x = normal(1, (2, 4, 4, 32))
    for seed in range(3):
        layout = bsj.with_plans(random_layout(seed))
        values = step(bsj.pack(normal(2, SHAPE), layout), layout, x)
        assert jnp.isfinite(values).all()
        assert not layout.plan.entries.is_deleted()
    assert len(traces) == 1


def test_a_kernel_that_is_too_large_stays_without_a_plan():
    layout = bsj.mask_to_layout(jnp.ones((17, 1, 4, 4), bool))
    assert bsj.with_plans(layout).plan is None
