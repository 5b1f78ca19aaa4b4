"""Patterns: the masks of every pattern equal plain NumPy over random and adversarial scores."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import references as ref
from hypothesis import given, settings
from hypothesis import strategies as st

import blocksparse_jax as bsj
from blocksparse_jax import counts
from blocksparse_jax import patterns as P

few = settings(max_examples=10, deadline=None)
SHAPES = [(3, 3, 8, 16), (1, 1, 12, 8), (2, 3, 4, 6)]
KINDS = ["random", "ties", "equal", "zeros", "one channel"]


def scores_of(kind, shape, seed):
    rng = np.random.default_rng(seed)
    if kind == "random":
        return rng.random(shape).astype(np.float32)
    if kind == "ties":
        return rng.integers(0, 3, shape).astype(np.float32)
    if kind == "one channel":
        scores = np.zeros(shape, np.float32)
        scores[:, :, rng.integers(shape[2])] = rng.random(shape[:2] + shape[3:])
        return scores
    return np.full(shape, 0.0 if kind == "zeros" else 0.5, np.float32)


def masks_of(scores, sparsity, pattern, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # a density that whole sets cannot reach
        masks = bsj.masks_from_scores(
            {"conv": jnp.asarray(scores), "bias": jnp.ones(3)},
            sparsity,
            pattern=pattern,
            where=lambda name, leaf: name == "conv",
            **options,
        )
    assert bool(masks["bias"])
    assert masks["bias"].ndim == 0
    return np.asarray(masks["conv"])


drawn = {
    "shape": st.sampled_from(SHAPES),
    "kind": st.sampled_from(KINDS),
    "sparsity": st.sampled_from([0.0, 0.3, 0.5, 0.8, 0.99]),
    "seed": st.integers(0, 99),
}


@few
@given(**drawn)
def test_single_weights(shape, kind, sparsity, seed):
    scores = scores_of(kind, shape, seed)
    count = max(1, round((1 - sparsity) * scores.size))
    np.testing.assert_array_equal(
        masks_of(scores, sparsity, P.unstructured()), ref.largest(scores, count)
    )


@few
@given(**drawn, reduce=st.sampled_from(["sum", "mean", "max"]))
def test_kernel_slices(shape, kind, sparsity, seed, reduce):
    scores = scores_of(kind, shape, seed)
    slices = np.asarray(getattr(jnp, reduce)(scores, axis=(0, 1)))  # sums in jax's own order
    count = max(1, round((1 - sparsity) * slices.size))
    expected = np.broadcast_to(ref.largest(slices, count), shape)
    np.testing.assert_array_equal(masks_of(scores, sparsity, P.kernel(reduce)), expected)


@few
@given(**drawn)
def test_vectors(shape, kind, sparsity, seed):
    scores = scores_of(kind, shape, seed)
    rows = np.asarray(jnp.sum(scores, axis=1, keepdims=True))
    count = max(1, round((1 - sparsity) * rows.size))
    expected = np.broadcast_to(ref.largest(rows, count), shape)
    np.testing.assert_array_equal(masks_of(scores, sparsity, P.vector()), expected)


@few
@given(**drawn)
def test_windows(shape, kind, sparsity, seed):
    scores = scores_of(kind, shape, seed)
    kh, kw, cin, cout = shape
    count = max(1, round((1 - sparsity) * kh * kw))
    expected = np.zeros(shape, bool)
    for c in range(cin):
        for f in range(cout):
            expected[:, :, c, f] = ref.largest(scores[:, :, c, f], count)
    np.testing.assert_array_equal(masks_of(scores, sparsity, P.window()), expected)


@few
@given(**drawn, n=st.sampled_from([2, 4, 5]))
def test_one_by_n_blocks(shape, kind, sparsity, seed, n):
    scores = scores_of(kind, shape, seed)
    kh, kw, cin, cout = shape
    size = ref.subp_block(cout, n)
    count = max(1, round((1 - sparsity) * cin))
    mask = masks_of(scores, sparsity, P.one_by_n(n))
    blocks = np.asarray(P.one_by_n(n).sets(jnp.asarray(scores), bsj.Dense()))
    np.testing.assert_allclose(blocks, ref.subp_scores(scores, 1, size, "l1"), rtol=1e-5)
    for group in range(cout // size):
        kept = ref.largest(blocks[group], count)
        expected = np.broadcast_to(kept[None, None, :, None], (kh, kw, cin, size))
        np.testing.assert_array_equal(mask[..., group * size : (group + 1) * size], expected)


@few
@given(**drawn, side=st.sampled_from(["input", "output"]))
def test_channels(shape, kind, sparsity, seed, side):
    scores = scores_of(kind, shape, seed)
    axes = (0, 1, 3) if side == "input" else (0, 1, 2)
    channels = np.asarray(jnp.sum(jnp.asarray(scores), axis=axes))
    kept = ref.largest(channels, max(1, round((1 - sparsity) * len(channels))))
    expected = np.broadcast_to(kept[:, None] if side == "input" else kept, shape)
    np.testing.assert_array_equal(masks_of(scores, sparsity, P.channel(side)), expected)


@few
@given(
    shape=st.sampled_from([(3, 3, 8, 4), (1, 1, 16, 3)]),
    kind=st.sampled_from(KINDS),
    seed=st.integers(0, 99),
    axis=st.sampled_from(["input", "kernel"]),
    n=st.integers(1, 4),
)
def test_n_of_m(shape, kind, seed, axis, n):
    scores = scores_of(kind, shape, seed)
    mask = masks_of(scores, None, P.n_of_m(n, 4, axis))
    np.testing.assert_array_equal(mask, ref.n_m_mask(scores, n, 4, axis))


def test_n_of_m_says_that_it_fixes_the_sparsity():
    scores = {"conv": jnp.ones((1, 1, 8, 8))}
    with pytest.warns(UserWarning, match=r"sparsity: 2 of 4 weights are 0\.5 by themselves"):
        masks = bsj.masks_from_scores(scores, 0.9, pattern=P.n_of_m(2, 4))
    assert masks["conv"].mean() == 0.5
    with pytest.raises(ValueError, match="budget: 'global' lets counts differ by layer"):
        bsj.masks_from_scores(scores, 0.5, pattern=P.n_of_m(2, 4), budget="global")


def test_every_pattern_has_an_inverse_and_runs_in_jit():
    """`kept_sets` reads back what `mask` wrote, and a traced call gives the same mask."""
    scores = scores_of("random", (3, 3, 16, 32), 0)
    for pattern in (
        P.unstructured(),
        P.kernel(),
        P.window(),
        P.vector(),
        P.n_of_m(2, 4),
        P.one_by_n(8),
        P.channel("input"),
        P.channel("output"),
    ):
        sparsity = 1 - pattern.density if pattern.density else 2 / 3
        mask = masks_of(scores, sparsity, pattern)
        kept = pattern.kept_sets(jnp.asarray(mask), bsj.Dense())
        np.testing.assert_array_equal(pattern.mask(kept, mask.shape), mask)
        units = pattern.units(mask.shape)
        assert kept.shape == (units.rows, units.sets)
        assert units.rows * units.sets * units.weights == mask.size
        assert len(set(kept.sum(1).tolist())) == 1, "every row keeps as many"

        @jax.jit
        def jitted(scores, pattern=pattern, sparsity=sparsity):
            return bsj.masks_from_scores({"conv": scores}, sparsity, pattern=pattern)["conv"]

        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            np.testing.assert_array_equal(jitted(jnp.asarray(scores)), mask)


@pytest.mark.parametrize(
    "pattern", [P.one_by_n(8), P.channel("input"), P.block(group_size=8)], ids=lambda p: p.noun
)
def test_layouts_stand_for_the_masks(pattern):
    scores = {"conv": jnp.asarray(scores_of("random", (3, 3, 16, 32), 1)), "bias": jnp.ones(32)}
    layouts = bsj.layouts_from_scores(scores, 0.75, pattern=pattern)
    masks = bsj.masks_from_scores(scores, 0.75, pattern=pattern)
    bsj.validate(layouts["conv"])
    np.testing.assert_array_equal(bsj.layout_to_mask(layouts["conv"]), masks["conv"])
    assert layouts["bias"] == bsj.Dense()
    state = bsj.fixed_masks(layouts=layouts).init(scores)
    np.testing.assert_array_equal(bsj.get_masks(state)["conv"], masks["conv"])


@pytest.mark.parametrize("pattern", [None, P.unstructured(), P.kernel(), P.channel("output")])
def test_a_pattern_without_a_layout_says_so(pattern):
    with pytest.raises(ValueError, match=r"pattern: .* has no block layout, expected patterns"):
        bsj.layouts_from_scores({"conv": jnp.ones((3, 3, 8, 8))}, 0.5, pattern=pattern)


# One threshold through all layers


def two_layers(seed):
    rng = np.random.default_rng(seed)
    return {
        "a": rng.random((3, 3, 8, 8)).astype(np.float32) ** 4,
        "b": rng.random((1, 1, 16, 32)).astype(np.float32),
    }


def test_a_global_threshold_over_single_weights():
    scores = two_layers(0)
    masks = bsj.masks_from_scores(jax.tree.map(jnp.asarray, scores), 0.9, budget="global")
    flat = np.concatenate([scores["a"].ravel(), scores["b"].ravel()])
    expected = ref.largest(flat, round(0.1 * flat.size))
    kept = np.concatenate([np.asarray(masks[name]).ravel() for name in scores])
    np.testing.assert_array_equal(kept, expected)
    assert masks["a"].mean() < masks["b"].mean() / 2, "layers of low scores keep less"


def test_a_global_threshold_over_sets_of_different_sizes():
    """Kernel slices of 9 weights and of 1: they are taken in the order of their scores."""
    scores = two_layers(1)
    pattern = P.kernel("max")
    masks = bsj.masks_from_scores(
        jax.tree.map(jnp.asarray, scores), 0.8, pattern=pattern, budget="global"
    )
    sets = [(s, 9) for s in scores["a"].max((0, 1)).ravel()]
    sets += [(s, 1) for s in scores["b"].max((0, 1)).ravel()]
    order = sorted(range(len(sets)), key=lambda i: -sets[i][0])
    total, kept = 0, set()
    for i in order:
        total += sets[i][1]
        if total - sets[i][1] / 2 <= 0.2 * (scores["a"].size + scores["b"].size):
            kept.add(i)
    expected = np.array([i in kept for i in range(len(sets))])
    got = np.concatenate([np.asarray(masks[name]).any((0, 1)).ravel() for name in scores])
    np.testing.assert_array_equal(got, expected)
    reached = sum(int(mask.sum()) for mask in masks.values())
    assert abs(reached / sum(s.size for s in scores.values()) - 0.2) < 0.01


@pytest.mark.parametrize("pattern", [P.one_by_n(8), P.window(), P.channel("input")])
@pytest.mark.filterwarnings("ignore:sparsity")
def test_a_global_threshold_keeps_rows_uniform(pattern):
    scores = jax.tree.map(jnp.asarray, two_layers(2))
    masks = bsj.masks_from_scores(scores, 0.6, pattern=pattern, budget="global")
    for name, mask in masks.items():
        kept = pattern.kept_sets(mask, bsj.Dense())
        assert len(set(kept.sum(1).tolist())) == 1, name
    assert masks["a"].mean() < masks["b"].mean()


def test_a_global_threshold_shares_the_density_among_blocks():
    scores = jax.tree.map(jnp.asarray, two_layers(3))
    pattern = P.block(group_size=8, block_density=1.0)
    layouts = bsj.layouts_from_scores(scores, 0.7, pattern=pattern, budget="global")
    flat = np.concatenate([np.asarray(s).ravel() for s in scores.values()])
    kept = ref.largest(flat, round(0.3 * flat.size))
    densities = kept[: scores["a"].size].mean(), kept[scores["a"].size :].mean()
    for layout, density in zip(layouts.values(), densities, strict=True):
        assert layout.density == pytest.approx(density, abs=0.1)
    with pytest.raises(ValueError, match=r"budget: 'global' reads the scores of 'a' on the host"):
        jax.jit(lambda s: bsj.masks_from_scores(s, 0.7, pattern=pattern, budget="global"))(scores)


def widening(factor):
    """Three layers of 16, 32 and 64 filters, the scores of the first multiplied by a factor."""
    rng = np.random.default_rng(4)
    scores = [rng.random((3, 3, 16, 16 * 2**i)).astype(np.float32) for i in range(3)]
    return {"a": factor * scores[0], "b": scores[1], "c": scores[2]}


@pytest.mark.parametrize(
    ("pattern", "reached"), [(P.one_by_n(16), 11 / 112), (P.kernel(), 179 / 1792)], ids=str
)
def test_a_global_threshold_meets_its_density_though_each_layer_keeps_a_set(pattern, reached):
    masks = bsj.masks_from_scores(widening(10), 0.9, pattern=pattern, budget="global")
    kept = [int(mask.sum()) for mask in masks.values()]
    assert sum(kept) / sum(mask.size for mask in masks.values()) == pytest.approx(reached)
    assert kept[0] == max(kept)
    assert min(kept) > 0


def test_a_global_threshold_that_cannot_meet_its_density_says_so():
    with pytest.warns(UserWarning, match=r"density 0\.1000 cannot be reached by one threshold thr"):
        masks = bsj.masks_from_scores(widening(10), 0.9, pattern=P.window(), budget="global")
    assert [float(mask.mean()) for mask in masks.values()] == [pytest.approx(1 / 9)] * 3


@pytest.mark.parametrize("pattern", [P.unstructured(), P.channel("input")], ids=str)
def test_a_global_threshold_empties_no_layer(pattern):
    masks = bsj.masks_from_scores(widening(1e6), 0.9, pattern=pattern, budget="global")
    kept = [int(pattern.kept_sets(mask, bsj.Dense()).sum()) for mask in masks.values()]
    assert kept[1:] == [1, 1]


@pytest.mark.parametrize("pattern", [P.one_by_n(16), P.channel("input"), P.block()], ids=str)
def test_layouts_of_a_global_threshold_are_refused_in_jit(pattern):
    """Their counts are shapes; masks need none."""
    scores = two_layers(3)
    message = "budget: 'global' reads the scores of 'a' on the host"
    with pytest.raises(ValueError, match=message):
        jax.jit(lambda s: bsj.layouts_from_scores(s, 0.9, pattern=pattern, budget="global"))(scores)
    for method in (
        bsj.one_shot(0.9, pattern=pattern, budget="global"),
        bsj.drop_and_grow(
            0.9, pattern=pattern, budget="global", scores="magnitude", schedule=bsj.every(1)
        ),
    ):
        with pytest.raises(ValueError, match=message):
            jax.eval_shape(method.init, scores)


# Counts


def test_set_counts_approach_the_target_by_the_cheapest_moves():
    """Two layers of 8-weight and 80-weight steps: the small one moves to meet the total."""
    units = {"small": counts.Units(1, 100, 8), "large": counts.Units(1, 10, 80)}
    kept = counts.set_counts({"small": 0.25, "large": 0.25}, units)
    total = kept["small"] * 8 + kept["large"] * 80
    assert abs(total - 0.25 * 1600) <= 4
    assert kept["large"] in (2, 3)


def test_a_window_of_a_pointwise_kernel_stays_dense_and_says_so():
    scores = {"a": jnp.ones((3, 3, 8, 8)), "b": jnp.ones((1, 1, 8, 64))}
    with pytest.warns(UserWarning, match="cannot be reached by whole sets"):
        masks = bsj.masks_from_scores(scores, 2 / 3, pattern=P.window())
    assert masks["b"].all()
    assert (masks["a"].sum((0, 1)) == 3).all(), "the other layer does not make up for it"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: P.one_by_n(0), "n: expected an integer of at least 1, got 0"),
        (lambda: P.n_of_m(5, 4), "n: expected at most m=4, got 5"),
        (lambda: P.channel("inputs"), "did you mean 'input'"),
        (lambda: P.kernel("median"), "reduce: expected one of 'sum', 'mean', 'max'"),
        (lambda: P.block(block_density=0.0), "block_density: expected a number in"),
        (lambda: bsj.one_shot(0.5, pattern="block"), "pattern: expected a pattern such as"),
    ],
)
def test_bad_patterns(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_leaf_that_the_pattern_cannot_divide_is_named():
    scores = {"conv": jnp.ones((3, 3, 6, 8)), "sequence": jnp.ones((5, 8, 4))}
    with pytest.raises(ValueError, match=r"scores\['conv'\]: m: 4 does not divide the input axis"):
        bsj.masks_from_scores(scores, None, pattern=P.n_of_m(2, 4))
    with pytest.raises(ValueError, match=r"scores\['sequence'\]: expected a conv kernel"):
        bsj.masks_from_scores(scores, 0.5, pattern=P.kernel(), where=lambda name, leaf: True)
