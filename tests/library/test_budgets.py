"""Budgets: shares that add up, and whole block counts that reach the target."""

import math
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import references as ref
from hypothesis import given, settings
from hypothesis import strategies as st

import blocksparse_jax as bsj
from blocksparse_jax import budgets
from blocksparse_jax import counts as whole_counts

VGG = {
    f"conv{i}": (3, 3, cin, cout)
    for i, (cin, cout) in enumerate(
        [
            (64, 64),
            (64, 128),
            (128, 128),
            (128, 256),
            *[(256, 256)] * 3,
            (256, 512),
            *[(512, 512)] * 7,
        ]
    )
}
RESNET = {
    **{f"a{i}": (3, 3, 32, 32) for i in range(10)},
    **{f"b{i}": (3, 3, 64, 64) for i in range(9)},
    **{f"c{i}": (3, 3, 128, 128) for i in range(9)},
    "down": (1, 1, 32, 64),
}


def _density(counts, shapes):
    kept = sum(k * t * shapes[name][3] for name, (k, t) in counts.items())
    return kept / sum(math.prod(shape) for shape in shapes.values())


@pytest.mark.parametrize(
    "shapes", [VGG, RESNET, {"one": (3, 3, 64, 48)}], ids=["vgg", "resnet", "one"]
)
@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.8, 0.9, 0.95])
@pytest.mark.parametrize("block_density", [1 / 9, 1 / 3, 0.5, 1.0])
@pytest.mark.parametrize("budget", ["uniform", "erk"])
def test_the_total_density_is_within_half_a_point(shapes, sparsity, block_density, budget):
    densities = budgets.layer_densities(budget, shapes, sparsity)

    def count():
        return whole_counts.block_counts(
            shapes, densities, block_density=block_density, channel_blocks=dict.fromkeys(shapes, 1)
        )

    if 1 - sparsity > math.ceil(block_density * 9 - 1e-9) / 9 + 0.01:
        with pytest.raises(
            ValueError,
            match=r"block_density: .* keeps at most .* of the weights, but the sparsity asks for "
            r"density",
        ):
            count()
        return
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        counts = count()
    error = abs(_density(counts, shapes) - (1 - sparsity))
    assert error <= 0.005
    assert bool(warned) == (error > 0.05 * (1 - sparsity) + 1e-9)
    for name, (kept, taps) in counts.items():
        assert 1 <= kept <= shapes[name][2]
        assert 1 <= taps <= math.prod(shapes[name][:2])


def test_a_narrow_layer_moves_its_taps_to_reach_the_target():
    """16 channels x 3 of 9 taps come in steps of 2.1 points: 14.6% or 16.7%; 11 channels x 2 taps
    are 15.3%.
    """
    counts = whole_counts.block_counts(
        {"one": (3, 3, 16, 16)}, {"one": 0.155}, block_density=1 / 3, channel_blocks={"one": 1}
    )
    assert counts == {"one": (11, 2)}


def test_runs_of_channels_stay_whole():
    counts = whole_counts.block_counts(
        VGG, dict.fromkeys(VGG, 0.1), block_density=1 / 3, channel_blocks=dict.fromkeys(VGG, 8)
    )
    assert all(kept % 8 == 0 for kept, _ in counts.values())
    assert abs(_density(counts, VGG) - 0.1) <= 0.005


# At 90% sparsity a tenth of the channels stay, and one move of one channel brings the total to its
# target: relative to what it keeps, it costs the wide layer less, though it is the larger change.
MOVES = {
    # 6.3 + 2.4 channels, rounded 6 + 2: one more
    "up": ({"narrow": (1, 1, 24, 8), "wide": (1, 1, 63, 8)}, {"narrow": 2, "wide": 7}),
    # 6.7 + 2.6 channels, rounded 7 + 3: one less
    "down": ({"narrow": (1, 1, 26, 8), "wide": (1, 1, 67, 8)}, {"narrow": 3, "wide": 6}),
    # 20.3 + 6.4 + 2.4 channels, rounded 20 + 6 + 2: one more
    "three layers": (
        {"a": (1, 1, 24, 8), "b": (1, 1, 64, 8), "c": (1, 1, 203, 8)},
        {"a": 2, "b": 6, "c": 21},
    ),
}


@pytest.mark.parametrize("name", MOVES)
def test_the_cheapest_move_comes_first(name):
    shapes, expected = MOVES[name]
    params = {name: jnp.ones(shape) for name, shape in shapes.items()}
    tx = bsj.hrbp_prune(0.9, group_size=8, block_density=1.0)
    layouts = bsj.get_layouts(jax.eval_shape(tx.init, params))
    assert {name: layout.packed_shape[1] for name, layout in layouts.items()} == expected
    masks = bsj.masks_from_scores(params, 0.9, pattern=bsj.patterns.one_by_n(8))
    assert {name: int(mask[0, 0, :, 0].sum()) for name, mask in masks.items()} == expected


def test_of_two_moves_that_cost_the_same_the_one_that_ends_nearer_comes_first():
    """Both keep 3 of 3.45 channels, together 9 weights too few; a channel of the first has 12
    weights, one of the second 8.
    """
    params = {"first": jnp.ones((1, 1, 69, 12)), "second": jnp.ones((1, 1, 69, 8))}
    tx = bsj.hrbp_prune(0.95, group_size=4, block_density=1.0)
    layouts = bsj.get_layouts(jax.eval_shape(tx.init, params))
    assert [layout.packed_shape[1] for layout in layouts.values()] == [3, 4]


@settings(deadline=None, max_examples=60)
@given(
    st.lists(
        st.tuples(st.sampled_from([1, 3, 5]), st.integers(1, 64), st.integers(1, 64)),
        min_size=1,
        max_size=6,
    ),
    st.floats(0, 0.98),
    st.sampled_from(["erk", "er", "uniform"]),
)
def test_budgets_add_up(sizes, sparsity, budget):
    shapes = {str(i): (k, k, cin, cout) for i, (k, cin, cout) in enumerate(sizes)}
    densities = budgets.layer_densities(budget, shapes, sparsity)
    total = sum(densities[name] * math.prod(shape) for name, shape in shapes.items())
    assert total == pytest.approx(
        (1 - sparsity) * sum(math.prod(s) for s in shapes.values()), rel=1e-6
    )
    assert all(0 < d <= 1 + 1e-9 for d in densities.values())


REFERENCES = {"er": ref.er_densities, "erk": ref.erk_densities}


@pytest.mark.parametrize("budget", REFERENCES)
@settings(deadline=None, max_examples=40)
@given(
    st.lists(
        st.tuples(st.sampled_from([1, 3, 5]), st.integers(2, 64), st.integers(2, 64)),
        min_size=1,
        max_size=6,
    ),
    st.floats(0.02, 0.98),
)
def test_er_and_erk_equal_their_references(budget, sizes, sparsity):
    shapes = [(k, k, cin, cout) for k, cin, cout in sizes]
    densities = budgets.layer_densities(budget, dict(zip("abcdef", shapes)), sparsity)
    expected = REFERENCES[budget](shapes, 1 - sparsity)
    np.testing.assert_allclose(list(densities.values()), expected, rtol=1e-6)


LAYERS = {"large": (3, 3, 32, 64), "pointwise": (1, 1, 64, 64), "small": (3, 3, 8, 16)}


def counts_of_random_masks(budget):
    params = {name: jnp.ones(shape) for name, shape in LAYERS.items()}
    return bsj.random_masks(jax.random.key(0), params, 0.8, budget=budget)


def counts_of_rigl(budget):
    params = {name: jnp.ones(shape) for name, shape in LAYERS.items()}
    return bsj.get_masks(bsj.rigl(0.8, until=9, budget=budget).init(params))


def counts_of_gradual(budget):
    params = {name: jnp.ones(shape) for name, shape in LAYERS.items()}
    tx = bsj.gradual_magnitude(0.8, start=0, end=1, update_every=1, budget=budget)
    state = tx.init(params)
    for _ in range(2):
        _, state = tx.update(params, state, params)
    return bsj.get_masks(state)


def counts_of_one_shot(budget):
    scores = {name: jnp.ones(shape) for name, shape in LAYERS.items()}
    return bsj.masks_from_scores(scores, 0.8, budget=budget)


@pytest.mark.parametrize(
    "masks_of", [counts_of_random_masks, counts_of_rigl, counts_of_gradual, counts_of_one_shot]
)
@pytest.mark.parametrize("budget", ["er", "erk", "uniform", {"small": 0.5}])
def test_the_masks_of_a_method_have_the_counts_of_its_budget(masks_of, budget):
    if budget == "uniform":
        densities = [0.2, 0.2, 0.2]
    elif isinstance(budget, dict):
        densities = [0.2, 0.2, 0.5]
    else:
        densities = REFERENCES[budget](list(LAYERS.values()), 0.2)
    expected = [round(d * math.prod(s)) for d, s in zip(densities, LAYERS.values(), strict=True)]
    masks = masks_of(budget)
    assert [int(np.broadcast_to(masks[n], LAYERS[n]).sum()) for n in LAYERS] == expected


def test_er_is_not_erk_where_kernels_differ_in_size():
    er, erk = (REFERENCES[name](list(LAYERS.values()), 0.2) for name in ("er", "erk"))
    assert er[0] > 1.3 * erk[0]
    assert er[1] < 0.8 * erk[1]


def test_hrbp_shares_its_blocks_by_the_budget():
    """Of whole channels: each layer keeps the budget's density up to a channel and a half."""
    params = {name: jnp.ones(shape) for name, shape in LAYERS.items()}
    for budget in ("er", "erk"):
        tx = bsj.hrbp_prune(0.8, group_size=16, block_density=1.0, budget=budget)
        layouts = bsj.get_layouts(jax.eval_shape(tx.init, params))
        densities = REFERENCES[budget](list(LAYERS.values()), 0.2)
        for layout, density in zip(layouts.values(), densities, strict=True):
            assert abs(layout.density - density) < 1.5 / layout.shape[2], budget
        assert bsj.get_spec(jax.eval_shape(tx.init, params)).density == pytest.approx(0.2)


def test_erk_is_proportional_below_one():
    shapes = {"a": (3, 3, 32, 64), "b": (3, 3, 64, 64), "c": (1, 1, 64, 128)}
    densities = budgets.layer_densities("erk", shapes, 0.9)
    eps = [densities[n] * math.prod(s) / sum(s) for n, s in shapes.items() if densities[n] < 1]
    np.testing.assert_allclose(eps, eps[0])


def test_a_map_names_layers_and_the_rest_take_the_sparsity():
    shapes = {"a": (3, 3, 8, 8), "b": (3, 3, 8, 8)}
    assert budgets.layer_densities({"a": 0.25}, shapes, 0.9) == {"a": 0.75, "b": pytest.approx(0.1)}


def test_counts_are_rounded_and_never_zero():
    assert whole_counts.weight_counts({"a": 0.1, "b": 1e-9}, {"a": (3, 3, 4, 4), "b": (5,)}) == {
        "a": 14,
        "b": 1,
    }
