"""The snippets of the documentation run as written, on any pytree."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import blocksparse_jax as bsj


def _tree(kind):
    keys = jax.random.split(jax.random.key(0), 3)
    kernel, stem = (
        jax.random.normal(keys[0], (3, 3, 64, 64)),
        jax.random.normal(keys[1], (3, 3, 3, 64)),
    )
    if kind == "dict":
        return {
            "stem": {"kernel": stem},
            "conv": {"kernel": kernel, "bias": jnp.zeros(64)},
        }, lambda tree: tree["conv"]["kernel"]
    if kind == "list":
        return [stem, kernel, jnp.zeros(64)], lambda tree: tree[1]
    if kind == "array":
        return kernel, lambda tree: tree
    model = nnx.Conv(64, 64, (3, 3), rngs=nnx.Rngs(0))
    return nnx.state(
        model, nnx.Param
    ), lambda tree: nnx.to_pure_dict(tree)["kernel"] if isinstance(tree, nnx.State) else tree


@pytest.mark.parametrize("kind", ["dict", "list", "array", "nnx"])
def test_the_readme_example_runs_on_any_pytree(kind):
    params, kernel_of = _tree(kind)
    grads = jax.tree.map(jnp.ones_like, params)
    tx = bsj.keep_zeros(
        optax.chain(
            bsj.hrbp_prune(sparsity=0.9, group_size=32, block_density=1 / 3),
            optax.add_decayed_weights(5e-4),
            optax.sgd(0.1, momentum=0.9),
        )
    )
    state = tx.init(params)
    updates, state = tx.update(grads, state, params)
    params = optax.apply_updates(params, updates)
    assert isinstance(state[0], bsj.SparseState)
    masks, layouts = bsj.get_masks(state), bsj.get_layouts(state)
    kernel = kernel_of(params)
    layout = next(
        node
        for node in jax.tree.leaves(layouts, is_leaf=bsj.is_layout)
        if isinstance(node, bsj.BlockLayout)
    )

    x = jax.random.normal(jax.random.key(1), (2, 8, 8, 64))
    y = bsj.conv(
        x, kernel, layout, strides=(1, 1), padding="SAME", data_format="NHWC", implementation=None
    )
    assert y.shape == (2, 8, 8, 64)
    mask = bsj.layout_to_mask(layout)
    bsj.validate(layout)
    packed = bsj.pack(kernel, layout)
    np.testing.assert_array_equal(bsj.unpack(packed, layout), kernel)
    assert not np.any(np.asarray(kernel)[~np.asarray(mask)])
    np.testing.assert_allclose(y, bsj.conv(x, packed, layout), rtol=0, atol=0)

    values, opt = bsj.pack_tree(params, state, layouts)
    back, back_state = bsj.unpack_tree(values, opt, layouts)
    for old, new in zip(
        jax.tree.leaves((params, state)), jax.tree.leaves((back, back_state)), strict=True
    ):
        np.testing.assert_array_equal(old, new)
    assert jax.tree.structure((params, state)) == jax.tree.structure((back, back_state))
    assert jax.tree.structure(masks) == jax.tree.structure(params)
    text = str(bsj.summarize(params, state))
    assert "19 channels x 3 taps" in text
    assert "target 0.1000" in text
    assert abs(bsj.summarize(params, state).density - 0.1) < 0.005


def test_packed_leaves_shrink_with_the_density(params):
    tx = bsj.keep_zeros(
        optax.chain(bsj.hrbp_prune(0.75, group_size=16, block_density=1.0), optax.adamw(1e-2))
    )
    state = tx.init(params)
    params = bsj.apply_masks(params, bsj.get_masks(state))
    values, opt = bsj.pack_tree(params, state, bsj.get_layouts(state))
    adam = next(
        s for s in jax.tree.leaves(opt, is_leaf=lambda n: hasattr(n, "mu")) if hasattr(s, "mu")
    )
    assert (
        values["conv1"]["kernel"].size
        == adam.mu["conv1"]["kernel"].size
        == params["conv1"]["kernel"].size // 4
    )
    assert values["stem"]["kernel"].shape == params["stem"]["kernel"].shape


@pytest.mark.parametrize(
    "optimizer",
    [
        pytest.param(optax.sgd(0.05, momentum=0.9), id="sgd"),
        pytest.param(optax.adamw(1e-2), id="adamw", marks=pytest.mark.slow),
        pytest.param(optax.lamb(1e-3), id="lamb"),
    ],
)
def test_packed_training_is_ordinary_training_of_a_smaller_tree(params, optimizer):
    """The same gradients move packed and dense parameters alike, step by step, with the same tx."""
    tx = bsj.keep_zeros(optax.chain(bsj.hrbp_prune(0.7, group_size=16), optimizer))
    state = tx.init(params)
    params = bsj.apply_masks(params, bsj.get_masks(state))
    layouts = bsj.get_layouts(state)
    values, opt = bsj.pack_tree(params, state, layouts)
    for step in range(4):
        grads = jax.tree.map(
            lambda p, s=step: jax.random.normal(jax.random.key(s), p.shape), params
        )
        packed_grads, _ = bsj.pack_tree(grads, None, layouts)
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        packed_updates, opt = tx.update(packed_grads, opt, values)
        values = optax.apply_updates(values, packed_updates)
    back, _ = bsj.unpack_tree(values, opt, layouts)
    for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(back), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_dynamic_hrbp_keeps_groups_and_counts_and_follows_the_gradient(params):
    """Grown channels are those of the largest gradient; filters, taps and counts stay; that step
    applies no gradient.
    """
    due = bsj.periodic(2, until=100)
    method = bsj.hrbp_prune(0.75, group_size=16, block_density=1.0, update=due, drop_fraction=0.5)
    tx = bsj.keep_zeros(optax.chain(method, optax.sgd(0.1, momentum=0.9)))
    state = tx.init(params)
    params = bsj.apply_masks(params, bsj.get_masks(state))
    before = bsj.get_layouts(state)["conv1"]["kernel"]
    grads = jax.tree.map(jnp.zeros_like, params)
    absent = next(c for c in range(16) if c not in before.channels[0].tolist())
    grads["conv1"]["kernel"] = grads["conv1"]["kernel"].at[:, :, absent, :].set(100.0)
    for step in range(3):
        updates, state = tx.update(grads, state, params)
        old, params = params, optax.apply_updates(params, updates)
        assert bool(state[0].skip_gradient) == (step == 2) == bool(due(step))
    after = bsj.get_layouts(state)["conv1"]["kernel"]
    np.testing.assert_array_equal(before.filters, after.filters)
    np.testing.assert_array_equal(before.taps, after.taps)
    bsj.validate(after)
    assert absent in after.channels[0].tolist()
    assert not np.array_equal(before.channels, after.channels)
    mask = np.asarray(bsj.get_masks(state)["conv1"]["kernel"])
    np.testing.assert_array_equal(mask, bsj.layout_to_mask(after))
    np.testing.assert_array_equal(
        params["conv1"]["kernel"], np.where(mask, old["conv1"]["kernel"], 0)
    )


def test_scores_by_gradient_wait_for_the_first_gradient(params):
    """Channels with no gradient are not kept, whatever their magnitude."""
    tx = bsj.hrbp_prune(
        0.5,
        group_size=32,
        block_density=1.0,
        scores="gradient",
        where=lambda name, leaf: name == "conv1/kernel",
    )
    state = tx.init(params)
    grads = jax.tree.map(jnp.zeros_like, params)
    grads["conv1"]["kernel"] = grads["conv1"]["kernel"].at[:, :, ::2].set(1.0)
    _, state = jax.jit(tx.update)(grads, state, params)
    np.testing.assert_array_equal(
        bsj.get_layouts(state)["conv1"]["kernel"].channels, [np.arange(0, 16, 2)]
    )
    _, later = tx.update(jax.tree.map(jnp.ones_like, grads), state, params)
    np.testing.assert_array_equal(
        later.layouts["conv1"]["kernel"].channels, state.layouts["conv1"]["kernel"].channels
    )


def test_given_scores_decide(params):
    scores = jax.tree.map(jnp.zeros_like, params)
    scores["conv1"]["kernel"] = scores["conv1"]["kernel"].at[:, :, 3:7].set(1.0)
    tx = bsj.hrbp_prune(
        0.75,
        group_size=8,
        block_density=1.0,
        scores=scores,
        where=lambda name, leaf: name == "conv1/kernel",
    )
    np.testing.assert_array_equal(
        bsj.get_layouts(tx.init(params))["conv1"]["kernel"].channels, [[3, 4, 5, 6]] * 4
    )


def test_subp_layouts_follow_its_masks(params):
    tx = bsj.keep_zeros(bsj.subp(0.5, block=16, start=1, end=3))
    state, kept = tx.init(params), []
    for _ in range(5):
        _, state = jax.jit(tx.update)(params, state, params)
        layout = bsj.get_layouts(state)["conv1"]["kernel"]
        np.testing.assert_array_equal(
            bsj.layout_to_mask(layout), bsj.get_masks(state)["conv1"]["kernel"]
        )
        kept.append(layout.packed_shape[1])
    assert kept == [16, 15, 8, 8, 8]
    with pytest.raises(ValueError, match="outside of jit"):
        jax.jit(bsj.get_layouts)(state)
