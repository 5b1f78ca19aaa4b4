"""Campfire: masks equal a NumPy reference after every update, and stay from the era's end on."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import references as ref

import blocksparse_jax as bsj

SHAPES = {"conv1": (3, 3, 5, 6), "conv2": (1, 1, 6, 8), "conv3": (2, 3, 8, 4), "fc": (8, 5)}
FEEDS = {"fc": "conv3"}
START, LENGTH = 1, 5
KINDS = ("window", "ck", "combined", "inter_epoch")
PICTURES = ("random", "ties", "equal", "zeros", "one channel")


def weights(picture, seed):
    rng = np.random.default_rng(seed)
    draw = {
        "random": lambda shape: rng.normal(size=shape),
        "ties": lambda shape: rng.integers(-2, 3, shape),
        "equal": lambda shape: np.full(shape, 0.5),
        "zeros": np.zeros,
        "one channel": lambda shape: rng.normal(size=shape) * (np.arange(shape[-1]) == 1),
    }[picture]
    return {name: np.asarray(draw(shape), np.float32) for name, shape in SHAPES.items()}


def curve(sparsity, step, start, end):
    """Equation 1 in float32, and 1 from the end on, where the final counts hold."""
    if step >= end:
        return np.float32(1)
    progress = np.float32(max(step - start, 0)) / np.float32(end - start)
    return np.float32(sparsity) * (1 - (1 - progress) ** np.float32(3))


def reference(proposed, masks, kind, step, sparsity, share, fc):
    end, middle = START + LENGTH, START + LENGTH // 2
    window = slices = curve(sparsity, step, START, end)
    if kind == "inter_epoch":
        window = curve(sparsity, step, middle, end)
        slices = curve(sparsity, step, START, middle)
    share = {"window": 1.0, "ck": 0.0}.get(kind, share)
    new = {}
    for name in ("conv1", "conv2", "conv3"):
        final = ref.campfire_counts(SHAPES[name], sparsity, share)
        arguments = (masks[name], window, slices, final, share)
        new[name] = ref.campfire_conv_mask(proposed[name], *arguments)
    live = np.tile(new["conv3"].any((0, 1, 2)), 2)
    block = 3 if fc == "block" else 1
    arguments = (masks["fc"], live, slices, sparsity, block)
    return new | {"fc": ref.campfire_dense_mask(proposed["fc"], *arguments)}


@pytest.mark.filterwarnings("ignore:sparsity. density")  # of few weights
@pytest.mark.parametrize(
    ("kind", "sparsity"), [*((kind, 0.75) for kind in KINDS), ("ck", 0.99), ("combined", 0.0)]
)
def test_masks_equal_the_reference_after_every_update(kind, sparsity):
    """Over random weights, ties, all equal, zeros and one channel; what the optimizer proposes
    decides.
    """
    fc = "block" if kind in ("window", "combined") else "fine"
    method = bsj.campfire(
        sparsity, kind=kind, era=(START, LENGTH), window_share=0.6, fc=fc, fc_block=3, feeds=FEEDS
    )
    tx = bsj.sparse(method, optax.sgd(0.25, momentum=0.5))
    update = jax.jit(tx.update)
    for picture in PICTURES:
        params = jax.tree.map(jnp.asarray, weights(picture, 0))
        state, masks = tx.init(params), {n: np.ones(s, bool) for n, s in SHAPES.items()}
        trace = {name: np.zeros(shape, np.float32) for name, shape in SHAPES.items()}
        for step in range(START + LENGTH + 3):
            grads = weights("ties" if picture == "ties" else "random", 10 + step)
            if picture in ("equal", "zeros", "one channel"):
                grads = jax.tree.map(np.zeros_like, grads)
            trace = {n: np.float32(0.5) * trace[n] + grads[n] * masks[n] for n in SHAPES}
            proposed = {n: np.asarray(params[n]) - np.float32(0.25) * trace[n] for n in SHAPES}
            before = masks
            if START <= step <= START + LENGTH:
                masks = reference(proposed, masks, kind, step, sparsity, 0.6, fc)
            updates, state = update(grads, state, params)
            params = optax.apply_updates(params, updates)
            for name, mask in bsj.get_masks(state).items():
                np.testing.assert_array_equal(mask, masks[name], f"{picture} {name} {step}")
                assert not (masks[name] & ~before[name]).any(), "pruned weights stay pruned"
                assert not np.asarray(params[name])[~masks[name]].any(), "and zero"
            trace = {name: np.where(masks[name], trace[name], 0) for name in SHAPES}
        if kind != "window":  # whose windows of 3x3 and 2x3 weights miss it
            assert masks["conv2"].mean() == pytest.approx(1 - sparsity, abs=0.02)
        assert masks["fc"].any(0).all(), "every neuron keeps a weight"


def trained(method, steps, params, optimizer=None):
    tx = bsj.sparse(method, optimizer or optax.adam(0.05))
    state, update, masks = tx.init(params), jax.jit(tx.update), []
    for step in range(steps):
        key = jax.random.fold_in(jax.random.key(3), step)
        grads = optax.tree_utils.tree_random_like(key, params)
        updates, state = update(grads, state, params)
        params = optax.apply_updates(params, updates)
        masks.append(jax.tree.map(np.asarray, bsj.get_masks(state)))
    return params, state, masks


@pytest.mark.parametrize("kind", KINDS)
def test_counts_fall_at_every_update_of_the_era_and_stay_after_it(kind):
    """144 slices of 9 weights: exact counts at the end of 2/3, monotone on the way."""
    params = {"conv": jax.random.normal(jax.random.key(0), (3, 3, 12, 12))}
    method = bsj.campfire(2 / 3, kind=kind, era=(4, 12), window_share=0.5)
    _, state, masks = trained(method, 24, params)
    kept = [int(mask["conv"].sum()) for mask in masks]
    assert kept[:5] == [1296] * 5
    assert kept[16:] == [432] * 8
    assert all(a >= b for a, b in itertools.pairwise(kept))
    assert len(set(kept)) > 5
    for before, after in itertools.pairwise(masks):
        assert not (after["conv"] & ~before["conv"]).any()
    assert all((mask["conv"] == masks[16]["conv"]).all() for mask in masks[16:])
    spec = bsj.get_spec(state)
    assert [step for step in range(24) if spec.changes(step)] == list(range(4, 17))
    in_slices = masks[-1]["conv"].sum((0, 1))
    sizes = {"window": {3}, "ck": {0, 9}, "combined": {0, 6}, "inter_epoch": {0, 6}}
    assert set(in_slices.ravel().tolist()) == sizes[kind]


def test_inter_epoch_prunes_slices_first_and_windows_then():
    params = {"conv": jax.random.normal(jax.random.key(0), (3, 3, 12, 12))}
    method = bsj.campfire(2 / 3, kind="inter_epoch", era=(0, 8), window_share=0.5)
    _, _, masks = trained(method, 9, params)
    slices = [mask["conv"].any((0, 1)).sum() for mask in masks]
    taps = [mask["conv"].sum((0, 1)).max() for mask in masks]
    assert taps[:5] == [9] * 5
    assert slices[4:] == [72] * 5
    assert slices[3] > 72
    assert taps[-1] == 6


def test_dead_channels_take_the_inputs_of_a_flattened_layer_along():
    """conv -> flatten of 2 x 2 positions -> dense: channel 2 of 4 loses all its slices."""
    conv = jnp.ones((1, 1, 6, 4)).at[..., 2].set(1e-3)
    fc = jnp.full((16, 3), 0.5).at[2::4].set(9.0)  # the largest weights read the dead channel
    method = bsj.campfire(0.25, kind="ck", era=(0, 1), fc="fine", feeds={"fc": "conv"})
    tx = bsj.sparse(method, optax.sgd(0.0))
    params = {"conv": conv, "fc": fc}
    state = tx.init(params)
    for _ in range(2):
        _, state = tx.update(params, state, params)
    masks = bsj.get_masks(state)
    assert masks["conv"].any((0, 1, 2)).tolist() == [True, True, False, True]
    assert masks["fc"].sum() == 36
    assert not masks["fc"][2::4].any()
    saved = bsj.metrics.eliminated_inputs(masks, {"fc": "conv"})
    assert saved == {"fc": bsj.metrics.Eliminated(inputs=4, weights=12)}
    # what they read is zero, so the layer computes the same without them
    x = jax.random.normal(jax.random.key(0), (5, 2, 2, 6))
    features = bsj.conv(x, jnp.where(masks["conv"], conv, 0), bsj.Dense()).reshape(5, -1)
    np.testing.assert_allclose(features @ fc, features @ jnp.where(masks["fc"], fc, 0), rtol=1e-5)


def test_channels_of_a_sum_are_dead_where_all_its_convolutions_are():
    masks = {
        "a": jnp.ones((1, 1, 8, 4), bool).at[..., :2].set(False),
        "b": jnp.ones((3, 3, 8, 4), bool).at[..., 1:3].set(False),
        "fc": jnp.zeros((4, 7), bool),
    }
    saved = bsj.metrics.eliminated_inputs(masks, {"fc": ("a", "b")})
    assert saved["fc"] == (1, 7)


def test_a_neuron_whose_inputs_are_all_dead_keeps_its_best_weight():
    """Channels 1, 2 and 3 die; neuron 0 has kept none of the weights of channel 0."""
    conv = jnp.full((1, 1, 8, 4), 1e-3).at[..., 0].set(1.0)
    fc = jnp.ones((4, 6)).at[:, 0].set(jnp.array([1e-6, 3.0, 5.0, 4.0]))
    method = bsj.campfire(0.75, kind="ck", era=(0, 2), fc="fine", feeds={"fc": "conv"})
    tx, params = bsj.sparse(method, optax.sgd(0.0)), {"conv": conv, "fc": fc}
    state, masks = tx.init(params), []
    for _ in range(3):
        _, state = tx.update(params, state, params)
        masks.append(bsj.get_masks(state))
    assert masks[-1]["conv"].any((0, 1, 2)).tolist() == [True, False, False, False]
    assert masks[-1]["fc"].any(0).all()
    assert masks[-1]["fc"][:, 1:].sum(0).tolist() == [1] * 5
    assert masks[-1]["fc"][0, 1:].all()
    assert masks[1]["fc"][:, 0].tolist() == [False, True, True, True]
    assert masks[2]["fc"][:, 0].tolist() == [False, False, True, False]


def test_dense_layers_stay_dense_without_fc():
    params = {name: jnp.ones(shape) for name, shape in SHAPES.items()}
    masks = bsj.get_masks(bsj.campfire(0.5, era=(0, 2)).init(params))
    assert masks["fc"].ndim == 0
    masks = bsj.get_masks(bsj.campfire(0.5, era=(0, 2), fc="block").init(params))
    assert masks["fc"].shape == (8, 5)


def test_stacked_kernels_are_pruned_each_by_itself():
    params = {"conv": jax.random.normal(jax.random.key(0), (2, 3, 3, 8, 8))}
    method = bsj.campfire(0.75, kind="ck", era=(0, 2))
    _, _, masks = trained(method, 4, params)
    assert masks[-1]["conv"].sum((1, 2, 3, 4)).tolist() == [144, 144]


def test_masks_stay_where_a_proposed_weight_is_not_finite():
    params = {"conv": jnp.ones((3, 3, 8, 8))}
    tx = bsj.sparse(bsj.campfire(0.5, era=(0, 4)), optax.sgd(0.1))
    state = tx.init(params)
    for _ in range(3):
        spoilt = {"conv": params["conv"].at[0, 0, 0, 0].set(jnp.nan)}
        _, state = tx.update(spoilt, state, params)
    assert bsj.get_masks(state)["conv"].all()
    assert int(state[0].nonfinite_updates) == 3


CHOICES = {
    "kind": ("kind", "windows", "kind: expected one of"),
    "era": ("era", 10, r"era: expected the first update and the number of updates"),
    "era start": ("era", (-1, 5), r"era\[0\]: expected a step"),
    "era length": ("era", (0, 0), r"era\[1\]: expected an integer of at least 1"),
    "exponent": ("exponent", 0.0, "exponent: expected a number above 0"),
    "window_share": ("window_share", 1.5, "window_share: expected a number in"),
    "fc": ("fc", "fined", "fc: expected one of 'block', 'fine'.*did you mean 'fine'"),
    "fc_block": ("fc_block", 5, "fc_block: expected 1 to 4, got 5"),
}


@pytest.mark.parametrize("case", CHOICES)
def test_bad_arguments(case):
    name, value, message = CHOICES[case]
    with pytest.raises(ValueError, match=message):
        bsj.campfire(0.5, **{"era": (0, 10), name: value})


@pytest.mark.parametrize(
    ("feeds", "message"),
    [
        ({"fcc": "conv3"}, "feeds: 'fcc' is no sparse layer"),
        ({"fc": ("conv3", "stem")}, "feeds: 'stem' is no sparse layer"),
        ({"conv1": "conv3"}, "feeds: expected a dense kernel"),
        ({"fc": ()}, "feeds: expected a dense kernel"),
        ({"fc": "conv1"}, "read the channels of a conv kernel once or several times, got 'conv1'"),
        ({"fc": "fc"}, "read the channels of a conv kernel once or several times, got 'fc'"),
    ],
)
def test_feeds_that_do_not_fit(feeds, message):
    params = {name: jnp.ones(shape) for name, shape in SHAPES.items()}
    method = bsj.campfire(0.5, era=(0, 2), fc="fine", feeds=feeds)
    with pytest.raises(ValueError, match=message):
        method.init(params)
