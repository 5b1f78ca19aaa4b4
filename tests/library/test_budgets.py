"""Budgets: shares that add up, and whole block counts that reach the target."""

import math
import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

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
