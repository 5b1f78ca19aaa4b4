"""PruneTrain, slimming and SSS against plain NumPy, and under what optax users do to them.

They mask nothing, so the battery of the sparse methods does not apply to them.
"""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from sparse_methods import noise, slow_unless

import blocksparse_jax as bsj

SPACES = {
    "stem": [
        *(("stem/kernel", 3), ("norm/scale", 0), ("norm/bias", 0)),
        *(("conv_depthwise/kernel", 3), ("conv1/kernel", 2)),
    ],
    "conv1": [("conv1/kernel", -1), ("classifier/kernel", 0)],
}
KERNELS = [("stem", 3), ("conv1", 2), ("conv1", 3), ("classifier", 0)]  # the groups' axes


def network(dtype=jnp.float32):
    shapes = {
        "stem": (3, 3, 1, 6),
        "conv_depthwise": (3, 3, 1, 6),
        "conv1": (3, 3, 6, 8),
        "classifier": (8, 10),
    }
    keys = jax.random.split(jax.random.key(0), 5)
    tree = {
        name: {"kernel": jax.random.normal(key, shape, dtype)}
        for key, (name, shape) in zip(keys, shapes.items(), strict=False)
    }
    scale = 1 + jax.random.normal(keys[4], (6,), dtype)
    return tree | {"norm": {"scale": scale, "bias": jnp.ones(6, dtype)}}


METHODS = {
    "prune_train": lambda: optax.chain(
        bsj.prune_train(SPACES), optax.sgd(optax.cosine_decay_schedule(0.1, 50), momentum=0.9)
    ),
    "slimming": lambda: optax.chain(bsj.slimming(0.01, until=3), optax.adamw(0.1)),
    "sss": lambda: bsj.sss(
        optax.adamw(0.1), optax.cosine_decay_schedule(0.1, 50), penalty=0.5, momentum=0.5
    ),
}


_noise = jax.jit(noise)
_apply = jax.jit(optax.apply_updates)


def trained(tx, params, update):
    state = tx.init(params)
    for step in range(5):
        updates, state = update(_noise(params, step), state, params, value=jnp.float32(2.0))
        params = _apply(params, updates)
    return params, state


@pytest.mark.parametrize(
    ("dtype", "name"),
    [
        slow_unless(dtype == jnp.float32, dtype, name)
        for dtype in (jnp.float32, jnp.bfloat16)
        for name in METHODS
    ],
)
def test_jit_equals_eager_keeps_dtypes_and_never_recompiles(name, dtype):
    tx, params, traces = optax.with_extra_args_support(METHODS[name]()), network(dtype), []

    def update(grads, state, params, value):
        traces.append(name)
        return tx.update(grads, state, params, value=value)

    jitted = jax.jit(update)
    weights, state = trained(tx, params, jitted)
    grads = _noise(params, 5)
    expected, _ = jitted(grads, state, weights, value=jnp.float32(2.0))
    assert len(traces) == 1
    actual, _ = tx.update(grads, state, weights, value=jnp.float32(2.0))
    tolerance = 1e-5 if dtype == jnp.float32 else 5e-2
    chex.assert_trees_all_close(actual, expected, rtol=tolerance, atol=tolerance)
    chex.assert_trees_all_equal_shapes_and_dtypes(weights, params)
    chex.assert_trees_all_equal_shapes_and_dtypes(state, tx.init(params))


@pytest.mark.parametrize("name", METHODS)
def test_accumulated_gradients_are_one_step(name):
    """Under `MultiSteps` two equal gradients move as one does."""
    params, tx = network(), optax.with_extra_args_support(METHODS[name]())
    many = optax.MultiSteps(tx, 2)
    grads, state = _noise(params, 0), many.init(params)
    for _ in range(2):
        updates, state = many.update(grads, state, params, value=2.0)
    expected, _ = tx.update(grads, tx.init(params), params, value=2.0)
    chex.assert_trees_all_close(updates, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", METHODS)
def test_the_state_follows_a_removal_and_goes_on(name):
    """The next update of the smaller network is that of the larger one, cut, where the penalty of
    one channel does not depend on another.
    """
    tx = optax.with_extra_args_support(METHODS[name]())
    kept = {"stem": np.array([1, 1, 0, 1, 0, 1], bool)}
    params = network()
    gone = ~kept["stem"]
    for name_, axis in (("stem", 3), ("conv_depthwise", 3), ("conv1", 2)):
        index = (slice(None),) * axis + (gone,)
        params[name_]["kernel"] = params[name_]["kernel"].at[index].set(0)
    state = tx.init(params)
    _, state = tx.update(jax.tree.map(jnp.zeros_like, params), state, params, value=2.0)
    small, small_state = bsj.remove_channels(SPACES, kept, params, state)
    grads = _noise(params, 1)
    (small_grads,) = bsj.remove_channels(SPACES, kept, grads)
    large, _ = tx.update(grads, state, params, value=2.0)
    (expected,) = bsj.remove_channels(SPACES, kept, large)
    actual, _ = tx.update(small_grads, small_state, small, value=2.0)
    chex.assert_trees_all_close(actual, expected, rtol=1e-4, atol=1e-5)


# PruneTrain


def test_prune_train_adds_the_gradient_of_its_penalty():
    """In float64 with NumPy; the strength is that of the first loss."""
    params, ratio = network(), 0.3
    weights = {
        name: np.asarray(leaf["kernel"], np.float64)
        for name, leaf in params.items()
        if "kernel" in leaf
    }
    lasso, pull = 0.0, {name: np.zeros_like(w) for name, w in weights.items()}
    for name, axis in KERNELS:
        others = tuple(a for a in range(weights[name].ndim) if a != axis)
        norms = np.sqrt(np.square(weights[name]).sum(others, keepdims=True) + 1e-8)
        lasso += norms.sum()
        pull[name] += weights[name] / norms
    strength = ratio * 2.5 / (lasso * (1 - ratio))
    tx = bsj.prune_train(SPACES, ratio=ratio)
    grads, state = _noise(params, 0), tx.init(params)
    for loss in (2.5, 0.1):
        updates, state = tx.update(grads, state, params, value=loss)
        assert float(state.strength) == pytest.approx(strength, rel=1e-5)
        for name in weights:
            expected = np.asarray(grads[name]["kernel"]) + strength * pull[name]
            np.testing.assert_allclose(updates[name]["kernel"], expected, rtol=1e-4, atol=1e-5)
        assert not pull["conv_depthwise"].any()
        np.testing.assert_array_equal(updates["norm"]["scale"], grads["norm"]["scale"])
    # the share of the whole that the penalty has at the first step
    assert strength * lasso / (strength * lasso + 2.5) == pytest.approx(ratio)


def test_a_penalised_channel_of_zeros_has_a_finite_gradient():
    params = jax.tree.map(jnp.zeros_like, network())
    tx = bsj.prune_train(SPACES)
    updates, _ = tx.update(params, tx.init(params), params, value=1.0)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(updates))


def test_prune_train_keeps_a_channel_that_any_kernel_uses():
    """The union of a stream's layers, as a plain loop finds it."""
    rng = np.random.default_rng(0)
    spaces = {"stream": [("a", 3), ("b", 3), ("c", 2), ("d_depthwise", 3)], "out": [("c", 3)]}
    for _ in range(20):
        weights = {
            "a": rng.normal(size=(1, 1, 2, 6)) * (rng.random(6) < 0.3),
            "b": rng.normal(size=(3, 3, 2, 6)) * (rng.random(6) < 0.3),
            "c": rng.normal(size=(3, 3, 6, 4)) * (rng.random((6, 4)) < 0.1),
            "d_depthwise": np.ones((3, 3, 1, 6)),
        }
        kept = bsj.channels_above(spaces, weights, 1e-4)
        for c in range(6):
            used = max(
                np.abs(weights["a"][..., c]).max(),
                np.abs(weights["b"][..., c]).max(),
                np.abs(weights["c"][:, :, c]).max(),
            )
            others = kept["stream"].sum() - kept["stream"][c]
            assert kept["stream"][c] == (used >= 1e-4) or (used < 1e-4 and others == 0)
        assert kept["stream"].any()
        assert kept["out"].any()


# The choice by scores


@pytest.mark.parametrize("sparsity", [0, 0.3, 0.5, 0.9, 0.99])
@pytest.mark.parametrize("kind", ["random", "equal", "zeros", "tied"])
def test_the_largest_channels_of_all_layers_stay(sparsity, kind):
    """Against a sorted list, best of each layer first."""
    rng = np.random.default_rng(3)
    draw = {
        "random": lambda n: rng.random(n),
        "equal": np.ones,
        "zeros": np.zeros,
        "tied": lambda n: rng.integers(0, 3, n).astype(float),
    }[kind]
    scores = {"a": draw(7), "b": draw(1), "c": draw(24)}
    kept = bsj.largest_channels(scores, sparsity)
    best = {(space, int(v.argmax())) for space, v in scores.items()}
    every = [(v, space, c) for space, values in scores.items() for c, v in enumerate(values)]
    order = sorted(
        (value, -place, space, channel)
        for place, (value, space, channel) in enumerate(every)
        if (space, channel) not in best
    )
    gone = {(space, channel) for *_, space, channel in order[: round(sparsity * 32)]}
    for space, values in scores.items():
        expected = [(space, channel) not in gone for channel in range(values.size)]
        assert kept[space].tolist() == expected


# SSS


def test_sss_is_the_accelerated_proximal_gradient_of_the_paper():
    """Equations 10 to 12 in float64: lambda' = lambda + mu v at each step."""
    rate, penalty, mu, rng = 0.1, 0.3, 0.9, np.random.default_rng(0)
    factor = rng.normal(size=6)
    params = {"scale": jnp.asarray(factor, jnp.float32)}
    tx = bsj.sss(optax.sgd(1.0), rate, penalty=penalty, momentum=mu)
    state, ahead, velocity = tx.init(params), factor, np.zeros(6)
    for _ in range(12):
        grad = rng.normal(size=6) * 0.2
        z = ahead - rate * grad
        proximal = np.sign(z) * np.maximum(np.abs(z) - rate * penalty, 0)
        velocity = proximal - ahead + mu * velocity
        ahead = proximal + mu * velocity
        grads = {"scale": jnp.asarray(grad, jnp.float32)}
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        np.testing.assert_allclose(params["scale"], ahead, rtol=1e-4, atol=1e-6)


def test_factors_that_matter_little_become_zero_and_stay():
    """Of a quadratic, the factors whose pull is below the penalty: their minimum is zero."""
    pull = jnp.array([1.0, 0.2, -0.1, -2.0])
    params, tx = {"scale": jnp.ones(4)}, bsj.sss(optax.sgd(0.1), 0.1, penalty=0.5)
    state = tx.init(params)
    for _ in range(200):
        updates, state = tx.update({"scale": params["scale"] - pull}, state, params)
        params = optax.apply_updates(params, updates)
    np.testing.assert_allclose(params["scale"], [0.5, 0, 0, -1.5], atol=1e-5)
    assert np.abs(params["scale"][1:3]).max() < 1e-8, "what counts as zero"


# Errors


def test_errors_name_the_argument_and_the_fix():
    params = network()
    for call, message in [
        (lambda: bsj.prune_train(SPACES, ratio=1.0), "ratio: expected"),
        (lambda: bsj.prune_train({"s": [("stem/kernel", 7)]}).init(params), "axis 7 of"),
        (lambda: bsj.prune_train({"s": [("norm/bias", 0)]}).init(params), "no kernel of params"),
        (lambda: bsj.slimming(-1.0), "penalty: expected"),
        (lambda: bsj.slimming(until=-1), "until: expected a step"),
        (lambda: bsj.slimming().init({"w": jnp.ones((2, 2))}), "where: no leaf of params"),
        (lambda: bsj.sss(optax.sgd(0.1), 0.1, momentum=1.0), "momentum: expected"),
        (lambda: bsj.sss(optax.sgd(0.1), -0.1), "learning_rate: expected"),
        (lambda: bsj.sss(optax.sgd(0.1), 0.1).init({"w": jnp.ones(2)}), "where: no leaf of"),
        (lambda: bsj.channels_above(SPACES, params, -1.0), "threshold: expected"),
        (lambda: bsj.largest_channels({}, 0.5), "scores: expected a vector of each"),
        (lambda: bsj.largest_channels({"a": np.ones((2, 2))}, 0.5), r"scores\['a'\]: expected a"),
        (lambda: bsj.largest_channels({"a": np.array([np.nan])}, 0.5), "finite values"),
        (lambda: bsj.largest_channels({"a": np.ones(3)}, 1.0), "sparsity: expected"),
    ]:
        with pytest.raises(ValueError, match=message):
            call()
    tx = bsj.prune_train(SPACES)
    with pytest.raises(ValueError, match="value: prune_train needs the weights and the loss"):
        tx.update(params, tx.init(params), params)
    for method in (bsj.slimming(), bsj.sss(optax.sgd(0.1), 0.1)):
        with pytest.raises(ValueError, match="params: "):
            method.update(params, method.init(params))
