"""The law of SUBP's importance sampling: how often each set of removed blocks comes back, against
exact probabilities.
"""

import itertools

import jax
import numpy as np
import optax
import pytest
import references as ref
from subp_runs import conv_kernels, run_subp

import blocksparse_jax as bsj

GROUPS = 4000


def draws(blocks, seed=0, *, removed=4, block=1, **options):
    """Kept channels `[GROUPS, cin]` where removed - 1, removed - 2, ... 1 blocks are regrown;
    `blocks`: `[cin, block]`, one group's.
    """
    cin = len(blocks)
    kernel = np.tile(blocks, (1, GROUPS)).reshape(1, 1, cin, block * GROUPS).astype(np.float32)
    # linear over [0, removed]: at step s, floor((P - P s / removed) C) = removed - s blocks are
    # regrown
    options = {
        "block": block,
        "schedule": "linear",
        "start": 0,
        "end": removed,
        "version": 1,
    } | options
    kept = list(run_subp([kernel] * (removed - 1), seed, sparsity=removed / cin, **options))[1:]
    assert [set(k.sum(1).tolist()) for k in kept] == [{cin - s} for s in range(1, removed)]
    return dict(zip(range(removed - 1, 0, -1), kept))


def assert_law(kept, scores, *, removed, regrown, tau):
    """Every possible set of regrown blocks comes as often as draw-by-draw softmax sampling says,
    within 6 sigma, and chi-square.
    """
    order = np.argsort(-scores, kind="stable")
    gone = np.sort(order[len(scores) - removed :])
    law = ref.draws_without_replacement(ref.subp_probabilities(scores[gone], tau), regrown)
    assert abs(sum(law.values()) - 1) < 1e-9
    assert kept[:, np.sort(order[: len(scores) - removed])].all()
    n, chi2 = len(kept), 0.0
    for members, chance in law.items():
        regrown_set = np.isin(np.arange(removed), list(members))
        times = (kept[:, gone] == regrown_set).all(1).sum()
        assert abs(times - n * chance) < 6 * np.sqrt(n * chance * (1 - chance)) + 1, (
            gone[list(members)],
            times / n,
            chance,
        )
        chi2 += (times - n * chance) ** 2 / (n * chance)
    assert chi2 < len(law) - 1 + 6 * np.sqrt(2 * (len(law) - 1)) + 10
    for i, channel in enumerate(gone):
        inclusion = sum(chance for members, chance in law.items() if i in members)
        assert (
            abs(kept[:, channel].mean() - inclusion)
            < 6 * np.sqrt(inclusion * (1 - inclusion) / n) + 1e-9
        )


WEIGHTS = np.array(
    [[0.9], [8.0], [0.1], [5.0], [0.5], [1.7]]
)  # removed 4: 0.9 0.1 0.5 1.7, of norm 1.99


@pytest.mark.parametrize("tau", [0.2, 1.0, 5.0])
def test_regrowth_follows_the_softmax_without_replacement(tau):
    for regrown, kept in draws(WEIGHTS, 7, tau=tau).items():
        assert_law(kept, np.abs(WEIGHTS[:, 0]), removed=4, regrown=regrown, tau=tau)


@pytest.mark.parametrize("criterion", ["l2", "bpar"])
def test_regrowth_by_criterion(criterion):
    """L2 scores are norms, not squares; BPAR scores may be negative."""
    blocks = np.array([[3.0, 1.0], [0.4, 0.3], [-1.0, 1.2], [0.1, 0.0], [0.7, -0.6], [2.0, 0.2]])
    scores = ref.subp_scores(
        blocks[None, None].astype(np.float32), np.ones((1, 1, 6, 2)), 2, criterion
    )[0]
    kept = draws(blocks, 1, block=2, criterion=criterion, tau=0.3)[3]  # drawn while all are kept
    assert_law(kept, scores, removed=4, regrown=3, tau=0.3)


@pytest.mark.parametrize("value", [0.0, 0.5])
def test_regrowth_of_equal_scores_is_uniform(value):
    """Removed blocks that all score 0 (or all the same) are drawn evenly: no 0 / 0, no favourite by
    position.
    """
    weights = np.array([[9.0], [value], [value], [value], [value], [7.0]])
    kept = draws(weights, 2, tau=1.0)[2]
    assert_law(kept, weights[:, 0], removed=4, regrown=2, tau=1.0)
    assert len(np.unique(kept, axis=0)) == 6


def test_version_2_draws_former_pruned_blocks_at_score_zero():
    """Among the removed, those that were pruned before count as 0, so what was just pruned is
    likelier to return.
    """
    weights = np.array([[9.0], [8.0], [0.6], [0.8], [1.0], [1.2]])
    kernel = np.tile(weights, (1, GROUPS)).reshape(1, 1, 6, GROUPS).astype(np.float32)
    options = {
        "sparsity": 4 / 6,
        "block": 1,
        "schedule": "linear",
        "start": 0,
        "end": 4,
        "version": 2,
        "tau": 0.3,
    }
    *_, before, after = run_subp([kernel] * 3, 5, **options)  # step 2 regrows 2 of 4, step 3 one
    draws_after, laws = {}, {}
    for row, new in zip(before, after):
        draws_after.setdefault(tuple(row), []).append(new[2:].argmax())
    for row in draws_after:
        laws[row] = ref.subp_probabilities((weights[:, 0] * row)[2:], 0.3)
    assert len(draws_after) == 6
    for row, drawn in draws_after.items():
        for i, chance in enumerate(laws[row]):
            assert (
                abs(drawn.count(i) - len(drawn) * chance)
                < 6 * np.sqrt(len(drawn) * chance * (1 - chance)) + 1
            )


def test_tau_moves_the_draw_from_the_best_to_the_even():
    """The best of four removed blocks comes almost always at a small tau, else one time in four."""
    sharp, even = (draws(WEIGHTS, 3, tau=tau)[1][:, 5].mean() for tau in (0.02, 100.0))
    assert sharp > 0.999
    assert abs(even - 0.25) < 0.05


def test_inclusion_over_many_keys():
    """The same law over 600 keys of one small layer as over the groups of one key."""
    kernel = np.repeat(WEIGHTS, 2, axis=1)[None, None].astype(np.float32)

    @jax.jit
    @jax.vmap
    def masks(key):
        tx = bsj.subp(
            4 / 6,
            block=1,
            schedule="linear",
            start=0,
            end=4,
            version=1,
            tau=0.2,
            where=conv_kernels,
            key=key,
        )
        tx = bsj.sparse(tx, optax.set_to_zero())
        state = tx.init({"conv": kernel})
        for _ in range(2):
            _, state = tx.update({"conv": kernel}, state, {"conv": kernel})
        return bsj.get_masks(state)["conv"]

    kept = np.asarray(masks(jax.random.split(jax.random.key(0), 600)))[
        :, 0, 0
    ]  # [keys, cin, groups]
    for g in range(2):
        assert_law(kept[..., g], WEIGHTS[:, 0], removed=4, regrown=2, tau=0.2)
    assert_independent(kept[..., 0], kept[..., 1], removed=4, regrown=2, tau=0.2)


def assert_independent(first, second, *, removed, regrown, tau):
    """Two draws agree on the whole set as often as two independent ones: the sum of the squared
    probabilities.
    """
    gone = np.sort(np.argsort(-WEIGHTS[:, 0], kind="stable")[len(WEIGHTS) - removed :])
    law = ref.draws_without_replacement(ref.subp_probabilities(WEIGHTS[gone, 0], tau), regrown)
    chance, n = sum(p * p for p in law.values()), len(first)
    same = (first == second).all(1).sum()
    assert abs(same - n * chance) < 6 * np.sqrt(n * chance * (1 - chance)) + 1


def test_groups_layers_steps_and_keys_draw_independently():
    options = {"removed": 4, "regrown": 2, "tau": 1.0}
    one = draws(WEIGHTS, 0, tau=1.0)[2]
    assert_independent(one[::2], one[1::2], **options)  # neighbouring groups
    assert_independent(one, draws(WEIGHTS, 1, tau=1.0)[2], **options)  # keys
    np.testing.assert_array_equal(one, draws(WEIGHTS, 0, tau=1.0)[2])  # the same key, the same bits

    kernel = np.tile(WEIGHTS, (1, GROUPS))[None, None].astype(np.float32)
    params = {"a": kernel, "b": kernel}
    # cubic over 20 steps: 2 blocks are regrown while floor(4 (1 - t^3)) = 2, which holds at steps
    # 13, 14 and 15
    method = bsj.subp(
        4 / 6, block=1, start=0, end=20, version=1, where=conv_kernels, key=jax.random.key(0)
    )
    tx = bsj.sparse(method, optax.set_to_zero())
    state, update = tx.init(params), jax.jit(tx.update)
    masks = []
    for _ in range(15):
        _, state = update(params, state, params)
        masks.append(
            {name: np.asarray(mask)[0, 0].T for name, mask in bsj.get_masks(state).items()}
        )
    masks = masks[-2:]
    for first, second in itertools.combinations(
        [masks[0]["a"], masks[0]["b"], masks[1]["a"], masks[1]["b"]], 2
    ):
        assert_independent(first, second, **options)
