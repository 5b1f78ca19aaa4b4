"""Channel orders: laws of the search, kept score against all orders by brute force, and how orders
are folded into parameters.
"""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

import blocksparse_jax as bsj
from blocksparse_jax.grouping import channel_order as module
from blocksparse_jax.grouping.channel_order import Consumer, channel_order, run_ratio
from blocksparse_jax.grouping.channel_spaces import channel_orders, fold_channel_orders

# shape, group_size, kept, kept_taps, channel_block
CASES = [((1, 1, 8, 8), 4, 4, 1, 2), ((3, 3, 16, 16), 8, 8, 3, 4)]


def draw(kind, shape, seed):
    rng = np.random.default_rng(seed)
    noise = np.abs(rng.normal(size=shape)).astype(np.float32)
    if kind == "clusters":  # of channels and of filters, shuffled
        factors = rng.exponential(size=(3, 4)) ** 2
        noise *= factors[
            rng.integers(0, 3, shape[2])[:, None], rng.integers(0, 4, shape[3])
        ].astype(np.float32)
    return {
        "iid": noise,
        "heavy": noise**4,
        "clusters": noise,
        "equal": noise * 0 + 1,
        "zero": noise * 0,
    }[kind]


def planted(shape, group_size, block, seed):
    """Scores by which every group of filters keeps other runs; channels and filters shuffled."""
    rng = np.random.default_rng(seed)
    cin, cout = shape[2:]
    groups, runs = cout // group_size, cin // block
    each = 16 // block
    wants = np.stack(
        [
            np.isin(np.arange(runs), np.arange(each * g, each * (g + 1)) % runs)
            for g in range(groups)
        ],
        1,
    )
    scores = 0.01 + wants[np.arange(cin) // block][:, np.arange(cout) // group_size]
    shuffled = scores[rng.permutation(cin)][:, rng.permutation(cout)]
    return np.broadcast_to(shuffled, shape).astype(np.float32), 16


@settings(max_examples=8, deadline=None)
@given(
    case=st.sampled_from(CASES),
    kind=st.sampled_from(["iid", "heavy", "clusters", "equal", "zero"]),
    seed=st.integers(0, 2**16),
)
def test_an_order_is_a_permutation_the_same_each_time_and_never_worse_than_none(case, kind, seed):
    shape, group_size, kept, kept_taps, block = case
    consumers = [
        Consumer(draw(kind, shape, seed + i), group_size, kept, kept_taps)
        for i in range(1 + seed % 2)
    ]
    order = channel_order(consumers, channel_block=block)
    assert np.array_equal(np.sort(order), np.arange(shape[2]))
    assert np.array_equal(order, channel_order(consumers, channel_block=block))
    ratio = run_ratio(consumers, order, channel_block=block)
    assert ratio.ordered >= ratio.unordered
    runs = order.reshape(-1, block)
    assert (np.diff(runs, axis=1) > 0).all()
    assert (np.diff(runs[:, 0]) > 0).all()


def partitions(items, block):
    """All ways to cut the items into runs."""
    if not items:
        yield []
        return
    for rest in itertools.combinations(items[1:], block - 1):
        run = [items[0], *rest]
        for others in partitions([i for i in items if i not in run], block):
            yield run + others


@pytest.mark.parametrize(
    "kind", ["iid", *(pytest.param(k, marks=pytest.mark.slow) for k in ("heavy", "clusters"))]
)
def test_against_every_order_of_eight_channels(kind):
    every = [np.array(p) for p in partitions(list(range(8)), 2)]
    assert len(every) == 105
    group = jax.jit(
        jax.vmap(
            lambda s: bsj.kept_score(
                s, bsj.hrbp_groups(s, group_size=4, kept=4, kept_taps=1, channel_block=2)
            )
        )
    )
    lost = []
    for seed in range(12):
        scores = draw(kind, (1, 1, 8, 8), seed)
        best = float(group(jnp.stack([scores[:, :, order] for order in every])).max())
        order = channel_order([Consumer(scores, 4, 4, 1)], channel_block=2)
        kept = float(group(jnp.asarray(scores[:, :, order])[None])[0])
        assert kept <= best * (1 + 1e-5)
        lost.append(1 - kept / best)
    assert np.mean(lost) < 0.01
    assert np.max(lost) < 0.05


@pytest.mark.parametrize("block", [4, 8])
def test_planted_runs_are_found(block):
    scores, kept = planted((1, 1, 64, 64), 16, block, seed=block)
    consumers = [Consumer(scores, 16, kept, 1)]
    ratio = run_ratio(consumers, channel_order(consumers, channel_block=block), channel_block=block)
    assert ratio.ordered == pytest.approx(1, abs=1e-5)
    assert ratio.unordered < 0.7


def test_every_consumer_of_a_space_counts_by_its_score():
    strong, kept = planted((1, 1, 64, 64), 16, 8, seed=0)
    other, _ = planted((1, 1, 64, 64), 16, 8, seed=1)
    alone = channel_order([Consumer(strong, 16, kept, 1)], channel_block=8)
    both = channel_order(
        [Consumer(other * 1e-5, 16, kept, 1), Consumer(strong, 16, kept, 1)], channel_block=8
    )
    assert run_ratio(
        [Consumer(strong, 16, kept, 1)], both, channel_block=8
    ).ordered == pytest.approx(1, abs=1e-4)
    assert np.array_equal(
        alone,
        channel_order(
            [Consumer(strong, 16, kept, 1), Consumer(strong * 0, 16, kept, 1)], channel_block=8
        ),
    )
    agreeing = [Consumer(strong, 16, kept, 1), Consumer(strong[..., ::-1], 16, kept, 1)]
    assert run_ratio(
        agreeing, channel_order(agreeing, channel_block=8), channel_block=8
    ).ordered == pytest.approx(1, abs=1e-5)


@pytest.mark.slow
def test_iid_scores_lose_something_and_half_of_the_loss_is_won_back():
    consumers = [Consumer(draw("iid", (1, 1, 64, 64), 0), 16, 16, 1)]
    ratio = run_ratio(consumers, channel_order(consumers, channel_block=8), channel_block=8)
    assert ratio.unordered < 1
    assert (1 + ratio.unordered) / 2 < ratio.ordered < 1.01


@settings(max_examples=50, deadline=None)
@given(runs=st.integers(1, 6), block=st.integers(1, 5), seed=st.integers(0, 2**16))
def test_exchanges_keep_runs_full_and_gain(runs, block, seed):
    rng = np.random.default_rng(seed)
    benefit, owner = (
        rng.normal(size=(runs * block, runs)),
        rng.permutation(np.repeat(np.arange(runs), block)),
    )
    better, every = module._exchange_channels(benefit, owner, 50), np.arange(runs * block)
    assert (np.bincount(better, minlength=runs) == block).all()
    values = [benefit[every, o].sum() for o in (owner, better)]
    assert values[1] >= values[0]
    for a, b in itertools.combinations(every, 2):  # no further exchange of two channels gains
        assert (
            benefit[a, better[b]] + benefit[b, better[a]]
            <= benefit[a, better[a]] + benefit[b, better[b]] + 1e-5
        )


def test_corrupted_scores_still_give_an_order():
    scores = draw("iid", (3, 3, 16, 16), 0)
    scores[0, 0, 3, :], scores[1, 1, :, 2] = np.nan, np.inf
    assert np.array_equal(
        np.sort(channel_order([Consumer(scores, 8, 8, 3)], channel_block=4)), np.arange(16)
    )


def test_one_channel_in_a_run_and_all_channels_kept_need_no_order():
    scores = draw("clusters", (1, 1, 8, 8), 0)
    for kept, block in ((4, 1), (8, 4)):
        assert channel_order([Consumer(scores, 4, kept, 1)], channel_block=block).tolist() == list(
            range(8)
        )


def test_a_user_network_of_nnx_folds_by_its_own_names():
    class Net(nnx.Module):
        def __init__(self, rngs):
            self.first, self.norm = nnx.Conv(3, 8, (3, 3), rngs=rngs), nnx.BatchNorm(8, rngs=rngs)
            self.second = nnx.Conv(8, 4, (3, 3), rngs=rngs)

        def __call__(self, x):
            return self.second(nnx.relu(self.norm(self.first(x), use_running_average=True)))

    net, x = Net(nnx.Rngs(0)), jax.random.normal(jax.random.key(0), (2, 6, 6, 3))
    net.first.bias[...] = net.norm.mean[...] = net.norm.scale[...] = jnp.arange(8.0)
    before, graph, state = net(x), *nnx.split(net)
    hidden = [
        ("first/kernel", -1),
        ("first/bias", 0),
        ("second/kernel", -2),
        *((f"norm/{n}", 0) for n in ("scale", "bias", "mean", "var")),
    ]
    (state,) = fold_channel_orders({"hidden": hidden}, {"hidden": np.roll(np.arange(8), 3)}, state)
    folded = nnx.merge(graph, state)
    np.testing.assert_allclose(folded(x), before, atol=1e-4)
    assert folded.norm.mean[...].tolist() == [5, 6, 7, 0, 1, 2, 3, 4]


def test_errors_name_the_argument_and_the_fix():
    params = {"a": jnp.ones((3, 3, 3, 8)), "b": jnp.ones((3, 3, 8, 16))}
    good, order = {"s": [("a", 3), ("b", 2)]}, np.arange(8)
    for spaces, orders, message in [
        ({"s": [("a", 3), ("c", 2)]}, {}, r"spaces\['s'\]: no tree has a leaf 'c'"),
        ({"s": [("a", 3), ("b", 4)]}, {}, r"axis 4 of 'b' is out of range"),
        ({"s": [("a", 3), ("b", 3)]}, {}, r"has 16 channels, expected 8"),
        ({"s": [("a", 3)], "t": [("a", -1)]}, {}, r"is in 's' too"),
        (good, {"x": order}, r"orders: 'x' is no channel space"),
        (good, {"s": np.arange(7)}, r"orders\['s'\]: expected a permutation of 0..7"),
        (good, {"s": np.zeros(8, int)}, r"expected a permutation"),
    ]:
        with pytest.raises(ValueError, match=message):
            fold_channel_orders(spaces, orders, params)
    for kind in ("gradient", "random"):
        with pytest.raises(
            ValueError, match=f"scores: expected 'magnitude' or a tree of arrays, got '{kind}'"
        ):
            channel_orders(params, good, 0.5, channel_block=4, scores=kind)
    consumer = Consumer(np.ones((1, 1, 8, 8), np.float32), 4, 4, 1)
    with pytest.raises(ValueError, match="consumers: expected at least one"):
        channel_order([], channel_block=2)
    with pytest.raises(ValueError, match="same input channels"):
        channel_order([consumer, Consumer(np.ones((1, 1, 4, 8)), 4, 4, 1)], channel_block=2)
    with pytest.raises(ValueError, match="channel_block: 3 must divide"):
        channel_order([consumer], channel_block=3)
    with pytest.raises(ValueError, match="order: expected a permutation"):
        run_ratio([consumer], np.zeros(8), channel_block=2)
