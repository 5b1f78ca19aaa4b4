"""A sparse method in optax's own tools, under donation, and in JAX's global modes."""

import contextlib
import functools

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from sparse_methods import METHODS, kinds_first, noise, slow_unless, small_tree

import blocksparse_jax as bsj
from blocksparse_jax import origins


@contextlib.contextmanager
def all_that_raise():
    """The modes that only refuse: in one pass, since none changes what another sees."""
    with contextlib.ExitStack() as modes:
        modes.enter_context(jax.numpy_rank_promotion("raise"))
        modes.enter_context(jax.numpy_dtype_promotion("strict"))
        modes.enter_context(jax.debug_nans(True))
        modes.enter_context(jax.enable_checks(True))
        yield


MODES = {
    "all that raise": all_that_raise,
    "x64": lambda: jax.enable_x64(True),
    "no jit": jax.disable_jit,
}


def sparse_adam(name, params):
    return bsj.sparse(METHODS[name](params), optax.adam(1e-2))


@pytest.mark.parametrize("name", METHODS)
def test_tree_map_params_reaches_the_moments_only(name, params):
    """Masks stay bool and layouts int32, and the state still trains."""
    tx = sparse_adam(name, params)
    state = tx.init(params)
    cast = optax.tree_map_params(tx, lambda moment: moment.astype(jnp.bfloat16), state)
    for moments in (cast[1][0].mu, cast[1][0].nu):
        assert {leaf.dtype for leaf in jax.tree.leaves(moments)} == {jnp.dtype(jnp.bfloat16)}
    chex.assert_trees_all_equal(cast[0], state[0])
    marked = optax.tree_map_params(
        tx, lambda _: "moment", state, transform_non_params=lambda _: "other"
    )
    assert marked[0] == "other"
    assert set(jax.tree.leaves(marked[1][0].mu)) == {"moment"}


@pytest.mark.parametrize("wrap", ["alone", "keep_zeros", "multi_transform", "MultiSteps"])
def test_tree_map_params_sees_through_what_wraps_a_method(wrap, params):
    method, labels = bsj.rigl(0.7, until=9), jax.tree.map(lambda _: "a", params)
    chain = bsj.keep_zeros(optax.chain(method, optax.adam(1e-2)))
    tx = {
        "alone": method,
        "keep_zeros": chain,
        "multi_transform": optax.multi_transform({"a": chain}, labels),
        "MultiSteps": optax.MultiSteps(chain, 2),
    }[wrap]
    state = tx.init(params)
    same = optax.tree_map_params(tx, lambda leaf: leaf, state)
    chex.assert_trees_all_equal(same, state)


def test_tree_get_and_tree_set_find_a_method_and_its_optimizer(params):
    tx = bsj.sparse(
        METHODS["hrbp"](params), optax.inject_hyperparams(optax.adam)(learning_rate=0.1)
    )
    state = tx.init(params)
    masks = optax.tree_utils.tree_get(state, "masks")
    chex.assert_trees_all_equal(masks, bsj.get_masks(state))
    state = optax.tree_utils.tree_set(state, learning_rate=jnp.asarray(0.5))
    assert float(optax.tree_utils.tree_get(state, "learning_rate")) == 0.5
    chex.assert_trees_all_equal(bsj.get_masks(state), masks)


@pytest.mark.parametrize("name", METHODS)
def test_no_buffer_lies_twice_in_params_state_masks_and_layouts(name):
    """Nor in the method itself: a step may donate what it takes."""
    tx = sparse_adam(name, small_tree())
    params = small_tree()
    state = tx.init(params)
    read = bsj.get_masks(state), bsj.get_layouts(state)
    places = {}
    for path, leaf in jax.tree.leaves_with_path((params, state, read, tx.init(params))):
        if leaf.size > 1:
            place = jax.tree_util.keystr(path)
            assert places.setdefault(leaf.unsafe_buffer_pointer(), place) == place


@pytest.mark.parametrize("name", kinds_first(METHODS))
def test_a_step_may_donate_params_and_state_beside_masks_and_layouts(name):
    tx, params = sparse_adam(name, small_tree()), small_tree()
    state = tx.init(params)
    read = bsj.get_masks(state), bsj.get_layouts(state)

    def step(params, state, read, grads):
        updates, state = tx.update(grads, state, params)
        kept = bsj.apply_masks(params, read[0])
        params = jax.tree.map(lambda p, u, k: p + u + 0 * k, params, updates, kept)
        return params, state, jax.tree.map(jnp.sum, jax.tree.leaves(read[1]))

    step = jax.jit(step, donate_argnums=(0, 1))
    for i in range(2):
        params, state, _ = step(params, state, read, noise(small_tree(), i))
    chex.assert_trees_all_equal(bsj.get_masks(tx.init(small_tree())), read[0])


@functools.cache
def trained_masks(name, mode):
    """The masks after four updates in a mode, and all that is read from the state there."""
    params = small_tree()
    grads = noise(params, 0)
    with MODES.get(mode, contextlib.nullcontext)():
        # optax.adam itself promotes dtypes.
        tx = bsj.sparse(METHODS[name](params), optax.sgd(0.1, momentum=0.9))
        state = tx.init(params)
        update = tx.update if mode == "no jit" else jax.jit(tx.update)
        for _ in range(4):
            updates, state = update(grads, state, params)
            params = optax.apply_updates(params, updates)
        layouts = bsj.get_layouts(state)
        values, packed = bsj.pack_tree(params, state, layouts, drop_pruned=True)
        bsj.unpack_tree(values, packed, layouts)
        bsj.apply_masks(bsj.masked(params, state), bsj.get_masks(state))
        assert bsj.summarize(params, state).density <= 1
        return bsj.get_masks(state)


@pytest.mark.parametrize("name", kinds_first(METHODS))
@pytest.mark.parametrize("mode", [slow_unless(mode != "no jit", mode) for mode in MODES])
def test_the_global_modes_of_jax_change_no_masks(mode, name):
    """Init, an update that moves masks, and what is read from the state."""
    chex.assert_trees_all_equal(trained_masks(name, mode), trained_masks(name, None))


SOON = bsj.between(2, 20, every=3)
TRACED = METHODS | {
    "given scores": lambda p: bsj.one_shot(0.7, scores=p),
    "one threshold": lambda p: bsj.gradual(
        0.7, pattern=bsj.patterns.one_by_n(16), schedule=SOON, budget="global"
    ),
    "blocks": lambda p: bsj.gradual(0.7, pattern=bsj.patterns.block(16), schedule=SOON),
    "blocks of a classifier": lambda p: bsj.campfire(0.5, era=(2, 18), fc="block"),
    "whole layers": lambda p: bsj.group_lasso(
        0.7, schedule=SOON, strength=0.5, threshold=1.0, depth=lambda name, leaf: True
    ),
}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", TRACED)
def test_the_modes_that_raise_let_every_method_pass(name, dtype):
    """What they refuse they refuse while a program is traced."""
    params = jax.tree.map(lambda leaf: leaf.astype(dtype), small_tree())
    with all_that_raise():
        tx = bsj.sparse(TRACED[name](params), optax.sgd(0.1, momentum=0.9))
        state = jax.eval_shape(tx.init, params)
        jax.eval_shape(tx.update, params, state, params)


def test_masks_under_prefix_labels_take_the_structure_of_params(params):
    chain = bsj.sparse(bsj.rigl(0.7, until=9), optax.sgd(0.1))
    labels = {"stem": "plain", "conv1": "sparse", "conv2": "sparse", "classifier": "plain"}
    tx = optax.multi_transform({"sparse": chain, "plain": optax.sgd(0.1)}, labels)
    state = tx.init(params)
    masks = bsj.get_masks(state, params)
    chex.assert_trees_all_equal_structs(masks, params)
    chex.assert_trees_all_equal(
        jax.tree.map(jnp.multiply, params, masks), bsj.apply_masks(params, bsj.get_masks(state))
    )
    with pytest.raises(ValueError, match="state: expected the tree structure of params"):
        bsj.get_masks(state, {"other": params["conv1"]})


@pytest.mark.parametrize("labels", ["of subtrees", "of leaves"])
def test_masks_under_prefix_labels_follow_the_moments_of_the_other_parts(labels, params):
    """Three parts, named as the params' own keys are: none is taken for another."""
    parts = {
        "stem": optax.sgd(0.1, momentum=0.9),
        "conv1": bsj.sparse(bsj.hrbp_prune(0.7, group_size=16), optax.sgd(0.1)),
        "classifier": optax.adam(1e-3),
    }
    names = {"stem": "stem", "conv1": "conv1", "conv2": "conv1", "classifier": "classifier"}
    if labels == "of leaves":
        names = {key: jax.tree.map(lambda _, k=key: names[k], params[key]) for key in names}
    state = optax.multi_transform(parts, names).init(params)
    masks, layouts = bsj.get_masks(state), bsj.get_layouts(state)
    chex.assert_trees_all_equal_structs(masks, params)
    chex.assert_trees_all_equal(
        jax.tree.map(jnp.multiply, params, masks), bsj.apply_masks(params, masks)
    )
    assert isinstance(layouts["conv1"]["kernel"], bsj.BlockLayout)
    assert layouts["classifier"] == {"kernel": bsj.Dense()}


def test_a_state_in_place_of_masks_is_named(params):
    state = sparse_adam("rigl", params).init(params)
    with pytest.raises(ValueError, match=r"masks: .*get_masks\(state\)"):
        bsj.apply_masks(params, state)


PRUNING = {  # in two steps
    "gradual-blocks": lambda p: bsj.gradual(
        0.7, pattern=bsj.patterns.one_by_n(16), schedule=bsj.between(0, 1)
    ),
    "subp-hard": lambda p: bsj.subp(0.5, block=16, schedule=bsj.between(0, 1), soft=False),
}


def foreign(name, step=0):
    """Params, a state and the layouts of a method, from other weights for another step."""
    params = jax.tree.map(lambda leaf: jnp.roll(leaf, step), small_tree())
    tx = bsj.sparse((METHODS | PRUNING)[name](params), optax.adam(1e-2))
    state = tx.init(params)
    for _ in range(2 if name in PRUNING else 0):
        _, state = tx.update(noise(params, step), state, params)
    return bsj.apply_masks(params, bsj.get_masks(state)), state, bsj.get_layouts(state)


@pytest.mark.parametrize("name", ["hrbp", "random-channel", "gradual-blocks", "subp-hard"])
def test_layouts_of_another_seed_or_step_are_refused(name):
    """Though all their shapes fit: in packing, and beside a packed state."""
    params, state, layouts = foreign(name)
    _, _, others = foreign(name if name != "random-channel" else "hrbp", step=1)
    if name == "random-channel":
        key = jax.random.key(9)
        others = bsj.random_channel_layouts(key, params, 0.7)
    message = "layouts: the one at 'conv1/kernel' is not that of the state"
    with pytest.raises(ValueError, match=message):
        bsj.pack_tree(params, state, others, drop_pruned=True)
    values, packed = bsj.pack_tree(params, state, layouts, drop_pruned=True)
    with pytest.raises(ValueError, match=message):
        bsj.unpack_tree(values, packed, others)
    chex.assert_trees_all_equal(bsj.get_layouts(packed), layouts)
    back, restored = bsj.unpack_tree(values, packed, bsj.get_layouts(packed))
    chex.assert_trees_all_equal(back, params)
    chex.assert_trees_all_equal_structs(restored, state)
    jitted = jax.jit(bsj.unpack_tree)(values, packed, layouts)[0]
    np.testing.assert_array_equal(jitted["conv1"]["kernel"], back["conv1"]["kernel"])


def of_seed(seed):
    """A layer's params, their packed values and layouts; equal shapes for every seed."""
    params = {"kernel": jax.random.normal(jax.random.key(seed), (3, 3, 16, 32))}
    state = bsj.hrbp_prune(0.9, group_size=8).init(params)
    layouts = bsj.get_layouts(state)
    params = bsj.apply_masks(params, bsj.get_masks(state))
    return params, bsj.pack_tree(params, state, layouts)[0], layouts


IMAGES = jnp.ones((2, 8, 8, 16))


def in_collection(values, layouts):
    model = bsj.linen.BlockSparseConv(32, (3, 3), use_bias=False)
    return model.apply({"params": values, "layouts": layouts}, IMAGES)


def in_use_layouts(values, layouts):
    with bsj.linen.use_layouts(layouts):
        return nn.Conv(32, (3, 3), use_bias=False).apply({"params": values}, IMAGES)


def in_nnx(values, layouts):
    model = bsj.nnx.BlockSparseConv(16, 32, 3, use_bias=False, rngs=nnx.Rngs(0))
    nnx.update(model, values)
    bsj.nnx.set_layouts(model, layouts)
    return model(IMAGES)


def in_conv(values, layouts):
    return bsj.conv(IMAGES, values["kernel"], layouts["kernel"])


def in_unpack(values, layouts):
    kernel = bsj.unpack(values["kernel"], layouts["kernel"])
    return bsj.conv(IMAGES, kernel, bsj.Dense())


@pytest.mark.parametrize("run", [in_collection, in_use_layouts, in_nnx, in_conv, in_unpack])
def test_packed_values_refuse_layouts_of_another_seed(run):
    """Though all shapes fit, as long as the values are the very arrays that were packed."""
    params, values, layouts = of_seed(0)
    expected = bsj.conv(IMAGES, params["kernel"], bsj.Dense())
    _, _, others = of_seed(1)
    equal = jax.tree.map(jnp.copy, layouts)
    for own in (layouts, equal):
        np.testing.assert_allclose(run(values, own), expected, atol=1e-5)
    with pytest.raises(ValueError, match="packed values are not of this layout, but of one of"):
        run(values, others)
    if run is not in_nnx:  # which sets layouts outside of jit
        jax.jit(run)(values, others)  # where the values are not known
    jax.tree.map(lambda array: array.delete(), layouts)
    np.testing.assert_allclose(run(values, equal), expected, atol=1e-5)


def test_notes_about_arrays_end_with_them():
    _, values, _ = of_seed(0)
    key = id(values["kernel"])
    assert key in origins._NOTES
    del values
    assert key not in origins._NOTES
