"""Rounds of lottery tickets: exact counts, what is pruned stays pruned, and the search resumes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import references as ref

import blocksparse_jax as bsj
from blocksparse_jax import patterns

SPARSITY = 0.8
ROUNDS = bsj.lottery_sparsities(SPARSITY)
# name -> weights after a round: random, few values, all equal, zeros
TRAINED = {
    "random": lambda rng, shape: rng.normal(size=shape),
    "ties": lambda rng, shape: rng.integers(-1, 2, shape),
    "equal": lambda rng, shape: np.ones(shape),
    "zeros": lambda rng, shape: np.zeros(shape),
}
# So few weights cannot have every density.
pytestmark = pytest.mark.filterwarnings("ignore:sparsity. density .* cannot be reached")
SHAPES = {"a": (1, 1, 8, 16), "b": (3, 3, 8, 16)}


@pytest.mark.parametrize("kind", TRAINED)
def test_each_round_is_the_reference(kind):
    """The largest `|w|` of what is left, through all layers; an empty layer keeps one weight."""
    rng, masks = np.random.default_rng(1), None
    kept = {name: np.ones(shape, bool) for name, shape in SHAPES.items()}
    size = sum(mask.size for mask in kept.values())
    for sparsity in ROUNDS:
        weights = {n: TRAINED[kind](rng, shape) * kept[n] for n, shape in SHAPES.items()}
        masks = bsj.lottery_ticket(jax.tree.map(jnp.float32, weights), masks, sparsity)
        scores = {n: np.where(kept[n], np.abs(w), -1.0) for n, w in weights.items()}
        new = ref.global_masks(scores, round((1 - sparsity) * size))
        for name, mask in masks.items():
            np.testing.assert_array_equal(mask, new[name])
            assert not (new[name] & ~kept[name]).any()
        kept = new
    assert sum(mask.sum() for mask in kept.values()) == round((1 - SPARSITY) * size)


def test_a_round_prunes_a_fifth_of_what_is_left():
    left = 1 - np.array([0.0, *ROUNDS])
    np.testing.assert_allclose(left[1:-1] / left[:-2], 0.8)
    assert 0.8 <= left[-1] / left[-2] < 1
    assert ROUNDS[-1] == SPARSITY
    np.testing.assert_allclose(bsj.lottery_sparsities(1 - 0.8**5), 1 - 0.8 ** np.arange(1, 6))


@pytest.mark.parametrize(
    ("pattern", "budget"),
    [
        (patterns.one_by_n(8), "global"),
        (patterns.channel("input"), "erk"),
        pytest.param(patterns.kernel(), "uniform", marks=pytest.mark.slow),
        pytest.param(patterns.window(), "global", marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_rounds_of_other_patterns_are_nested(pattern, budget):
    key, masks = jax.random.key(2), None
    for sparsity in (0.3, 0.5, 0.75):
        key, new = jax.random.split(key)
        weights = {"b": jax.random.normal(new, SHAPES["b"]), "c": jnp.ones((3, 3, 16, 16))}
        after = bsj.lottery_ticket(weights, masks, sparsity, pattern=pattern, budget=budget)
        if masks is not None:
            for name in weights:
                assert not np.any(np.asarray(after[name] & ~masks[name]))
        masks = after
    assert np.mean([float(mask.mean()) for mask in masks.values()]) == pytest.approx(0.25, abs=0.09)


def test_the_search_of_the_docstring_resumes():
    """Any training will do; the masks and the number of rounds are all there is to keep."""
    early = {name: jax.random.normal(jax.random.key(3), shape) for name, shape in SHAPES.items()}

    def train(params, masks):
        moved = jax.tree.map(lambda w: w + jnp.sin(9 * w + 1e4 * jnp.mean(w)), params)
        return moved if masks is None else bsj.apply_masks(moved, masks)

    def search(masks, sparsities):
        for sparsity in sparsities:
            params = early if masks is None else bsj.apply_masks(early, masks)
            masks = bsj.lottery_ticket(train(params, masks), masks, sparsity)
        return masks

    whole = search(None, ROUNDS)
    halves = search(search(None, ROUNDS[:3]), ROUNDS[3:])
    jax.tree.map(np.testing.assert_array_equal, halves, whole)
    one_shot = bsj.lottery_ticket(train(early, None), None, SPARSITY)
    assert any(bool((one_shot[name] != whole[name]).any()) for name in whole)


def test_what_has_no_rounds_is_refused():
    params = {"b": jnp.ones(SHAPES["b"])}
    with pytest.raises(ValueError, match=r"pattern: .* groups the filters anew at each draw"):
        bsj.lottery_ticket(params, None, 0.5, pattern=patterns.block(16))
    with pytest.raises(ValueError, match=r"pattern: .* fixes its density"):
        bsj.lottery_ticket(params, None, 0.5, pattern=patterns.n_of_m(2, 4))
    with pytest.raises(ValueError, match="masks: expected the tree structure of params"):
        bsj.lottery_ticket(params, {"x": jnp.ones(3, bool)}, 0.5)
    with pytest.raises(ValueError, match="prune_fraction"):
        bsj.lottery_sparsities(0.5, 0.0)
