"""Random masks of layers of one shape differ: every layer, every step and every key draws for
itself.
"""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import blocksparse_jax as bsj

SHAPE = (3, 3, 32, 32)
# Layers that nothing but their names tells apart.
PARAMS = {
    name: jax.random.normal(jax.random.key(0), SHAPE) for name in ("first", "second", "third")
}
HALF = jax.tree.map(lambda w: w > 0, PARAMS)


def masks_after(tx, updates):
    """The masks after a number of updates whose gradients are the same for all layers."""
    state, update = tx.init(PARAMS), jax.jit(tx.update)
    for step in range(updates):
        grads = jax.tree.map(lambda w, s=step: jnp.roll(w, s, 0), PARAMS)
        _, state = update(grads, state, PARAMS)
    return bsj.get_masks(state)


def random_channels(key):
    layouts = bsj.random_channel_layouts(key, PARAMS, 0.5)
    return {name: bsj.layout_to_mask(layout) for name, layout in layouts.items()}


def regrown_at_random(key):
    """The first masks, weights and dropped weights of all layers are the same."""
    first = {name: mask.astype(jnp.float32) for name, mask in HALF.items()}
    method = bsj.drop_and_grow(
        0.5,
        drop="magnitude",
        grow="random",
        fraction=0.5,
        schedule=bsj.every(1),
        budget="uniform",
        scores=first,
        key=key,
    )
    return masks_after(method, 2)


DRAWS = {
    "random_masks": lambda key: bsj.random_masks(key, PARAMS, 0.5),
    "random_channel_layouts": random_channels,
    "rigl": lambda key: bsj.get_masks(bsj.rigl(0.5, until=9, key=key).init(PARAMS)),
    "set_": lambda key: bsj.get_masks(
        bsj.set_(0.5, schedule=bsj.every(5), budget="uniform", key=key).init(PARAMS)
    ),
    "hrbp_prune": lambda key: bsj.get_masks(
        bsj.hrbp_prune(0.5, group_size=16, block_density=1.0, scores="random", key=key).init(PARAMS)
    ),
    "one_shot": lambda key: bsj.get_masks(
        bsj.one_shot(
            0.5, scores="random", pattern=bsj.patterns.kernel(), budget="uniform", key=key
        ).init(PARAMS)
    ),
    "growth at random": regrown_at_random,
    "regrowth of SUBP": lambda key: masks_after(
        bsj.keep_zeros(bsj.subp(0.75, block=1, start=0, end=4, key=key)), 2
    ),
}


def overlap(a, b):
    """The correlation of two masks: 1 of equal ones, about 0 of independent ones."""
    a, b = (np.asarray(mask, float).reshape(-1) for mask in (a, b))
    return float(np.corrcoef(a, b)[0, 1])


# What two layers have in common anyway: the same weights stay in both.
SHARED = {"growth at random": 0.6, "regrowth of SUBP": 0.6}


@pytest.mark.parametrize("name", DRAWS)
def test_layers_of_one_shape_draw_different_masks(name):
    masks = DRAWS[name](jax.random.key(3))
    assert len({int(mask.sum()) for mask in masks.values()}) == 1
    for a, b in itertools.combinations(masks.values(), 2):
        assert 0 < int(a.sum()) < a.size
        assert overlap(a, b) < SHARED.get(name, 0.25)


@pytest.mark.parametrize("name", DRAWS)
def test_keys_draw_different_masks_and_the_same_key_the_same(name):
    one, again, other = (DRAWS[name](jax.random.key(seed)) for seed in (3, 3, 4))
    for layer in PARAMS:
        np.testing.assert_array_equal(one[layer], again[layer])
        assert overlap(one[layer], other[layer]) < SHARED.get(name, 0.25)


def test_every_step_grows_other_weights():
    """Weights that are dropped at once, as they are zero, come back at random at each step."""
    zeros = jax.tree.map(jnp.zeros_like, PARAMS)
    method = bsj.drop_and_grow(
        0.5,
        drop="magnitude",
        grow="random",
        fraction=1.0,
        schedule=bsj.every(1),
        budget="uniform",
    )
    state, masks = method.init(zeros), []
    for _ in range(4):
        _, state = method.update(zeros, state, zeros)
        masks.append(bsj.get_masks(state)["first"])
    for a, b in itertools.combinations(masks, 2):
        assert abs(overlap(a, b)) < 0.1


def test_random_dropping_and_random_growing_draw_apart():
    """Half of 4608 active weights are dropped and as many grown out of 6912, so 768 of the dropped
    come back; were both drawn by the same numbers, none of the lowest could be among the highest.
    """
    method = bsj.drop_and_grow(
        0.5,
        drop="random",
        grow="random",
        fraction=0.5,
        schedule=bsj.every(1),
        budget="uniform",
    )
    params = {"conv": PARAMS["first"]}
    state = method.init(params)
    _, state = method.update(params, state, params)
    before = np.asarray(bsj.get_masks(state)["conv"])
    _, state = method.update(params, state, params)
    after = np.asarray(bsj.get_masks(state)["conv"])
    assert before.sum() == after.sum() == 4608
    stayed_or_returned = int((before & after).sum())
    assert abs(stayed_or_returned - (2304 + 768)) < 150
