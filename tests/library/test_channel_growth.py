"""Channels that grow: what comes, what stays, and which candidate wins."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import blocksparse_jax as bsj

SPACES = {
    "a": [("first", 3), ("norm", 0), ("second", 2)],
    "b": [("second", 3), ("third", 2)],
    "dense": [("third", 3), ("classifier", 0)],
}


def network(seed=0, dormant=(2, 3)):
    """Kernels whose spaces a and b have dormant channels, the last of each."""
    rng = np.random.default_rng(seed)
    shapes = {
        "first": (3, 3, 4, 8),
        "second": (3, 3, 8, 6),
        "third": (1, 1, 6, 5),
        "classifier": (5, 3),
        "norm": (8,),
    }
    params = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    masks = {name: rng.random(params[name].shape) < 0.4 for name in ("first", "second", "third")}
    for space, channels in zip("ab", dormant):
        for name, axis in SPACES[space]:
            if name in masks:
                np.moveaxis(masks[name], axis, 0)[-channels:] = False
    masks |= {name: np.asarray(True) for name in ("classifier", "norm")}
    params = {name: jnp.asarray(params[name] * masks[name]) for name in params}
    return params, {name: jnp.asarray(mask) for name, mask in masks.items()}


@pytest.mark.parametrize("seed", [0, 1])
def test_as_many_weights_come_as_the_density_says_and_all_others_stay(seed):
    params, masks = network(seed)
    dormant = bsj.dormant_channels(params, masks, SPACES)
    assert {space: np.flatnonzero(v).tolist() for space, v in dormant.items()} == {
        "a": [6, 7],
        "b": [3, 4, 5],
    }
    grown = bsj.grow_channels(lambda *_: 0.0, params, None, masks, SPACES, {"a": 1, "b": 2})
    new = {name: np.asarray(grown.masks[name]) & ~np.asarray(masks[name]) for name in SHARES}
    reached = {"a": np.arange(8) < 7, "b": np.arange(6) < 5}
    for name, (own, other, taps) in SHARES.items():
        old = np.asarray(masks[name])
        live = [old.any((0, 1, 3)).sum(), old.any((0, 1, 2)).sum()]
        density = old.sum() / (taps * live[0] * live[1])
        for axis, space in own.items():
            partner = reached[other[axis]].sum() if other[axis] else live[3 - axis]
            count = max(1, round(density * taps * partner))
            for channel in np.flatnonzero(dormant[space] & reached[space]):
                slices = np.moveaxis(new[name], axis, 0)[channel]
                if len(own) == 1:
                    assert slices.sum() == count
                else:  # the other side's channels add theirs
                    assert slices.sum() >= count
            gone = np.moveaxis(new[name], axis, 0)[~reached[space]]
            assert not gone.any(), "channels that stay dormant"
        was = np.asarray(masks[name])
        np.testing.assert_array_equal(
            np.asarray(grown.params[name])[was], np.asarray(params[name])[was]
        )
        assert (np.asarray(grown.params[name])[new[name]] != 0).all()
        np.testing.assert_array_equal(np.asarray(grown.params[name])[~(was | new[name])], 0)
    for name in ("classifier", "norm"):
        np.testing.assert_array_equal(grown.params[name], params[name])


# name -> the spaces of its axes that grow, the space of the other axis, its taps
SHARES = {
    "first": ({3: "a"}, {3: None}, 9),
    "second": ({2: "a", 3: "b"}, {2: "b", 3: "a"}, 9),
    "third": ({2: "b"}, {2: None}, 1),
}


def test_the_candidate_of_the_lowest_loss_stays():
    params, masks = network()

    def loss(params, batch):
        return jnp.sum(params["first"] * batch)

    batch = jax.random.normal(jax.random.key(1), params["first"].shape)
    losses = [
        float(
            loss(
                bsj.grow_channels(
                    loss,
                    params,
                    batch,
                    masks,
                    SPACES,
                    {"a": 2},
                    candidates=n,
                    key=jax.random.key(3),
                ).params,
                batch,
            )
        )
        for n in (1, 2, 4, 16)
    ]
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < losses[0]


def test_a_loss_that_is_not_finite_never_wins_over_one_that_is():
    params, masks = network()
    seen = []

    def loss(params, batch):
        seen.append(params)
        return jnp.nan if len(seen) != 2 else 5.0

    grown = bsj.grow_channels(loss, params, None, masks, SPACES, {"a": 1}, candidates=3)
    np.testing.assert_array_equal(grown.params["first"], seen[1]["first"])


def test_nothing_grows_without_counts():
    params, masks = network()
    grown = bsj.grow_channels(lambda *_: 0.0, params, None, masks, SPACES, {"a": 0})
    assert grown.params is params
    assert grown.masks is masks


def test_errors_name_the_argument_and_the_fix():
    params, masks = network()
    for counts, options, message in [
        ({"a": 3}, {}, "expected at most its 2 dormant channels, got 3"),
        ({"dense": 1}, {}, "'dense' is no channel space whose kernels are all sparse"),
        ({"a": 1.5}, {}, "expected an integer of at least 1, got 1.5"),
        ({"a": 1}, {"candidates": 0}, "candidates: expected"),
    ]:
        with pytest.raises(ValueError, match=message):
            bsj.grow_channels(lambda *_: 0.0, params, None, masks, SPACES, counts, **options)
