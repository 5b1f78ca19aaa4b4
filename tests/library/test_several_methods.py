"""Several methods in one chain: what a state with more than one of them says and does."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import references as ref
from sparse_methods import noise

import blocksparse_jax as bsj

SHAPE = (3, 3, 16, 32)


@pytest.fixture
def params():
    keys = jax.random.split(jax.random.key(0))
    return {
        "a": jax.random.normal(keys[0], SHAPE),
        "b": jax.random.normal(keys[1], SHAPE),
        "bias": jnp.ones(32),
    }


def only(*names):
    return lambda name, leaf: name in names


def train(tx, params, steps):
    state = tx.init(params)
    for step in range(steps):
        updates, state = tx.update(noise(params, step), state, params)
        params = optax.apply_updates(params, updates)
    return params, state


def random_masks(seed, params, sparsity, *names):
    return bsj.random_masks(jax.random.key(seed), params, sparsity, where=only(*names))


def test_a_leaf_of_two_methods_keeps_what_both_keep(params):
    first = random_masks(1, params, 0.5, "a", "b")
    second = random_masks(2, params, 0.75, "b")
    tx = bsj.sparse(bsj.fixed_masks(first), bsj.fixed_masks(second), optax.adam(0.1))
    trained, state = train(tx, params, 3)
    masks = bsj.get_masks(state)
    both = np.asarray(first["b"] & second["b"])
    assert 0.1 < both.mean() < 0.15
    np.testing.assert_array_equal(masks["a"], first["a"])
    np.testing.assert_array_equal(masks["b"], both)
    assert masks["bias"].ndim == 0
    np.testing.assert_array_equal(trained["a"] != 0, first["a"])
    np.testing.assert_array_equal(trained["b"] != 0, both)
    assert bsj.summarize(trained, state).nonzero_pruned == 0


@pytest.mark.parametrize("blocks_first", [True, False])
def test_the_layout_of_a_leaf_comes_from_the_method_that_has_one(params, blocks_first):
    """Masks of single weights inside blocks: the blocks' layout still holds all that is kept."""
    blocks = bsj.hrbp_prune(0.5, group_size=16, block_density=1.0, where=only("a"))
    weights = bsj.fixed_masks(random_masks(1, params, 0.5, "a"))
    methods = (blocks, weights) if blocks_first else (weights, blocks)
    trained, state = train(bsj.sparse(*methods, optax.sgd(0.1)), params, 2)
    layout = bsj.get_layouts(state)["a"]
    assert isinstance(layout, bsj.BlockLayout)
    inside = np.asarray(bsj.layout_to_mask(layout))
    mask = np.asarray(bsj.get_masks(state)["a"])
    assert not mask[~inside].any()
    assert 0.2 < mask.mean() < 0.3
    np.testing.assert_array_equal(trained["a"] != 0, mask)
    assert bsj.get_layouts(state)["b"] == bsj.Dense()


def test_a_leaf_of_each_method(params):
    tx = bsj.sparse(
        bsj.rigl(0.5, update_every=2, until=9, where=only("a")),
        bsj.subp(0.5, schedule=bsj.between(0, 1), soft=False, where=only("b")),
        optax.sgd(0.1, momentum=0.9),
    )
    trained, state = train(tx, params, 4)
    masks = bsj.get_masks(state)
    np.testing.assert_array_equal(trained["a"] != 0, masks["a"])
    np.testing.assert_array_equal(trained["b"] != 0, masks["b"])
    assert (masks["a"].mean(), masks["b"].mean()) == (0.5, 0.5)
    layouts = bsj.get_layouts(state)
    assert layouts["a"] == bsj.Dense()
    assert layouts["b"].packed_shape == (2, 8, 9, 16)


def test_masks_follow_from_weights_that_another_method_kept_from_moving(params):
    """RigL applies no gradient at step 2, whose end sets SUBP's masks: momentum moves no weight."""
    rigl = bsj.rigl(0.5, update_every=2, until=9, where=only("a"))
    subp = bsj.subp(0.5, schedule=bsj.between(0, 3, every=3), where=only("b"))
    trained, state = train(bsj.sparse(rigl, subp, optax.sgd(1.0, momentum=0.9)), params, 3)
    assert bool(state[0].skip_gradient)
    sizes = np.abs(trained["b"]).reshape(9, 16, 2, 16).sum((0, 3)).T
    kept = ref.subp_channels(np.asarray(bsj.get_masks(state)["b"]), 16)
    np.testing.assert_array_equal(kept, [ref.largest(row, 8) for row in sizes])


def test_the_spec_of_several_methods_is_what_any_of_them_does(params):
    rigl = bsj.rigl(0.5, update_every=4, until=9, where=only("a"))
    hard = bsj.subp(0.75, schedule=bsj.between(3, 6, every=3), soft=False, where=only("b"))
    spec = bsj.get_spec(bsj.sparse(rigl, hard, optax.sgd(0.1)).init(params))
    assert spec.method == "rigl + subp"
    assert spec.density == 0.25, "the sparsest of the methods"
    assert [step for step in range(12) if spec.changes(step)] == [2, 4, 5, 8]
    assert [step for step in range(12) if spec.dense_gradient(step)] == [4, 8]
    assert spec.resizes
    assert spec.has_layout
    assert spec.skips_gradient
    assert not spec.straight_through
    soft = bsj.subp(0.75, schedule=bsj.between(3, 6, every=3), where=only("b"))
    assert bsj.get_spec(bsj.sparse(rigl, soft, optax.sgd(0.1)).init(params)).straight_through


def test_a_layer_without_pruned_weights_is_not_blamed_for_a_gradient_without_them():
    """ERK leaves a small layer dense: it has no pruned weight whose gradient could be missing."""
    params = {"large": jnp.ones((3, 3, 64, 64)), "small": jnp.ones((3, 3, 8, 8))}
    method = bsj.rigl(0.8, update_every=1, until=9)
    state = method.init(params)
    assert bsj.get_masks(state)["small"].all()
    for step in range(3):
        _, state = method.update(noise(params, step), state, params)
    assert int(state.stalled_updates) == 0
