"""What the first call of a method compiles: one program, or one loop, for all layers of a shape."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import blocksparse_jax as bsj
from blocksparse_jax import masks as masks_
from blocksparse_jax import selection
from blocksparse_jax.alike import map_alike
from blocksparse_jax.grouping import search_together

METHODS = {
    "hrbp": lambda: bsj.hrbp_prune(0.75, group_size=16, block_density=1.0),
    "rigl": lambda: bsj.rigl(0.75, budget="uniform", update_every=2, until=9),
    "subp": lambda: bsj.keep_zeros(bsj.subp(0.75, block=16, start=0, end=9)),
    "gradual": lambda: bsj.gradual_magnitude(0.75, start=0, end=9),
}


def layers(number):
    """As many layers of each of two shapes."""
    shapes = {"a": (3, 3, 16, 32), "b": (1, 1, 32, 32)}
    key = jax.random.key(0)
    return {
        f"{name}{i}": jax.random.normal(jax.random.fold_in(key, i), shape)
        for name, shape in shapes.items()
        for i in range(number)
    }


def test_init_compiles_one_program_for_all_layers_of_a_shape():
    masks_._compiled_draw.clear_cache()
    METHODS["rigl"]().init(layers(3))
    assert masks_._compiled_draw._cache_size() == 2


SEARCHED = {  # two searches: of 32 filters with and without a choice of taps
    "kernel": (1, 1, 24, 32),
    "wide": (1, 1, 64, 32),
    "dense": (40, 32),
    "image": (3, 3, 16, 32),
    "stack": (2, 3, 3, 8, 32),
}


def searched(seed):
    """Scores of both signs, so that the padding of narrow layers would be among the best."""
    return {
        name: jax.random.normal(jax.random.fold_in(jax.random.key(seed), place), shape)
        for place, (name, shape) in enumerate(SEARCHED.items())
    }


def test_hrbp_compiles_one_search_for_layers_of_as_many_filters():
    search_together._find_unoptimized.clear_cache()
    pattern = bsj.patterns.block(group_size=8)
    bsj.layouts_from_scores(searched(0), 0.8, pattern=pattern, where=lambda *_: True)
    assert search_together._find_unoptimized._cache_size() == 2


@pytest.mark.parametrize("channel_block", [1, 4])
def test_layers_searched_together_get_what_they_get_alone(channel_block):
    pattern = bsj.patterns.block(group_size=8, channel_block=channel_block)
    draw = functools.partial(
        bsj.layouts_from_scores, sparsity=0.8, pattern=pattern, where=lambda *_: True
    )
    scores = searched(1)
    together = draw(scores)
    chex.assert_trees_all_equal(together, jax.jit(draw)(scores))
    shapes = jax.eval_shape(draw, scores)
    chex.assert_trees_all_equal_shapes_and_dtypes(shapes, together)
    for name, layout in together.items():
        bsj.validate(layout)
        conv = scores[name].reshape(-1, *layout.kernels.conv_shape)
        for place, kernel in enumerate(conv):
            kept, kept_taps = layout.packed_shape[-3:-1]
            alone = bsj.hrbp_groups(
                kernel,
                group_size=8,
                kept=kept,
                kept_taps=kept_taps,
                channel_block=channel_block,
            )
            for field in ("filters", "channels", "taps"):
                found = getattr(layout, field)
                found = found[place] if name == "stack" else found
                np.testing.assert_array_equal(found, getattr(alone, field))
    masks = bsj.masks_from_scores(scores, 0.8, pattern=pattern, where=lambda *_: True)
    chex.assert_trees_all_equal(
        masks, jax.tree.map(bsj.layout_to_mask, together, is_leaf=bsj.is_layout)
    )


@pytest.mark.parametrize("name", ["rigl", "subp", "gradual"])
def test_an_update_selects_in_one_loop_for_all_layers_of_a_shape(name):
    """The program of 12 layers holds as many sorts and loops as that of 6."""

    def program(number):
        params = layers(number)
        tx = METHODS[name]()
        return str(jax.make_jaxpr(tx.update)(params, tx.init(params), params))

    few, many = program(3), program(6)
    for part in (" sort[", "scan[", "while["):
        assert few.count(part) == many.count(part)
    assert few.count("scan[") >= 2


@pytest.mark.parametrize("name", ["rigl", "gradual"])
def test_single_weights_select_in_one_loop_for_all_layers_of_a_size(name):
    """Layers of 4096 weights in four shapes; the stacked kernels of one stay as they are."""
    shapes = {
        "a": (1, 1, 64, 64),
        "b": (1, 1, 32, 128),
        "c": (2, 2, 16, 64),
        "d": (2, 1, 1, 32, 64),
    }
    params = {
        leaf: jax.random.normal(jax.random.key(i), shape)
        for i, (leaf, shape) in enumerate(shapes.items())
    }
    tx = METHODS[name]()

    def sorts(params):
        return str(jax.make_jaxpr(tx.update)(params, tx.init(params), params)).count(" sort[")

    assert sorts(params) == 2 * sorts({"a": params["a"]})
    state = tx.init(params)
    update = jax.jit(tx.update)
    for _ in range(3):
        _, state = update(params, state, params)
    for leaf, mask in bsj.get_masks(state).items():
        assert mask.shape == shapes[leaf]


@pytest.mark.parametrize(
    "method",
    [
        lambda: bsj.dsr(0.75, schedule=bsj.every(1)),
        lambda: bsj.deep_r(0.75),
        lambda: bsj.mest(0.75, schedule=bsj.between(0, 9)),
        lambda: bsj.granet(0.75, schedule=bsj.between(0, 9)),
    ],
    ids=["dsr", "deep-r", "mest", "granet"],
)
def test_exchanges_of_single_weights_share_a_loop_too(method):
    """Three layers of one size in three shapes, or in one."""
    tx = bsj.sparse(method(), optax.sgd(0.1))

    def sorts(shapes):
        params = {str(i): jnp.ones(shape) for i, shape in enumerate(shapes)}
        return str(jax.make_jaxpr(tx.update)(params, tx.init(params), params)).count(" sort[")

    shapes = [(1, 1, 64, 64), (1, 1, 32, 128), (2, 2, 16, 64)]
    assert sorts(shapes) == sorts(3 * shapes[:1]) < sorts([*shapes, (1, 1, 8, 8)])


def test_subp_folds_the_places_of_all_layers_into_its_key_at_once():
    def programs(number):
        params = {str(i): jnp.ones((1, 1, 8 + i, 32)) for i in range(number)}
        tx = METHODS["subp"]()
        jaxpr = str(jax.make_jaxpr(tx.update)(params, tx.init(params), params))
        return jaxpr.count("random_fold_in")

    assert programs(4) == programs(1) > 0


def test_init_makes_no_memory_that_no_method_asked_for():
    """Nor compiles it: that was one program of zeros for every shape."""
    params = {"a": jax.random.normal(jax.random.key(0), (1, 1, 24, 40))}
    jaxpr = str(jax.make_jaxpr(METHODS["gradual"]().init)(params))
    assert "f32[1,1,24,40] = broadcast_in_dim" not in jaxpr


def test_masks_are_drawn_inside_jit_from_scores_outside_of_it():
    """Where options of a compilation of its own are refused."""
    scores = layers(1)

    def masks(x):
        return bsj.masks_from_scores(scores, 0.5), x

    chex.assert_trees_all_equal(jax.jit(masks)(1.0)[0], bsj.masks_from_scores(scores, 0.5))


def test_layers_that_share_a_loop_get_what_they_get_alone():
    """Also where their keys, counts and layouts differ."""
    params = layers(3)
    for name, make in METHODS.items():
        tx = bsj.sparse(make(), optax.sgd(0.1))
        state = tx.init(params)
        _, moved = tx.update(params, state, params)
        _, jitted = jax.jit(tx.update)(params, state, params)
        chex.assert_trees_all_equal(bsj.get_masks(moved), bsj.get_masks(jitted))
        if name == "gradual":
            for leaf in params:
                one = {leaf: params[leaf]}
                _, alone = tx.update(one, tx.init(one), one)
                np.testing.assert_array_equal(
                    bsj.get_masks(alone)[leaf], bsj.get_masks(moved)[leaf]
                )


def test_map_alike_keeps_the_order_and_tells_static_parts_apart():
    arrays = {"b": jnp.arange(3.0), "a": jnp.ones(2), "c": jnp.arange(3.0), "d": 2 * jnp.ones(3)}
    times = {"a": 1, "b": 2, "c": 3, "d": 2}
    results = map_alike(lambda array, by: {"sum": by * array.sum()}, arrays, times)
    assert list(results) == list(arrays)
    assert [float(results[name]["sum"]) for name in arrays] == [6.0, 2.0, 9.0, 12.0]


SPECIAL = np.array([np.nan, np.inf, -np.inf, 0.0, -0.0, 1e-42, -1e-42, 1.0, 1.0, -1.0], np.float32)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (5, 64), (3, 1000), (400, 4)])
def test_bisection_selects_what_ranks_select(shape, dtype):
    """Among ties, signed zeros, subnormals, infinities and NaN, for counts below 0 and above n."""
    rng = np.random.default_rng(0)
    ties = np.round(rng.standard_normal(shape))
    special = np.where(rng.random(shape) < 0.5, rng.choice(SPECIAL, shape), ties)
    for values in (rng.standard_normal(shape), ties, special):
        scores = jnp.asarray(values, dtype)
        n = shape[-1]
        for count in (-1, 0, 1, n // 2, n, n + 1, rng.integers(0, n + 1, (shape[0], 1))):
            np.testing.assert_array_equal(
                selection.bisect(scores.astype(jnp.float32), count),
                selection.ranks(scores) < count,
            )


def test_many_scores_are_bisected_with_exact_counts():
    """Of scores with two roundings too, which a program may compute more than once."""
    keys = jax.random.split(jax.random.key(0), 3)
    a, b, c = (jax.random.normal(key, (1, selection._LARGE)) for key in keys)
    marks = jax.jit(lambda a, b, c, n: selection.highest_in_rows(a * b + c * a, n))
    for count in (0, 1, 1234, selection._LARGE - 1):
        assert int(marks(a, b, c, count).sum()) == count
    assert " sort" not in str(jax.make_jaxpr(marks)(a, b, c, 1))
