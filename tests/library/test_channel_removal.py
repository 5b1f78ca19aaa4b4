"""`remove_channels`: every array of a channel goes, in every tree, and nothing else does."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import blocksparse_jax as bsj

SPACES = {
    "a": [("a/kernel", 3), ("a/bias", 0), ("norm/mean", 0), ("b/kernel", -2)],
    "b": [("b/kernel", 3), ("c/kernel", 0)],
}
KEPT = {"a": np.array([1, 0, 1, 1, 0, 0], bool), "b": np.array([0, 1, 1, 0, 1, 0, 1, 1], bool)}


def params():
    shapes = {"a": (3, 3, 3, 6), "b": (3, 3, 6, 8), "c": (8, 10)}
    keys = jax.random.split(jax.random.key(0), 3)
    tree = {
        name: {"kernel": jax.random.normal(key, shape)}
        for key, (name, shape) in zip(keys, shapes.items())
    }
    tree["a"]["bias"] = jnp.arange(6.0)
    return tree


def stats():
    return {"norm": {"mean": jnp.arange(6.0)}}


def cut(tree):
    """The removal that `KEPT` means, by plain indexing."""
    a, b = KEPT["a"], KEPT["b"]
    return {
        "a": {"kernel": tree["a"]["kernel"][..., a], "bias": tree["a"]["bias"][a]},
        "b": {"kernel": tree["b"]["kernel"][:, :, a][..., b]},
        "c": {"kernel": tree["c"]["kernel"][b]},
    }


def trained(tx, weights, steps=3):
    """A state whose moments are all different."""
    state = tx.init(weights)
    for step in range(steps):
        grads = jax.tree.map(lambda leaf, k=step + 1: jnp.sin(leaf * k), weights)
        updates, state = tx.update(grads, state, weights)
        weights = optax.apply_updates(weights, updates)
    return weights, state


@pytest.mark.parametrize(
    "tx",
    [
        optax.sgd(0.1, momentum=0.9),
        optax.adamw(0.1),
        optax.MultiSteps(optax.adam(0.1), 2),
        optax.inject_hyperparams(optax.adam)(learning_rate=0.1),
        optax.partition(
            {"one": optax.adam(0.1), "two": optax.sgd(0.1, momentum=0.9)},
            {"a": "one", "b": "two", "c": "one"},
        ),
    ],
    ids=["sgd", "adamw", "multi_steps", "injected", "partition"],
)
def test_moments_follow_and_training_goes_on_as_under_zeros(tx):
    """Of weights whose channels are zero, with their moments: the next steps are those of the
    larger network, cut.
    """
    weights, state = trained(tx, params())
    smaller, smaller_stats, smaller_state = bsj.remove_channels(
        SPACES, KEPT, weights, stats(), state
    )
    np.testing.assert_array_equal(smaller_stats["norm"]["mean"], [0, 2, 3])
    jax.tree.map(np.testing.assert_array_equal, smaller, cut(weights))
    expected = jax.tree.structure(tx.init(cut(weights)))
    assert jax.tree.structure(smaller_state) == expected
    grads = jax.tree.map(jnp.cos, weights)
    large, _ = tx.update(grads, state, weights)
    small, _ = tx.update(cut(grads), smaller_state, smaller)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), cut(large), small)


def test_masks_and_moments_of_a_sparse_method_follow():
    tx = bsj.sparse(
        bsj.external_masks(0.5, pattern=bsj.patterns.channel("input")),
        optax.sgd(0.1, momentum=0.9),
    )
    weights, state = trained(tx, params())
    masks = jax.tree.map(lambda leaf: leaf > 0, weights)
    state = bsj.replace_masks(state, masks)
    smaller, _, state = bsj.remove_channels(SPACES, KEPT, weights, stats(), state)
    np.testing.assert_array_equal(bsj.get_masks(state)["b"]["kernel"], cut(masks)["b"]["kernel"])
    assert bsj.get_masks(state)["c"]["kernel"].ndim == 0
    updates, state = jax.jit(tx.update)(smaller, state, smaller)
    smaller = optax.apply_updates(smaller, updates)
    assert not np.any(smaller["b"]["kernel"][~cut(masks)["b"]["kernel"]])
    state = bsj.replace_masks(
        state,
        jax.tree.map(lambda leaf: leaf.sum() > 0, smaller)
        | {
            "b": {"kernel": jnp.broadcast_to(jnp.array([True, False, True])[:, None], (3, 3, 3, 5))}
        },
    )
    assert bsj.get_layouts(state)["b"]["kernel"].shape == (3, 3, 3, 5)


def test_spaces_that_are_not_named_stay_and_nothing_is_a_copy_of_the_old_shapes():
    (smaller,) = bsj.remove_channels({"b": SPACES["b"]}, {"b": KEPT["b"]}, params())
    assert smaller["a"]["kernel"].shape == (3, 3, 3, 6)
    assert smaller["b"]["kernel"].shape == (3, 3, 6, 5)
    (same,) = bsj.remove_channels({"b": SPACES["b"]}, {}, params())
    jax.tree.map(np.testing.assert_array_equal, same, params())


def test_a_tail_that_two_parameters_share_is_the_longer_ones():
    """`x/kernel` ends with the other parameter's name, `kernel`."""
    weights = {"kernel": jnp.ones((2, 4)), "x": {"kernel": jnp.ones((2, 4))}}
    state = optax.trace(0.9).init(weights)
    spaces, kept = {"s": [("kernel", 1)]}, {"s": np.array([1, 1, 1, 0], bool)}
    smaller, state = bsj.remove_channels(spaces, kept, weights, state)
    for tree in (smaller, state.trace):
        assert tree["kernel"].shape == (2, 3)
        assert tree["x"]["kernel"].shape == (2, 4)


def test_an_nnx_network_computes_the_same_without_its_dead_channels():
    class Net(nnx.Module):
        def __init__(self, rngs, hidden):
            self.first = nnx.Conv(3, hidden, (3, 3), rngs=rngs)
            self.norm = nnx.BatchNorm(hidden, rngs=rngs)
            self.second = nnx.Conv(hidden, 4, (3, 3), rngs=rngs)

        def __call__(self, x):
            return self.second(nnx.relu(self.norm(self.first(x), use_running_average=False)))

    kept = np.array([0, 1, 1, 0, 1, 1, 1, 0], bool)
    net, x = Net(nnx.Rngs(0), 8), jax.random.normal(jax.random.key(0), (2, 6, 6, 3))
    net.second.kernel[...] = net.second.kernel[...] * kept[:, None]
    spaces = {
        "hidden": [
            *(("first/kernel", -1), ("first/bias", 0), ("second/kernel", -2)),
            *((f"norm/{n}", 0) for n in ("scale", "bias", "mean", "var")),
        ]
    }
    (state,) = bsj.remove_channels(spaces, {"hidden": kept}, nnx.state(net))
    smaller = Net(nnx.Rngs(1), 5)
    nnx.update(smaller, state)
    np.testing.assert_allclose(smaller(x), net(x), atol=1e-5)


def test_errors_name_the_argument_and_the_fix():
    weights, spaces = params(), {"b": SPACES["b"]}
    for kept, message in [
        ({"x": KEPT["b"]}, r"kept: 'x' is no channel space, expected names among \['b'\]"),
        ({"b": KEPT["a"]}, r"kept\['b'\]: expected a bool vector of the space's 8 channels"),
        ({"b": np.arange(8)}, r"True = kept, got int64\[8\]"),
        ({"b": np.zeros(8, bool)}, r"kept\['b'\]: keeps none of 8 channels"),
    ]:
        with pytest.raises(ValueError, match=message):
            bsj.remove_channels(spaces, kept, weights)
    with pytest.raises(ValueError, match=r"spaces\['a'\]: no tree has a leaf 'norm/mean'"):
        bsj.remove_channels(SPACES, KEPT, weights)
    with pytest.raises(ValueError, match=r"kept\['b'\]: its values are read on the host"):
        jax.jit(lambda kept: bsj.remove_channels(spaces, {"b": kept}, weights))(KEPT["b"])


def test_a_state_that_cannot_follow_is_refused():
    spaces, weights = {"s": [("w", 3)]}, {"w": jnp.ones((1, 1, 128, 256))}
    kept = {"s": np.arange(256) < 128}
    factored = optax.adafactor(0.1).init(weights)
    with pytest.raises(ValueError, match="make a new state of the smaller params"):
        bsj.remove_channels(spaces, kept, weights, factored)
    blocks = bsj.hrbp_prune(0.5, group_size=16).init(weights)
    with pytest.raises(ValueError, match="remove channels before"):
        bsj.remove_channels(spaces, kept, weights, blocks)


def test_a_layer_that_lost_all_its_channels_is_summarized():
    params = {"a": jnp.ones((3, 3, 8, 8)), "b": jnp.ones((3, 3, 8, 8)), "c": jnp.ones((1, 1, 8, 4))}
    method = bsj.magnitude(0.5, where=lambda name, leaf: True)
    state = bsj.sparse(method, optax.sgd(0.1)).init(params)
    spaces, kept = {"inner": [("a", 3), ("b", 2)]}, {"inner": np.zeros(8, bool)}
    smaller = bsj.remove_channels(spaces, kept, params, state, vanishing=["inner"])
    summary = bsj.summarize(*smaller)
    assert [(row.weights, row.density) for row in summary.rows] == [(0, 0), (0, 0), (32, 0.5)]
    assert "3x3x8x0" in str(summary)
