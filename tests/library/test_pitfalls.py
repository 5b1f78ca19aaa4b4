"""Pitfalls: results that could be wrong without a word, states that other libraries wrap, and what
their users take for granted.
"""

import dataclasses

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx, serialization
from requirements import needs

import blocksparse_jax as bsj

KERNEL = jax.random.normal(jax.random.key(0), (3, 3, 32, 32)) / 20
PARAMS = {"c": {"kernel": KERNEL}}
X = jax.random.normal(jax.random.key(1), (2, 6, 6, 32))
CPU = pytest.param("cpu", marks=needs(bsj.available_implementations()["cpu"]))


def dynamic_step(tx, kernel_gradient):
    def step(params, state):
        layout = bsj.get_layouts(state)["c"]["kernel"]

        def loss(params):
            return jnp.mean(
                (bsj.conv(X, params["c"]["kernel"], layout, kernel_gradient=kernel_gradient) - X)
                ** 2
            )

        updates, state = tx.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    return step


METHODS = {
    "hrbp-dynamic": lambda: bsj.hrbp_prune(0.8, group_size=16, update=bsj.periodic(2)),
    "hrbp-gradient": lambda: bsj.hrbp_prune(0.8, group_size=16, scores="gradient"),
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("kernel_gradient", "stalls"), [("masked", True), ("dense", False)])
def test_updates_that_can_grow_nothing_are_counted_and_shown(method, kernel_gradient, stalls):
    tx = bsj.keep_zeros(optax.chain(METHODS[method](), optax.sgd(0.1, momentum=0.9)))
    state = tx.init(PARAMS)
    params, step = (
        bsj.apply_masks(PARAMS, bsj.get_masks(state)),
        jax.jit(dynamic_step(tx, kernel_gradient)),
    )
    first = bsj.get_masks(state)
    for _ in range(5):
        params, state = step(params, state)
    updates = 2 if method == "hrbp-dynamic" else 1
    assert int(state[0].stalled_updates) == (updates if stalls else 0)
    assert (
        f"{updates} updates of the masks could grow nothing" in str(bsj.summarize(params, state))
    ) == stalls
    assert (float(bsj.sad(first, bsj.get_masks(state)).total) == 0) == stalls


def test_outside_of_jit_it_raises():
    tx = bsj.keep_zeros(optax.chain(METHODS["hrbp-dynamic"](), optax.sgd(0.1)))
    state = tx.init(PARAMS)
    params, step = bsj.apply_masks(PARAMS, bsj.get_masks(state)), dynamic_step(tx, "masked")
    for _ in range(2):
        params, state = step(params, state)
    with pytest.raises(
        ValueError,
        match=r"updates: the gradient at 'c/kernel' is zero on every pruned "
        r"weight.*kernel_gradient='dense'",
    ):
        step(params, state)


def test_a_network_without_any_gradient_is_not_blamed():
    tx = bsj.rigl(0.5, update_every=1, until=100)
    state, zeros = tx.init(PARAMS), jax.tree.map(jnp.zeros_like, PARAMS)
    for _ in range(3):
        _, state = tx.update(zeros, state, PARAMS)
    assert int(state.stalled_updates) == 0


class Net(nnx.Module):
    def __init__(self, rngs):
        self.stem = nnx.Conv(3, 32, (3, 3), rngs=rngs)
        self.conv = bsj.nnx.BlockSparseConv(32, 32, (3, 3), rngs=rngs)

    def __call__(self, x):
        return self.conv(nnx.relu(self.stem(x)))


def trained(cls, method):
    model = Net(nnx.Rngs(0))
    optimizer = cls(model, bsj.keep_zeros(optax.chain(method, optax.adamw(1e-2))), wrt=nnx.Param)
    grads = nnx.grad(lambda m: (m(jnp.ones((1, 4, 4, 3))) ** 2).mean())(model)
    return model, optimizer, grads


@pytest.mark.parametrize("cls", [bsj.nnx.Optimizer, nnx.Optimizer])
@pytest.mark.parametrize("pure", [False, True], ids=["variables", "pure"])
def test_every_tree_function_takes_the_state_of_an_nnx_optimizer(cls, pure):
    """The state's leaves are another kind of variable than the params', or plain arrays in a plain
    dict.
    """
    model, optimizer, grads = trained(cls, bsj.hrbp_prune(0.8, group_size=16))
    if cls is bsj.nnx.Optimizer:
        optimizer.update(model, grads)
    params, state = nnx.state(model, nnx.Param), optimizer.opt_state
    if pure:
        params, state = nnx.to_pure_dict(params), nnx.as_pure(state)
    masks, layouts = bsj.get_masks(state), bsj.get_layouts(state)
    summary = bsj.summarize(params, state)
    assert summary.density == pytest.approx(0.2, abs=0.005)
    assert "2 groups of 16 filters" in str(summary)
    zeroed = bsj.apply_masks(params, masks)
    assert (
        jax.tree.structure(zeroed)
        == jax.tree.structure(bsj.masked(params, state))
        == jax.tree.structure(params)
    )
    values, packed = bsj.pack_tree(zeroed, state, layouts)
    sizes = {
        leaf.size
        for path, leaf in jax.tree.leaves_with_path((values, packed))
        if "kernel" in str(path) and "conv" in str(path)
    }
    assert KERNEL.size not in sizes
    assert bsj.summarize(values, packed).density == summary.density
    back = bsj.unpack_tree(values, packed, layouts)
    if cls is bsj.nnx.Optimizer and not pure:  # after an update, moments are zero where pruned
        assert jax.tree.structure(back) == jax.tree.structure((zeroed, state))
        for a, b in zip(jax.tree.leaves(back), jax.tree.leaves((zeroed, state)), strict=True):
            np.testing.assert_array_equal(a, b)
    assert float(bsj.sad(masks, bsj.get_masks(back[1])).total) == 0


def test_nnx_straight_through_weights_are_masked():
    model, optimizer, _ = trained(bsj.nnx.Optimizer, bsj.sr_ste(2, 4))
    forward = bsj.masked(nnx.state(model, nnx.Param), optimizer.opt_state)
    assert float((forward["conv"]["kernel"][...] == 0).mean()) == 0.5


def test_layouts_that_nnx_took_apart_are_named():
    """Before flax's own optimizer writes anything, or where it has been done by hand."""
    model, optimizer, grads = trained(nnx.Optimizer, bsj.hrbp_prune(0.8, group_size=16))
    before = jnp.array(model.conv.kernel[...])
    with pytest.raises(ValueError, match=r"state: flax.nnx.Optimizer .*use bsj.nnx.Optimizer"):
        optimizer.update(model, grads)
    np.testing.assert_array_equal(model.conv.kernel[...], before)
    nnx.update(optimizer.opt_state, nnx.state(nnx.as_pure(optimizer.opt_state)))
    with pytest.raises(
        ValueError, match=r"state: expected a layout at 'conv/kernel.*use bsj.nnx.Optimizer"
    ):
        bsj.get_layouts(optimizer.opt_state)


@pytest.mark.parametrize(
    "method",
    [
        bsj.hrbp_prune(0.8, group_size=16),
        bsj.hrbp_prune(0.8, group_size=16, update=bsj.periodic(9)),
    ],
)
def test_the_summary_of_packed_params_is_that_of_the_dense_ones(method):
    state = method.init(PARAMS)
    params = bsj.apply_masks(PARAMS, bsj.get_masks(state))
    values, packed = bsj.pack_tree(params, state, bsj.get_layouts(state))
    assert bsj.summarize(values, packed) == bsj.summarize(params, state)
    with pytest.raises(
        ValueError,
        match=r"params: expected shape .* of the state at 'c/kernel'.*pack both, or neither",
    ):
        bsj.summarize(params, packed)


def soft_subp():
    tx = bsj.keep_zeros(optax.chain(bsj.subp(0.75, start=0, end=1), optax.sgd(0.1, momentum=0.9)))
    params, state = PARAMS, tx.init(PARAMS)
    for _ in range(3):
        _, state = tx.update(params, state, params)
    return params, state, bsj.get_layouts(state)


def test_packing_refuses_to_lose_trained_weights():
    params, state, layouts = soft_subp()
    with pytest.raises(
        ValueError,
        match=r"params: subp trains the pruned weights too, and packing would lose 6912 of them at "
        r"'c/kernel'",
    ):
        bsj.pack_tree(params, state, layouts)
    zeroed = bsj.apply_masks(params, bsj.get_masks(state))
    values, packed = bsj.pack_tree(zeroed, state, layouts)
    np.testing.assert_array_equal(
        values["c"]["kernel"],
        bsj.pack_tree(params, state, layouts, drop_pruned=True)[0]["c"]["kernel"],
    )
    np.testing.assert_array_equal(
        bsj.unpack_tree(values, packed, layouts)[0]["c"]["kernel"], zeroed["c"]["kernel"]
    )
    # A packed state holds the layouts, though there are no masks to read them from.
    chex.assert_trees_all_equal(bsj.get_layouts(packed), layouts)
    assert str(bsj.summarize(values, packed)) == str(bsj.summarize(zeroed, state))


@pytest.mark.parametrize("implementation", ["xla", "dense", CPU])
@pytest.mark.parametrize("epilogue", [False, True])
def test_second_derivatives_are_those_of_a_dense_convolution(implementation, epilogue):
    """Reverse over reverse and forward over reverse (a Hessian-vector product), in the input and in
    the kernel, twice over for `x`.
    """
    layout = bsj.hrbp_groups(KERNEL, group_size=16, kept=8, kept_taps=3)
    mask = bsj.layout_to_mask(layout)
    more = (
        {"scale": jnp.linspace(0.5, 2, 32), "bias": jnp.linspace(-1, 1, 32), "activation": "relu"}
        if epilogue
        else {}
    )

    def loss(conv):
        return lambda x, kernel: jnp.sum(jnp.sin(conv(x, kernel)))

    def sparse(x, kernel):
        return bsj.conv(x, kernel, layout, strides=2, implementation=implementation, **more)

    def dense(x, kernel):
        return bsj.conv(x, jnp.where(mask, kernel, 0), bsj.Dense(), strides=(2, 2), **more)

    def curvatures(f):
        def power(x, kernel):
            return sum(jnp.sum(g**2) for g in jax.grad(f, (0, 1))(x, kernel))

        reverse = jax.grad(power, (0, 1))(X, KERNEL)
        forward = jax.jvp(jax.grad(f, (0, 1)), (X, KERNEL), (X * 0.3, KERNEL * 0.2))[1]
        return reverse, forward

    actual, expected = (
        jax.jit(curvatures, static_argnums=0)(loss(conv)) for conv in (sparse, dense)
    )
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4 * float(jnp.abs(b).max()))


def test_forward_mode_alone_takes_the_dense_implementation():
    layout = bsj.hrbp_groups(KERNEL, group_size=16, kept=8, kept_taps=3)
    _, tangent = jax.jvp(lambda x: bsj.conv(x, KERNEL, layout, implementation="dense"), (X,), (X,))
    np.testing.assert_allclose(tangent, bsj.conv(X, KERNEL, layout), rtol=1e-4, atol=1e-5)


def test_flax_writes_and_reads_a_state():
    tx = bsj.keep_zeros(optax.chain(bsj.hrbp_prune(0.8, group_size=16), optax.adam(1e-3)))
    state = tx.init(PARAMS)
    other = tx.init({"c": {"kernel": -KERNEL[::-1, :, ::-1]}})
    assert float(bsj.sad(bsj.get_masks(state), bsj.get_masks(other)).total) > 0
    back = serialization.from_bytes(other, serialization.to_bytes(state))
    assert jax.tree.structure(back) == jax.tree.structure(state)
    for a, b in zip(jax.tree.leaves(back), jax.tree.leaves(state), strict=True):
        np.testing.assert_array_equal(a, b)
    bsj.validate(bsj.get_layouts(back)["c"]["kernel"])
    soft = bsj.subp(0.5, start=0, end=9).init(PARAMS)
    assert bsj.get_layouts(serialization.from_bytes(soft, serialization.to_bytes(soft)))["c"][
        "kernel"
    ].packed_shape == (2, 32, 9, 16)


class Block(nn.Module):
    @nn.compact
    def __call__(self, x):
        return bsj.linen.BlockSparseConv(32, (3, 3), name="inner")(
            nn.relu(bsj.linen.BlockSparseConv(32, (3, 3), name="first")(x))
        )


def test_linen_layouts_of_no_layer_are_refused():
    params = Block().init(jax.random.key(0), X)["params"]
    layouts = bsj.get_layouts(bsj.hrbp_prune(0.8, group_size=16).init(params))
    Block().apply({"params": params, "layouts": layouts}, X)
    Block().apply({"params": params, "layouts": {"inner": layouts["inner"]}}, X)  # absent: dense
    for strange in ({"Conv": layouts["inner"]}, {"net": layouts}):
        with pytest.raises(
            ValueError,
            match=r"layouts: '(Conv|net/first)/kernel' is no parameter of this model.*'first/bias'",
        ):
            Block().apply({"params": params, "layouts": strange}, X)


def test_two_methods_show_both_targets():
    tx = bsj.keep_zeros(
        optax.chain(bsj.rigl(0.5, until=5), bsj.hrbp_prune(0.9, group_size=16), optax.sgd(0.1))
    )
    summary = bsj.summarize(PARAMS, tx.init(PARAMS))
    assert "rigl + hrbp: sparse layers keep" in str(summary)
    assert "(target 0.5000 and 0.1000)" in str(summary)


def test_the_summary_shows_the_run_that_was_asked_for():
    state = bsj.hrbp_prune(0.5, group_size=16, block_density=1, channel_block=24).init(PARAMS)
    assert "16 channels in runs of 16 (asked 24) x 9 taps" in str(bsj.summarize(PARAMS, state))


def test_inject_hyperparams_takes_a_method_with_its_static_arguments_named():
    static = ("sparsity", "group_size", "block_density", "channel_block", "drop_fraction")
    tx = optax.inject_hyperparams(bsj.hrbp_prune, static_args=static)(sparsity=0.8, group_size=16)
    updates, _ = jax.jit(tx.update)(PARAMS, tx.init(PARAMS), PARAMS)
    assert float((updates["c"]["kernel"] != 0).mean()) == pytest.approx(0.2, abs=0.005)


def test_layouts_compare_and_hash_by_identity():
    layout = bsj.hrbp_groups(KERNEL, group_size=16, kept=8, kept_taps=3)
    assert layout == layout
    assert layout != dataclasses.replace(layout)
    assert len({layout, layout}) == 1


def test_one_integer_serves_both_axes_of_conv():
    layout = bsj.hrbp_groups(KERNEL, group_size=16, kept=8, kept_taps=3)
    for name in ("strides", "dilation"):
        one, two = (bsj.conv(X, KERNEL, layout, **{name: value}) for value in (2, (2, 2)))
        np.testing.assert_array_equal(one, two)


def test_raw_random_keys_are_keys():
    state = bsj.rigl(0.5, until=9, key=jax.random.PRNGKey(3)).init(PARAMS)
    assert (
        float(
            bsj.sad(bsj.get_masks(state), bsj.get_masks(bsj.rigl(0.5, until=9).init(PARAMS))).total
        )
        > 0
    )


def test_a_state_restored_without_a_target_is_named():
    """Checkpoints then give lists and dicts in place of tuples and states."""
    state = bsj.sparse(bsj.rigl(0.5, until=9), optax.sgd(0.1)).init({"w": jnp.ones((1, 1, 8, 8))})
    restored = [state[0]._asdict(), list(state[1])]
    with pytest.raises(ValueError, match=r"found none in list, but dicts.*into tx.init\(params\)"):
        bsj.get_masks(restored)


@pytest.mark.parametrize("method", [bsj.hrbp_prune(0.5, block_density=1), bsj.magnitude(0.5)])
def test_shapes_in_place_of_weights_are_named(method):
    params = {"w": jax.ShapeDtypeStruct((1, 1, 8, 8), jnp.float32)}
    with pytest.raises(ValueError, match=r"params\['w'\]: its values decide.*jax.eval_shape"):
        method.init(params)
    assert jax.eval_shape(method.init, params).masks["w"].shape == (1, 1, 8, 8)
