"""Sizes and densities that a layer cannot have: what is used instead, and what says so."""

import jax
import jax.numpy as jnp
import pytest

import blocksparse_jax as bsj
from blocksparse_jax.counts import block_counts


def kernel(*shape):
    return jax.random.normal(jax.random.key(0), shape)


@pytest.mark.parametrize(
    ("sparsity", "taps"), [(0.0, 9), (0.3, 7), (0.5, 5), (0.6, 4), (2 / 3, 3), (0.9, 3)]
)
def test_block_density_adapts_to_the_sparsity_and_says_so(sparsity, taps):
    params = {"conv": kernel(3, 3, 64, 64)}
    if taps > 3:
        text = rf"block_density: 1/3 of the taps .* 'conv', which keeps {taps} of 9 taps; pass"
        with pytest.warns(UserWarning, match=text):
            state = bsj.hrbp_prune(sparsity).init(params)
    else:
        state = bsj.hrbp_prune(sparsity).init(params)
    assert bsj.get_layouts(state)["conv"].packed_shape[2] == taps
    assert bsj.summarize(params, state).density == pytest.approx(1 - sparsity, abs=0.005)
    assert f"x {taps} taps" in str(bsj.summarize(params, state))


def test_each_layer_has_the_taps_that_its_own_density_needs():
    shapes = {"a": (3, 3, 64, 64), "b": (3, 3, 64, 64), "c": (1, 1, 64, 64)}
    densities, runs = {"a": 0.2, "b": 0.6, "c": 0.9}, dict.fromkeys(shapes, 1)
    with pytest.warns(UserWarning, match="density 0.6000 at 'b', which keeps 6 of 9 taps; pass"):
        counts = block_counts(shapes, densities, block_density=None, channel_blocks=runs)
    assert {name: count.kept_taps for name, count in counts.items()} == {"a": 3, "b": 6, "c": 1}
    for name, (kh, kw, cin, _) in shapes.items():
        reached = counts[name].kept * counts[name].kept_taps / (kh * kw * cin)
        assert reached == pytest.approx(densities[name], abs=0.03)


def test_a_given_block_density_that_cannot_hold_the_density_is_refused():
    with pytest.raises(ValueError, match=r"block_density: 0\.3333 keeps at most"):
        bsj.hrbp_prune(0.5, block_density=1 / 3).init({"conv": kernel(3, 3, 64, 64)})


COLLAPSES = {
    "group_size": (lambda: bsj.hrbp_prune(0.8, group_size=16), (3, 3, 32, 62), "62.*16 is 2"),
    "channel_block": (lambda: bsj.hrbp_prune(0.8, channel_block=8), (3, 3, 37, 64), "37.*8 is 1"),
    "block": (lambda: bsj.subp(0.8, schedule=bsj.between(0, 1)), (3, 3, 32, 37), "37.*16 is 1"),
}


@pytest.mark.parametrize("argument", COLLAPSES)
def test_a_size_that_collapses_is_named_with_its_layer(argument):
    method, shape, sizes = COLLAPSES[argument]
    with pytest.warns(UserWarning, match=f"{argument}: 'net/conv' has an axis of {sizes}"):
        method().init({"net": {"conv": kernel(*shape)}})


@pytest.mark.parametrize("filters", [16, 24, 34, 48, 7])
def test_a_divisor_of_at_least_half_passes_without_a_warning(filters):
    """As large as the layer allows, or more than half of what was asked for."""
    state = bsj.hrbp_prune(0.8, group_size=32).init({"conv": kernel(3, 3, 64, filters)})
    assert bsj.get_layouts(state)["conv"].packed_shape[3] * 2 >= min(32, filters)


@pytest.mark.parametrize(
    "make",
    [
        lambda p: bsj.keep_zeros(bsj.subp(0.9, schedule=bsj.between(0, 1))),
        lambda p: bsj.hrbp_prune(0.9),
        lambda p: bsj.rigl(0.9, until=9),
        lambda p: bsj.fixed_masks(layouts=bsj.random_channel_layouts(jax.random.key(0), p, 0.9)),
        lambda p: bsj.fixed_masks(
            layouts=jax.jit(bsj.random_channel_layouts, static_argnums=2)(
                jax.random.key(0), p, 0.9
            ),
            sparsity=0.9,
        ),
    ],
    ids=["subp", "hrbp", "rigl", "random-channel", "random-channel of a jitted draw"],
)
def test_the_target_of_a_summary_is_what_was_asked_for(make):
    """16 channels hold no tenth: SUBP keeps two, random channels two at 7 taps."""
    params = {"conv": kernel(3, 3, 16, 32)}
    tx = make(params)
    state = tx.init(params)
    for _ in range(3):
        _, state = tx.update(params, state, params)
    params = bsj.apply_masks(params, bsj.get_masks(state))
    assert "(target 0.1000)" in str(bsj.summarize(params, state)).splitlines()[-1]
    assert bsj.get_spec(state).density == pytest.approx(0.1)


def test_given_masks_without_a_sparsity_are_their_own_target():
    masks = {"conv": jnp.arange(64).reshape(1, 1, 8, 8) < 16}
    assert bsj.get_spec(bsj.fixed_masks(masks).init({"conv": kernel(1, 1, 8, 8)})).density == 0.25
    with pytest.raises(ValueError, match="sparsity: expected a number in"):
        bsj.fixed_masks(masks, sparsity=1.5)
