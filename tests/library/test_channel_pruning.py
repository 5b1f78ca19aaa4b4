"""Channels of trained networks: every rule equals plain NumPy, and mended networks are closer to
the original.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import references as ref
from flax import linen as nn

import blocksparse_jax as bsj
from blocksparse_jax.channel_pruning.inputs import problem

SPACES = {"hidden": [("first", 3), ("second", 2)]}


def drawn(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


def two_convs(channels, seed=0):
    return {
        "first": jnp.asarray(drawn(3, 3, 4, channels, seed=seed), jnp.float32),
        "second": jnp.asarray(drawn(3, 3, channels, 5, seed=seed + 1), jnp.float32),
    }


def activations(channels, seed=2, images=3):
    return jnp.asarray(np.maximum(drawn(images, 6, 5, channels, seed=seed), 0), jnp.float32)


def problem_of(params, x, **options):
    return problem("second", params["second"], bsj.LayerInput(x, **options), 10_000, [0, 0])


# Counts and masks


@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.75, 0.99])
def test_counts_come_as_close_to_the_sparsity_as_whole_channels_can(sparsity):
    params = {"a": jnp.ones((3, 3, 8, 16)), "b": jnp.ones((3, 3, 16, 8)), "c": jnp.ones((8, 4))}
    spaces = {
        "in": [("a", 2)],
        "mid": [("a", 3), ("b", 2), ("norm", 0)],
        "out": [("b", 3), ("c", 0)],
    }
    counts = bsj.channel_counts(params, spaces, sparsity, where=lambda name, leaf: True)

    def weights(i, m, o):
        return 9 * i * m + 9 * m * o + 4 * o

    alike = [tuple(max(1, round(f * size)) for size in (8, 16, 8)) for f in np.linspace(0, 1, 9999)]
    target = (1 - sparsity) * weights(8, 16, 8)
    assert abs(weights(*counts.values()) - target) == min(abs(weights(*c) - target) for c in alike)


def test_masks_take_filters_and_the_weights_that_read_them():
    params = {
        "first": jnp.ones((3, 3, 4, 6)),
        "second": jnp.ones((3, 3, 6, 5)),
        "bias": jnp.ones(6),
    }
    kept = np.array([True, False, True, True, False, False])
    masks = bsj.channel_masks(params, SPACES, {"hidden": kept})
    np.testing.assert_array_equal(masks["first"], np.broadcast_to(kept, (3, 3, 4, 6)))
    np.testing.assert_array_equal(masks["second"], np.broadcast_to(kept[:, None], (3, 3, 6, 5)))
    assert masks["bias"].ndim == 0


# L1


@pytest.mark.parametrize("kind", ["random", "ties", "zeros", "one channel"])
@pytest.mark.parametrize("count", [1, 4, 6])
def test_l1_filters(kind, count):
    params = two_convs(6) | {"shortcut": jnp.asarray(drawn(1, 1, 4, 6, seed=9), jnp.float32)}
    if kind == "ties":
        params = jax.tree.map(lambda w: jnp.sign(w) * (jnp.arange(w.shape[-1]) // 2 + 1), params)
    elif kind == "zeros":
        params = jax.tree.map(jnp.zeros_like, params)
    elif kind == "one channel":
        params = jax.tree.map(lambda w: w * (jnp.arange(w.shape[-1]) == 4), params)
    spaces = {"hidden": [*SPACES["hidden"], ("shortcut", 3)]}
    kept = bsj.l1_filters(params, spaces, {"hidden": count})["hidden"]
    expected = ref.l1_kept([np.asarray(params[n], float) for n in ("first", "shortcut")], count)
    np.testing.assert_array_equal(kept, expected)


# What layers read


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"strides": 2, "padding": 1},
        {"strides": (1, 3), "padding": "VALID"},
        {"dilation": 2, "padding": ((0, 1), (2, 0))},
    ],
    ids=str,
)
def test_the_problem_is_the_convolution(options):
    params, x = two_convs(6), activations(6)
    y = bsj.conv(x, params["second"], bsj.Dense(), **options)
    one = problem_of(params, x, **options)
    assert len(one.targets) == y[..., 0].size  # every position once, in any order
    np.testing.assert_allclose(
        np.sort(one.targets, axis=0), np.sort(y.reshape(-1, 5), axis=0), atol=1e-4
    )
    z = ref.contributions(one.patches, one.kernel)
    gram, with_targets = one.normal_equations()
    np.testing.assert_allclose(gram, np.einsum("scf,sdf->cd", z, z), atol=1e-8)
    np.testing.assert_allclose(with_targets, np.einsum("scf,sf->c", z, one.targets), atol=1e-8)


def test_captured_inputs_are_what_layers_read():
    """In both formats; grouped convolutions are left out, and a second call is added."""

    class Network(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.relu(nn.Conv(8, (3, 3), strides=2, name="a")(x))
            x = nn.Conv(8, (1, 1), feature_group_count=8, name="grouped")(x)
            x = bsj.linen.BlockSparseConv(8, 3, padding=[1, 1], data_format="CHWN", name="b")(
                x.transpose(3, 1, 2, 0)
            ).transpose(3, 1, 2, 0)
            dense = nn.Dense(8, name="c")
            return dense(dense(x.mean((1, 2))))

    x = jnp.asarray(drawn(2, 8, 8, 3), jnp.float32)
    shapes = jax.eval_shape(Network().init, jax.random.key(1), x)
    variables = jax.tree.map(lambda leaf: jnp.asarray(drawn(*leaf.shape), jnp.float32), shapes)
    capture = jax.jit(lambda v, x: bsj.linen.capture_inputs(Network(), v, x))
    captured = capture(variables, x)
    assert sorted(captured) == ["a/kernel", "b/kernel", "c/kernel"]
    assert captured["a/kernel"].strides == 2
    np.testing.assert_array_equal(captured["a/kernel"].x, x)
    assert captured["b/kernel"].padding == (1, 1)
    assert captured["b/kernel"].x.shape == (2, 4, 4, 8)
    assert captured["c/kernel"].x.shape == (4, 8)
    means = captured["c/kernel"].x[:2]
    after = means @ variables["params"]["c"]["kernel"] + variables["params"]["c"]["bias"]
    np.testing.assert_allclose(captured["c/kernel"].x[2:], after, rtol=1e-4, atol=1e-4)


# ThiNet


def adversarial(kind, channels=7):
    params, x = two_convs(channels), activations(channels)
    if kind == "ties":  # each channel twice
        x = x[..., jnp.arange(channels) // 2]
        params["second"] = params["second"][:, :, jnp.arange(channels) // 2]
    elif kind == "silent":  # channels that are never on
        x = x * (jnp.arange(channels) % 3 > 0)
    elif kind == "zeros":
        x = jnp.zeros_like(x)
    return params, x


@pytest.mark.parametrize("kind", ["random", "ties", "silent", "zeros"])
@pytest.mark.parametrize("count", [1, 3, 7])
def test_thinet(kind, count):
    params, x = adversarial(kind)
    one = problem_of(params, x)
    z = ref.contributions(one.patches, one.kernel)
    kept, fitted = bsj.thinet(
        params, SPACES, {"hidden": count}, {"second": bsj.LayerInput(x)}, samples=10_000
    )
    expected = ref.thinet_kept(z, one.targets, count)
    np.testing.assert_array_equal(kept["hidden"], expected)
    assert not np.any(np.asarray(fitted["second"])[:, :, ~expected])
    np.testing.assert_array_equal(fitted["first"], params["first"])
    heard = expected & (np.abs(z).sum((0, 2)) > 0)
    if kind == "random":  # the factors of equal channels are free
        factors = ref.thinet_factors(z, one.targets, expected)
        rescaled = np.asarray(params["second"])[:, :, expected] * factors[:, None]
        np.testing.assert_allclose(fitted["second"][:, :, expected], rescaled, atol=1e-4)
    silent = expected & ~heard  # nothing is known of them: their weights stay
    if kind in ("silent", "zeros"):
        np.testing.assert_allclose(
            fitted["second"][:, :, silent], params["second"][:, :, silent], atol=1e-5
        )


def test_thinet_by_hand():
    """y = 2 a + 3 b + c on two samples where b = -c / 3: removing these two changes nothing."""
    weights = {"first": jnp.ones((1, 3)), "second": jnp.array([[2.0], [3.0], [1.0]])}
    x = jnp.array([[1.0, -1.0, 3.0], [2.0, 1.0, -3.0]])
    spaces = {"hidden": [("first", 1), ("second", 0)]}
    kept, fitted = bsj.thinet(weights, spaces, {"hidden": 1}, {"second": bsj.LayerInput(x)})
    # without b or c the error is 9 + 9, without a it is 4 + 16: the higher of b and c goes first
    assert kept["hidden"].tolist() == [True, False, False]
    np.testing.assert_allclose(fitted["second"], [[2.0], [0.0], [0.0]], atol=1e-5)


# The lasso


@pytest.mark.parametrize("kind", ["random", "ties", "silent", "zeros"])
@pytest.mark.parametrize("count", [1, 3, 7])
def test_lasso_channels(kind, count):
    """The count is exact; without ties the channels are those of coordinate descent with a growing
    penalty; the kernel is the least-squares one.
    """
    params, x = adversarial(kind)
    one = problem_of(params, x)
    kept, fitted = bsj.lasso_channels(
        params, SPACES, {"hidden": count}, {"second": bsj.LayerInput(x)}, samples=10_000
    )
    kept, kernel = kept["hidden"], np.asarray(fitted["second"], np.float64)
    assert kept.sum() == count
    assert not kernel[:, :, ~kept].any()
    if kind == "random":
        expected = ref.lasso_kept(ref.contributions(one.patches, one.kernel), one.targets, count)
        np.testing.assert_array_equal(kept, expected)
    rows = one.patches[:, :, kept].reshape(len(one.patches), -1)
    best = np.linalg.lstsq(rows, one.targets, rcond=None)[0]
    given = rows @ kernel[:, :, kept].reshape(rows.shape[1], -1)
    np.testing.assert_allclose(given, rows @ best, atol=1e-3)


def test_too_few_samples_leave_the_weights_near_the_old_ones():
    params, x = adversarial("random")
    given = {"second": bsj.LayerInput(x)}
    _, fitted = bsj.lasso_channels(params, SPACES, {"hidden": 7}, given, samples=5)
    np.testing.assert_allclose(fitted["second"], params["second"], atol=1e-4)


# PFA


def responses(*columns):
    return {"second": bsj.LayerInput(jnp.asarray(np.stack(columns, -1), jnp.float32))}


DENSE = {"first": jnp.ones((1, 4)), "second": jnp.ones((4, 1))}
DENSE_SPACES = {"hidden": [("first", 1), ("second", 0)]}


def test_pfa_by_hand():
    """Two equal channels, one apart from them, and one that never changes."""
    a, b, constant = np.array([1.0, -1, 1, -1]), np.array([1.0, 1, -1, -1]), np.ones(4)
    given = responses(a, b, a, constant)  # eigenvalues 2, 1, 0, 0
    energies = {0.5: 1, 2 / 3: 1, 0.7: 2, 1.0: 2}
    for energy, count in energies.items():
        kept = bsj.pfa(DENSE, DENSE_SPACES, given, energy=energy)["hidden"]
        assert kept.sum() == count, energy
    assert kept.tolist() == [True, True, False, False]  # of the equal ones the higher goes
    # shares 2/3 and 1/3 of 4: KL = log 4 - 0.6365, so that 4 * 0.6365 / log 4 = 1.84 stay
    assert bsj.pfa(DENSE, DENSE_SPACES, given)["hidden"].tolist() == [True, True, False, False]


def test_pfa_kl_keeps_all_of_what_is_uncorrelated_and_one_of_what_is_equal():
    apart = np.linalg.qr(drawn(9, 5))[0][:, 1:]
    apart = np.linalg.qr(apart - apart.mean(0))[0]
    kept = bsj.pfa(DENSE, DENSE_SPACES, responses(*apart.T))["hidden"]
    assert kept.all()
    kept = bsj.pfa(DENSE, DENSE_SPACES, responses(*[apart[:, 0]] * 4))["hidden"]
    assert kept.tolist() == [True, False, False, False]


def test_pfa_removes_one_after_the_other_what_correlates_most_with_the_rest():
    x = activations(8, images=40)
    params = two_convs(8)
    kept = bsj.pfa(params, SPACES, {"second": bsj.LayerInput(x)}, energy=0.6)["hidden"]
    seen = np.asarray(x, np.float64).max((1, 2))
    correlation = np.abs(np.corrcoef(seen.T))
    values = np.linalg.eigvalsh(np.cov(seen.T))[::-1]
    count = 1 + (np.cumsum(values) / values.sum() < 0.6).sum()
    left = list(range(8))
    while len(left) > count:
        sums = [correlation[c, left].sum() for c in left]
        left.pop(int(np.argmax(sums)))
    np.testing.assert_array_equal(np.flatnonzero(kept), left)
    assert 1 < count < 8


def test_pfa_by_sparsity_has_one_energy_for_all_spaces():
    """The space whose channels hardly differ loses more."""
    params = {"a": jnp.ones((3, 16)), "b": jnp.ones((16, 16)), "c": jnp.ones((16, 3))}
    spaces = {"one": [("a", 1), ("b", 0)], "two": [("b", 1), ("c", 0)]}
    base, apart = drawn(64, 2), drawn(64, 16, seed=1)
    alike = base @ drawn(2, 16, seed=2) + 0.1 * drawn(64, 16, seed=3)
    given = {"b": bsj.LayerInput(jnp.asarray(alike)), "c": bsj.LayerInput(jnp.asarray(apart))}
    kept = bsj.pfa(params, spaces, given, sparsity=0.75, where=lambda name, leaf: True)
    one, two = kept["one"].sum(), kept["two"].sum()
    assert one < two
    assert (3 * one + one * two + 3 * two) / 352 == pytest.approx(0.25, abs=0.05)


def test_pfa_reaches_sizes_beyond_the_rank_of_few_images():
    """Three images have two directions; more channels than these are wanted."""
    params, x = two_convs(12), activations(12, images=3)
    kept = bsj.pfa(params, SPACES, {"second": bsj.LayerInput(x)}, sparsity=0.25)["hidden"]
    assert kept.sum() == 9


# Whole networks


def plain_network(params, images):
    """Two convolutions and a classifier: the logits, and what the last two layers read."""
    x = jax.nn.relu(bsj.conv(images, params["first"], bsj.Dense()))
    inputs = {"second": bsj.LayerInput(x, strides=2)}
    x = jax.nn.relu(bsj.conv(x, params["second"], bsj.Dense(), strides=2)).mean((1, 2))
    return x @ params["last"], inputs | {"last": bsj.LayerInput(x)}


@pytest.mark.parametrize(("rule", "factor"), [(bsj.thinet, 0.9), (bsj.lasso_channels, 0.8)])
def test_a_mended_network_is_closer_to_the_original_than_one_that_is_only_cut(rule, factor):
    """On images that the rules have not seen."""
    shapes = {"first": (3, 3, 3, 12), "second": (3, 3, 12, 12), "last": (12, 4)}
    params = {
        name: jnp.asarray(drawn(*shape, seed=i) / np.sqrt(np.prod(shape[:-1])), jnp.float32)
        for i, (name, shape) in enumerate(shapes.items())
    }
    spaces = {"one": [("first", 3), ("second", 2)], "two": [("second", 3), ("last", 0)]}
    images, new = (jnp.asarray(drawn(32, 8, 8, 3, seed=s), jnp.float32) for s in (5, 6))
    apply = jax.jit(plain_network)
    originals = apply(params, images)[1]
    mended, kept = params, {}
    for space in spaces:  # the second sees what the mended first gives
        inputs = apply(mended, images)[1]
        chosen, mended = rule(mended, spaces, {space: 8}, inputs, originals=originals)
        kept |= chosen
    masks = bsj.channel_masks(params, spaces, kept)
    expected = apply(params, new)[0]
    errors = [
        float(jnp.abs(apply(bsj.apply_masks(weights, masks), new)[0] - expected).mean())
        for weights in (mended, params)
    ]
    assert errors[0] < factor * errors[1], errors


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda p: bsj.channel_counts(p, SPACES, 1.0), "sparsity: expected a number in"),
        (lambda p: bsj.channel_counts(p, {"s": [("x", 0)]}, 0.5), "spaces: expected names of kern"),
        (lambda p: bsj.channel_counts(p, {"s": [("first", 5)]}, 0.5), "axis 5 of 'first' is out"),
        (
            lambda p: bsj.channel_counts(p, {"s": [("first", 2), ("second", 2)]}, 0.5),
            r"axis 2 of 'second' .* has 6 channels, expected 4",
        ),
        (lambda p: bsj.l1_filters(p, SPACES, {"other": 1}), "counts: 'other' is no channel space"),
        (lambda p: bsj.l1_filters(p, SPACES, {"hidden": 0}), "counts.*integer of at least 1"),
        (lambda p: bsj.l1_filters(p, SPACES, {"hidden": 7}), "expected at most the space's 6"),
        (lambda p: bsj.channel_masks(p, SPACES, {"hidden": np.array([1])}), "kept.*bool vector"),
        (lambda p: bsj.thinet(p, SPACES, {"hidden": 2}, {}), "inputs: expected a LayerInput for"),
        (
            lambda p: bsj.thinet(p, SPACES, {"hidden": 2}, {"second": bsj.LayerInput(jnp.ones(5))}),
            r"inputs\['second'\]: expected activations",
        ),
        (lambda p: bsj.pfa(p, SPACES, {}, energy=0.5), "inputs: expected a LayerInput for"),
        (lambda p: bsj.pfa(p, SPACES, {}, energy=0.5, sparsity=0.5), "energy or sparsity"),
    ],
)
def test_bad_arguments(call, message):
    with pytest.raises(ValueError, match=message):
        call(two_convs(6))
