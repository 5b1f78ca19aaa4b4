"""SUBP equals its plain NumPy reference: scores, schedule, counts, gradients and whole runs."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import references as ref
from hypothesis import given, settings
from hypothesis import strategies as st
from subp_runs import channels_of, compiled, conv_kernels, run_subp

import blocksparse_jax as bsj
from blocksparse_jax.schedules import progress
from blocksparse_jax.scores import block_scores
from blocksparse_jax.transforms.subp import soft_blocks

few = settings(max_examples=8, deadline=None)
CRITERIA = ["l1", "l2", "bpar"]


def random_kernel(seed, shape):
    """Weights on a grid, so that sums are exact and many blocks tie."""
    return (np.random.default_rng(seed).integers(-1, 2, shape) / 2).astype(np.float32)


def normal(seed, shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def assert_top(scores, kept, count):
    """`kept` holds the `count` largest of `scores`, exact ties to the lower index; scores equal up
    to rounding may come either way.
    """
    expected = ref.largest(scores, count)
    assert kept.sum() == count
    if (kept != expected).any():
        assert scores[kept].min() > scores[~kept].max() - 1e-5


# scores and the plain top-k


@pytest.mark.parametrize("criterion", CRITERIA)
@pytest.mark.parametrize(
    ("shape", "block"), [((1, 1, 1, 4), 4), ((3, 3, 13, 20), 10), ((2, 3, 16, 6), 1)]
)
def test_block_scores(shape, block, criterion):
    kernel = normal(0, shape) * (np.arange(shape[2]) % 5 != 3)[:, None]  # some channels are zero
    expected = ref.subp_scores(kernel, np.ones(shape, bool), block, criterion, alpha=0.7)
    np.testing.assert_allclose(
        block_scores(kernel, block, criterion, 0.7), expected, rtol=1e-5, atol=1e-6
    )


@few
@given(
    shape=st.sampled_from([(1, 1, 1, 4), (2, 3, 6, 12)]),
    criterion=st.sampled_from(CRITERIA),
    version=st.sampled_from([1, 2]),
    sparsity=st.sampled_from([0.0, 0.6]),
    seed=st.integers(0, 999),
)
def test_masks_before_start_between_and_from_end_on(shape, criterion, version, sparsity, seed):
    """The mask of step t, which the update before it sets: all kept at start; in between the best
    blocks for certain plus exactly the regrown; from end on plain top-k.
    """
    block, cin = 4, shape[2]
    kernels = [random_kernel(seed + t, shape) for t in range(4)]
    options = {
        "block": block,
        "criterion": criterion,
        "schedule": "linear",
        "start": 0,
        "end": 2,
        "version": version,
        "alpha": 0.7,
    }
    masks = list(run_subp(kernels, seed, sparsity=sparsity, **options))
    assert masks[0].all()
    for t in (1, 2, 3):
        element_mask = np.repeat(masks[t - 1], block, axis=0).T[None, None]  # [1, 1, cin, cout]
        scores = ref.subp_scores(kernels[t - 1], element_mask, block, criterion, version, alpha=0.7)
        removed, regrown = ref.subp_counts(sparsity, cin, ref.subp_rho(t, 0, 2, 1, "linear"))
        assert regrown == 0 or t == 1
        for g in range(len(scores)):
            kept = masks[t][g]
            assert kept.sum() == cin - removed + regrown
            if regrown == 0:
                assert_top(scores[g], kept, cin - removed)
                if criterion != "bpar":
                    np.testing.assert_array_equal(kept, ref.largest(scores[g], cin - removed))
            elif criterion != "bpar":
                assert kept[ref.largest(scores[g], cin - removed)].all()


def test_bpar_by_hand():
    """Blocks of 2 filters: two parallel ones, one orthogonal to both, one zero: l/sum(l) = .4 .2 .4
    0, r/sum(r) = .4 .4 .2 and 1.
    """
    kernel = np.zeros((1, 1, 4, 2), np.float32)
    kernel[0, 0, :, :] = [[2, 0], [1, 0], [0, 2], [0, 0]]
    scores = ref.subp_scores(kernel, np.ones_like(kernel), 2, "bpar")
    np.testing.assert_allclose(scores, [[0.0, -0.2, 0.2, -1.0]], atol=1e-12)
    for sparsity, expected in [(0.25, [1, 1, 1, 0]), (0.5, [1, 0, 1, 0]), (0.75, [0, 0, 1, 0])]:
        *_, kept = run_subp(
            [kernel] * 3, sparsity=sparsity, block=2, criterion="bpar", start=0, end=1
        )
        assert kept.astype(int).tolist() == [expected]


@pytest.mark.parametrize("alpha", [0.0, 1.0, 3.0])
def test_alpha_weighs_the_redundancy(alpha):
    """Two long parallel blocks and a short orthogonal one: redundancy decides only when alpha is
    large.
    """
    kernel = np.zeros((1, 1, 3, 2), np.float32)
    kernel[0, 0] = [[3, 0], [2.5, 0], [0, 2]]
    scores = ref.subp_scores(kernel, np.ones_like(kernel), 2, "bpar", alpha=alpha)[0]
    *_, kept = run_subp(
        [kernel] * 3, sparsity=0.4, block=2, criterion="bpar", start=0, end=1, alpha=alpha
    )
    np.testing.assert_array_equal(kept[0], ref.largest(scores, 2))
    assert kept[0].tolist() == ([True, True, False] if alpha == 0 else [True, False, True])


@pytest.mark.parametrize("criterion", CRITERIA)
@pytest.mark.parametrize("value", [0.0, 0.5])
def test_all_equal_weights_keep_the_first_channels(criterion, value):
    kernel = np.full((3, 3, 8, 8), value, np.float32)
    *_, kept = run_subp([kernel] * 3, sparsity=0.5, block=4, criterion=criterion, start=0, end=1)
    assert (kept == [True] * 4 + [False] * 4).all()


def test_version_2_does_not_see_what_it_pruned_and_version_1_does():
    """A pruned block grew under the soft gradient: only version 1 brings it back by its score."""
    first, then = np.ones((1, 1, 4, 1), np.float32), np.ones((1, 1, 4, 1), np.float32)
    first[0, 0, :, 0], then[0, 0, :, 0] = [4, 3, 2, 1], [4, 3, 2, 9]
    for version, expected in [(1, [1, 1, 0, 1]), (2, [1, 1, 1, 0])]:
        *_, kept = run_subp(
            [first] * 3 + [then], sparsity=0.25, block=1, start=0, end=1, version=version
        )
        assert kept.astype(int).tolist() == [expected]


# schedule and counts


FOUR_CURVES = [(curve, 0.6, 20) for curve in ("cubic", "linear", "cos", "exp")]


@pytest.mark.parametrize(
    ("schedule", "sparsity", "cin"),
    [*FOUR_CURVES, ("linear", 0.29, 100), ("cubic", 0.5, 13), ("exp", 0.0, 5), ("cos", 0.9, 1)],
)
@pytest.mark.parametrize(("start", "end"), [(4, 24), (3, 23)])
def test_counts_at_every_step(schedule, sparsity, cin, start, end):
    """Every group keeps `C - floor(P C) + floor((P - P rho) C)` from the first forward pass of an
    epoch on; inside of it nothing moves; rounding errors do not cost a block. Epochs of 2 steps
    begin at even steps, also where pruning starts at an odd one.
    """
    every, cout = 2, 6
    kernel = normal(0, (1, 1, cin, cout))
    options = {"block": 3, "schedule": schedule, "start": start, "end": end, "update_every": every}
    masks = list(run_subp([kernel] * 29, sparsity=sparsity, **options))
    regrown_counts = set()
    for t in range(30):
        if t % every:
            np.testing.assert_array_equal(masks[t], masks[t - 1])
        else:
            removed, regrown = ref.subp_counts(
                sparsity, cin, ref.subp_rho(t, start, end, every, schedule)
            )
            assert (masks[t].sum(1) == cin - removed + regrown).all(), t
            regrown_counts.add(regrown)
    assert masks[start].all()
    assert sparsity * cin < 5 or len(regrown_counts) > 4


def test_the_last_step_of_an_epoch_sets_the_masks_of_the_next_whatever_the_start():
    """Epochs of 3 steps, pruning from step 4 to step 11: steps 6, 9 and 12 begin with new masks."""
    options = {"block": 3, "schedule": "linear", "start": 4, "end": 11, "update_every": 3}
    masks = list(run_subp([normal(t, (1, 1, 16, 6)) for t in range(18)], sparsity=0.5, **options))
    changed = [t for t in range(1, 19) if (masks[t] != masks[t - 1]).any()]
    assert changed == [6, 9, 12]
    init, _ = compiled(sparsity=0.5, **options)
    spec = bsj.get_spec(init(jax.random.key(0), np.ones((1, 1, 16, 6))))
    assert [t for t in range(18) if spec.changes(t)] == [5, 8, 11]
    assert [t for t in range(18) if spec.dense_gradient(t)] == list(range(12))


def test_exp_reaches_its_end_one_epoch_early():
    """`(1 - e^(-i / 20)) / (1 - e^(-(n - 1) / 20))` at the i-th of n = 10 epochs of 3 steps."""
    for epoch in range(12):
        i = min(max(epoch - 1, 0), 9)  # pruning starts with the second epoch
        expected = (1 - np.exp(-0.05 * i)) / (1 - np.exp(-0.05 * 9))
        assert float(progress("exp", 3 * epoch, 3, 33, 3)) == pytest.approx(expected, abs=1e-6)
    assert [float(progress("exp", t, 0, 4, 4)) for t in range(6)] == [0, 0, 0, 0, 1, 1]


def test_floor_of_an_exact_product():
    """0.29 * 100 is 28.999999999999996 in floating point and 29 blocks in the definition."""
    *_, kept = run_subp([normal(0, (1, 1, 100, 2))] * 3, sparsity=0.29, block=2, start=0, end=1)
    assert kept.sum(1).tolist() == [71]


@pytest.mark.parametrize(
    ("sparsity", "cin", "step", "regrown"), [(0.9, 100, 178, 1), (0.6, 300, 175, 5)]
)
def test_float32_does_not_lose_a_block_of_a_wide_layer(sparsity, cin, step, regrown):
    """`P (1 - step / 180) C` is a whole number here, and a bit less in float32."""
    scores = jnp.asarray(normal(0, (3, cin)))
    kept = soft_blocks(jax.random.key(0), scores, sparsity, progress("linear", step, 0, 180))
    assert kept.sum(1).tolist() == [cin - round(sparsity * cin) + regrown] * 3


@pytest.mark.parametrize(("cout", "block", "used"), [(20, 16, 10), (7, 16, 7), (13, 4, 1)])
def test_a_block_that_does_not_divide_falls_to_the_largest_divisor(cout, block, used):
    kernel = normal(0, (3, 3, 8, cout))
    init, update = compiled(sparsity=0.5, block=block, start=0, end=1)
    collapses = pytest.warns(UserWarning, match="block: 'conv' has an axis of 13, .* up to 4 is 1")
    with collapses if used == 1 else contextlib.nullcontext():
        state = init(jax.random.key(0), kernel)
    for _ in range(3):
        state = update(kernel, state)
    layout = bsj.get_layouts(state)["conv"]
    assert layout.filters.tolist() == np.arange(cout).reshape(-1, used).tolist()
    assert layout.packed_shape == (cout // used, 4, 9, used)
    np.testing.assert_array_equal(bsj.layout_to_mask(layout), bsj.get_masks(state)["conv"])
    expected = [
        ref.largest(s, 4) for s in ref.subp_scores(kernel, np.ones_like(kernel), used, "l1")
    ]
    np.testing.assert_array_equal(channels_of(state, used), expected)


def test_the_soft_phase_has_a_layout_of_the_regrown_size():
    kernel = normal(0, (3, 3, 8, 8))
    init, update = compiled(sparsity=0.75, block=4, schedule="linear", start=0, end=4)
    state = init(jax.random.key(0), kernel)
    assert bsj.get_layouts(state)["conv"].packed_shape == (2, 8, 9, 4)
    for kept in (6, 5, 3, 2, 2):  # 8 - 6 + floor(6 (1 - t / 4)) at step t = 1, 2, ...
        state = update(kernel, state)
        layout = bsj.get_layouts(state)["conv"]
        assert layout.packed_shape == (2, kept, 9, 4)
        np.testing.assert_array_equal(bsj.layout_to_mask(layout), bsj.get_masks(state)["conv"])


# gradients and whole runs


@pytest.mark.parametrize("soft", [True, False])
def test_gradients_soft_and_hard(soft):
    kernel, grad = normal(0, (3, 3, 8, 8)), normal(1, (3, 3, 8, 8))
    params, grads = (
        {"conv": kernel, "bias": np.ones(3, np.float32)},
        {"conv": grad, "bias": np.full(3, 2, np.float32)},
    )
    tx = bsj.keep_zeros(
        bsj.subp(0.5, block=4, start=0, end=1, soft=soft, decay=0.3, where=conv_kernels)
    )
    state = tx.init(params)
    update = jax.jit(tx.update)
    for _ in range(3):
        updates, state = update(grads, state, params)
    mask = np.asarray(bsj.get_masks(state)["conv"])
    assert mask.mean() == 0.5
    expected = np.where(mask, grad, -kernel)  # keep_zeros takes pruned weights to zero
    if soft:
        expected = ref.sr_ste_gradient(grad, kernel, mask, 0.3)
    np.testing.assert_allclose(updates["conv"], expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(updates["bias"], grads["bias"])
    if soft:
        forward, pullback = jax.vjp(lambda p: bsj.masked(p, state), params)
        np.testing.assert_array_equal(forward["conv"], kernel * mask)
        np.testing.assert_array_equal(pullback(grads)[0]["conv"], grad)  # straight through


def gumbel(key, step, size):
    """The noise of the masks that step `step` begins with, of a network of one layer."""
    seed = jax.random.bits(key, dtype=jnp.uint32)
    layer = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), step), 0)
    return np.asarray(jax.random.gumbel(layer, (size,)), np.float64)


def authors_mask(weights, mask, options, first, key):
    """The mask of the epoch that begins with step `first`, from the weights as they are then."""
    block, cin = options["block"], weights.shape[2]
    scores = ref.subp_scores(weights, mask, block, options["criterion"], options["version"])
    rho = ref.subp_rho(first, options["start"], options["end"], options["every"], options["curve"])
    removed, regrown = ref.subp_counts(options["sparsity"], cin, rho)
    kept = np.ones(scores.shape, bool)
    noise = gumbel(key, first, scores.size).reshape(scores.shape)
    for row, keeps, draws in zip(scores, kept, noise):
        gone = np.flatnonzero(~ref.largest(row, cin - removed))
        chances = ref.subp_probabilities(row[gone], options["tau"])
        keeps[gone] = ref.largest(np.log(chances) + draws[gone], regrown)
    return np.broadcast_to(np.repeat(kept, block, axis=0).T, weights.shape)


def authors_run(weights, target, curvature, *, epochs, key, options, optimizer):
    """Trains as the authors do: an epoch sets its mask, then runs its steps of SGD. Yields the mask
    of each step and the weights after it.

    The loss is `0.5 sum(curvature (w * mask - target)^2)`. The hard form zeroes what it prunes.
    """
    soft, decay = options["soft"], options["decay"]
    weights, mask, buffer = weights.astype(np.float64), np.ones(weights.shape, bool), 0
    for epoch in range(epochs):
        first = epoch * options["every"]
        mask = authors_mask(weights, mask, options, first, key)
        if not soft:
            weights, buffer = weights * mask, buffer * mask
        for _ in range(options["every"]):
            grad = curvature * (weights * mask - target)
            grad = ref.sr_ste_gradient(grad, weights, mask, decay) if soft else grad * mask
            buffer = optimizer["momentum"] * buffer + grad + optimizer["weight_decay"] * weights
            weights = weights - optimizer["rate"] * buffer
            yield mask, weights


@pytest.mark.parametrize(
    ("soft", "version", "criterion", "curve"),
    [
        (True, 2, "l1", "cubic"),
        (True, 2, "l2", "linear"),
        (True, 2, "bpar", "cos"),
        (True, 2, "l2", "exp"),
        (True, 1, "bpar", "linear"),
        (True, 1, "l1", "exp"),
        (False, 2, "l1", "cubic"),
        (False, 1, "bpar", "linear"),
    ],
)
def test_training_equals_the_authors(soft, version, criterion, curve):
    """Two dense epochs, two soft ones and two of the final pattern, by SGD with momentum and weight
    decay: masks are the same and weights agree to 1e-5 at every step. Both draw by one noise.
    """
    shape, every, key = (3, 3, 10, 8), 4, jax.random.key(3)
    kernel, target, curvature = normal(0, shape), normal(1, shape), np.abs(normal(2, shape))
    era = {"start": every, "end": 4 * every, "every": every}
    optimizer = {"rate": 0.1, "momentum": 0.9, "weight_decay": 1e-2}
    options = {
        "sparsity": 0.6,
        "block": 4,
        "criterion": criterion,
        "curve": curve,
        "soft": soft,
        "version": version,
        "tau": 0.5,
        "decay": 0.2,
    }
    method = bsj.subp(schedule=bsj.between(**era), where=conv_kernels, key=key, **options)
    tx = bsj.sparse(
        method,
        optax.add_decayed_weights(optimizer["weight_decay"]),
        optax.sgd(optimizer["rate"], momentum=optimizer["momentum"]),
    )

    def loss(params, state):
        return 0.5 * (curvature * (bsj.masked(params, state)["conv"] - target) ** 2).sum()

    @jax.jit
    def step(params, state):
        updates, state = tx.update(jax.grad(loss)(params, state), state, params)
        return optax.apply_updates(params, updates), state

    params = {"conv": jnp.asarray(kernel)}
    state, densities = tx.init(params), []
    expected = authors_run(
        kernel,
        target,
        curvature,
        epochs=6,
        key=key,
        options=options | era,
        optimizer=optimizer,
    )
    for mask, weights in expected:
        np.testing.assert_array_equal(bsj.get_masks(state)["conv"], mask)
        params, state = step(params, state)
        if not soft:  # the last update of an epoch has pruned for the next
            weights = weights * np.asarray(bsj.get_masks(state)["conv"])
        np.testing.assert_allclose(params["conv"], weights, rtol=0, atol=1e-5)
        densities.append(mask.mean())
    by_epoch = densities[::every]
    assert by_epoch[:2] == [1, 1]
    assert 1 > by_epoch[2] > by_epoch[3] >= by_epoch[4] == by_epoch[5] == 0.4
