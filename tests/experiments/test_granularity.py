"""Magnitude pruning by granularity: the sets that go together, by their summed magnitude."""

import jax
import numpy as np
import pytest
import references as ref

import blocksparse_jax as bsj
from experiments.training import methods

SHAPE = (3, 2, 8, 10)
AXES = {"weight": (), "vector": (1,), "kernel": (0, 1), "filter": (0, 1, 2)}


@pytest.mark.parametrize("granularity", AXES)
def test_sets_of_the_smallest_sum_go(granularity):
    """Mao et al.: single weights, rows of a kernel slice, kernel slices, filters."""
    weights = jax.random.normal(jax.random.key(0), SHAPE)
    mask = bsj.get_masks(bsj.magnitude(0.6, granularity=granularity).init({"w": weights}))["w"]
    sums = np.abs(np.asarray(weights, np.float64)).sum(AXES[granularity], keepdims=True)
    expected = np.broadcast_to(ref.largest(sums, round(0.4 * sums.size)), SHAPE)
    np.testing.assert_array_equal(mask, expected)
    options = methods.Magnitude(granularity=granularity)
    assert (
        options.make_pattern()
        == bsj.get_spec(bsj.magnitude(0.6, granularity=granularity).init({"w": weights})).pattern
    )


def test_a_granularity_is_a_pattern_of_its_own():
    with pytest.raises(ValueError, match="granularity: 'filter' is a pattern of its own"):
        bsj.magnitude(0.5, granularity="filter", pattern=bsj.patterns.kernel())
    with pytest.raises(ValueError, match="granularity: 'filter' is a pattern of its own"):
        methods.Magnitude(granularity="filter", pattern="kernel").check()
    with pytest.raises(ValueError, match=r"granularity: expected one of.*did you mean 'filter'"):
        bsj.magnitude(0.5, granularity="filters")
    with pytest.raises(ValueError, match=r"granularity: expected one of.*did you mean 'filter'"):
        methods.Magnitude(granularity="filters").check()
