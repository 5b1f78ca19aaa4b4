"""Dense kernels are pruned as those of 1x1 convolutions, stacked kernels one by one."""

import warnings

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import serialization
from hypothesis import given, settings
from hypothesis import strategies as st
from sparse_methods import noise, slow_unless

import blocksparse_jax as bsj
from blocksparse_jax.budgets import layer_densities
from blocksparse_jax.counts import block_counts

P = bsj.patterns


def any_leaf(name, leaf):
    return True


def moving(pattern, **options):
    """Dynamic sparse training without random numbers, moving at step 2."""
    return bsj.drop_and_grow(
        0.5,
        pattern=pattern,
        scores="magnitude",
        fraction=0.6,
        budget="uniform",
        schedule=bsj.every(2),
        where=any_leaf,
        **options,
    )


def gradual(pattern, **options):
    schedule = bsj.between(0, 2, every=1)
    return bsj.gradual(0.5, pattern=pattern, schedule=schedule, where=any_leaf, **options)


# name -> method, the same masks in every run whatever the shape of the leaf
METHODS = {
    "hrbp": lambda: bsj.hrbp_prune(0.5, group_size=4, block_density=1.0, where=any_leaf),
    "hrbp, few taps": lambda: bsj.hrbp_prune(0.75, group_size=4, where=any_leaf),
    "hrbp, dynamic": lambda: moving(P.block(4, 1.0, 2)),
    "hrbp, gradual": lambda: gradual(P.block(4, 1.0)),
    "1xN": lambda: bsj.one_shot(0.5, pattern=P.one_by_n(4), where=any_leaf),
    "1xN, dynamic": lambda: moving(P.one_by_n(4)),
    "1xN, gradual": lambda: gradual(P.one_by_n(4)),
    "input channels, dynamic": lambda: moving(P.channel("input")),
    "output channels, gradual": lambda: gradual(P.channel("output")),
    "slices, dynamic": lambda: moving(P.kernel("max")),
    "rigl": lambda: moving(P.unstructured()),
    "snfs": lambda: moving(P.unstructured(), drop="magnitude", grow="momentum"),
    "gradual": lambda: gradual(P.unstructured()),
    "magnitude, erk": lambda: bsj.magnitude(0.5, budget="erk", where=any_leaf),
    "sr-ste": lambda: bsj.sr_ste(2, 4, where=any_leaf),
    "sr-ste, kernel": lambda: bsj.sr_ste(1, 4, axis="kernel", where=any_leaf),
    "subp, version 1": lambda: bsj.subp(
        0.5, block=4, schedule=bsj.between(0, 1), criterion="bpar", where=any_leaf
    ),
}
# Every pattern, and every kind of method; the other pairs of them are slow tests.
FAST = ["hrbp, few taps", "hrbp, dynamic", "1xN, gradual", "input channels, dynamic"]
FAST += ["slices, dynamic", "snfs", "magnitude, erk", "sr-ste", "subp, version 1"]


def every_method(leave_out=()):
    """Names of methods as parameters; those beyond `FAST` are slow tests."""
    return [slow_unless(name in FAST, name) for name in METHODS if name not in leave_out]


def train(method, params, gradients):
    """The parameters and the state after three updates."""
    tx = bsj.sparse(method, optax.sgd(0.1, momentum=0.9))
    state = tx.init(params)
    params = bsj.apply_masks(params, bsj.get_masks(state))
    for grads in gradients:
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
    return params, state


def assert_same(a, b):
    for left, right in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(left, right)


@pytest.mark.parametrize("name", every_method(leave_out=["hrbp, few taps"]))
def test_a_dense_kernel_trains_as_that_of_a_1x1_convolution(name):
    conv = {"w": jax.random.normal(jax.random.key(0), (1, 1, 16, 12)), "b": jnp.ones((1, 1, 8, 4))}
    dense = jax.tree.map(lambda leaf: leaf[0, 0], conv)
    gradients = [noise(conv, step) for step in range(3)]
    expected, of_conv = train(METHODS[name](), conv, gradients)
    found, of_dense = train(
        METHODS[name](), dense, [jax.tree.map(lambda leaf: leaf[0, 0], g) for g in gradients]
    )
    assert_same(found, jax.tree.map(lambda leaf: leaf[0, 0], expected))
    masks = bsj.get_masks(of_dense)
    assert_same(masks, jax.tree.map(lambda leaf: leaf[0, 0], bsj.get_masks(of_conv)))
    assert 0 < float(masks["w"].mean()) < 1
    layout, expected = bsj.get_layouts(of_dense)["w"], bsj.get_layouts(of_conv)["w"]
    assert_same(layout, expected)
    if isinstance(layout, bsj.BlockLayout):
        assert (layout.shape, expected.shape) == ((16, 12), (1, 1, 16, 12))
        assert layout.density == expected.density
        np.testing.assert_array_equal(bsj.layout_to_mask(bsj.validate(layout)), masks["w"])


@pytest.mark.parametrize("name", every_method())
def test_stacked_kernels_are_pruned_one_by_one(name):
    """Masks, layouts and weights are those of a separate run for each kernel."""
    stacked = {"w": jax.random.normal(jax.random.key(0), (2, 3, 2, 8, 12))}
    gradients = [noise(stacked, step) for step in range(3)]
    params, state = train(METHODS[name](), stacked, gradients)
    masks, layouts = bsj.get_masks(state)["w"], bsj.get_layouts(state)["w"]
    assert masks.shape == stacked["w"].shape
    assert 0 < float(masks.mean()) < 1
    for i in range(2):

        def one(tree, i=i):
            return jax.tree.map(lambda leaf: leaf[i], tree)

        expected, of_one = train(METHODS[name](), one(stacked), [one(g) for g in gradients])
        assert_same(one(params), expected)
        np.testing.assert_array_equal(masks[i], bsj.get_masks(of_one)["w"])
        layout = bsj.get_layouts(of_one)["w"]
        assert_same(one(layouts), layout)
        if isinstance(layout, bsj.BlockLayout):
            assert layouts.shape == layout.shape == (3, 2, 8, 12)
            assert layouts.packed_shape == layout.packed_shape
    if isinstance(layouts, bsj.BlockLayout):
        np.testing.assert_array_equal(bsj.layout_to_mask(bsj.validate(layouts)), masks)
        back = bsj.mask_to_layout(masks, layouts.filters)
        assert_same(back, layouts)


@pytest.mark.parametrize(
    "method",
    [
        lambda: bsj.set_(0.5, schedule=bsj.every(1), where=any_leaf),
        lambda: bsj.subp(0.5, block=4, schedule=bsj.between(0, 9), where=any_leaf),
        lambda: bsj.hrbp_prune(
            0.5, group_size=4, block_density=1.0, scores="random", where=any_leaf
        ),
    ],
    ids=["set", "subp", "hrbp"],
)
def test_random_methods_draw_for_every_kernel_of_a_stack(method):
    stacked = {"w": jnp.ones((4, 3, 3, 8, 8))}
    _, state = train(method(), stacked, [noise(stacked, step) for step in range(3)])
    masks = np.asarray(bsj.get_masks(state)["w"])
    assert len({mask.sum() for mask in masks}) == 1
    assert len({mask.tobytes() for mask in masks}) == 4


def test_random_channels_of_a_stack_differ_and_dense_kernels_have_them():
    params = {"s": jnp.ones((5, 3, 3, 16, 8)), "d": jnp.ones((16, 8))}
    layouts = bsj.random_channel_layouts(jax.random.key(0), params, 0.5, where=any_leaf)
    assert layouts["s"].channels.shape == (5, 1, 8)
    assert len({row.tobytes() for row in np.asarray(layouts["s"].channels)}) == 5
    assert layouts["d"].shape == (16, 8)
    state = bsj.fixed_masks(layouts=layouts).init(params)
    assert bsj.summarize(bsj.apply_masks(params, bsj.get_masks(state)), state).density == 0.5


@pytest.mark.parametrize("pattern", [P.kernel(), P.channel("input"), P.unstructured()])
def test_one_threshold_gives_every_kernel_of_a_stack_as_many_sets(pattern):
    """Each step of a stack counts all its kernels, so the density of all weights is reached."""
    keys = jax.random.split(jax.random.key(0), 2)
    scores = {
        "stack": jax.random.uniform(keys[0], (4, 3, 3, 16, 8)),
        "one": 3 * jax.random.uniform(keys[1], (3, 3, 16, 8)),
    }
    masks = bsj.masks_from_scores(scores, 0.5, pattern=pattern, budget="global")
    assert len({int(mask.sum()) for mask in masks["stack"]}) == 1
    kept = sum(int(mask.sum()) for mask in masks.values())
    assert abs(kept / (5 * 9 * 16 * 8) - 0.5) < 0.03
    assert float(masks["one"].mean()) > float(masks["stack"].mean())


def test_budgets_see_a_stack_as_that_many_layers():
    shape, other = (3, 3, 16, 32), (3, 3, 64, 64)
    apart = {"a": shape, "b": shape, "c": shape, "other": other}
    stacked = {"abc": (3, *shape), "other": other}
    for budget in ("erk", "er"):
        expected = layer_densities(budget, apart, 0.8)
        found = layer_densities(budget, stacked, 0.8)
        assert found["abc"] == pytest.approx(expected["a"])
        assert found["other"] == pytest.approx(expected["other"])
    counts = {
        name: block_counts(
            shapes,
            dict.fromkeys(shapes, 0.1),
            block_density=1 / 3,
            channel_blocks=dict.fromkeys(shapes, 1),
        )
        for name, shapes in (("apart", {"a": shape, "b": shape}), ("stacked", {"ab": (2, *shape)}))
    }
    assert counts["stacked"]["ab"] == counts["apart"]["a"]
    assert block_counts(
        {"d": (16, 32)}, {"d": 0.25}, block_density=1 / 3, channel_blocks={"d": 1}
    ) == {"d": (4, 1)}


@pytest.mark.parametrize(
    ("shape", "optimizer"),
    [
        slow_unless((len(shape) > 4) == (name == "sgd"), shape, optimizer, id=f"{shape}-{name}")
        for shape in [(16, 12), (2, 3, 3, 8, 8), (2, 2, 3, 3, 8, 8)]
        for name, optimizer in (("adamw", optax.adamw(0.1)), ("sgd", optax.sgd(0.1, momentum=0.9)))
    ],
)
def test_packed_training_continues_as_dense_training(shape, optimizer):
    params = {"w": jax.random.normal(jax.random.key(0), shape), "b": jnp.ones(8)}
    tx = bsj.sparse(
        bsj.hrbp_prune(0.5, group_size=4, block_density=1.0, where=lambda name, leaf: name == "w"),
        optimizer,
    )
    state = tx.init(params)
    params = bsj.apply_masks(params, bsj.get_masks(state))
    layouts = bsj.get_layouts(state)
    values, opt = bsj.pack_tree(params, state, layouts)
    assert values["w"].size == params["w"].size // 2
    moments = [leaf for leaf in jax.tree.leaves(opt) if jnp.shape(leaf) == values["w"].shape]
    assert len(moments) >= 1
    for step in range(2):
        grads = noise(params, step)
        packed, _ = bsj.pack_tree(grads, None, layouts)
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        updates, opt = tx.update(packed, opt, values)
        values = optax.apply_updates(values, updates)
    summary = bsj.summarize(values, opt)
    assert summary.rows[1].shape == shape
    assert summary.density == bsj.summarize(params, state).density == 0.5
    back, back_state = bsj.unpack_tree(values, opt, layouts)
    for a, b in zip(jax.tree.leaves((params, state)), jax.tree.leaves((back, back_state))):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6)
    assert jax.tree.structure(back_state) == jax.tree.structure(state)


@pytest.mark.parametrize("shape", [(16, 12), (3, 3, 3, 8, 8)], ids=str)
def test_layouts_of_other_ranks_are_written_and_read(shape):
    params = {"w": jax.random.normal(jax.random.key(0), shape)}
    method = bsj.hrbp_prune(0.5, group_size=4, block_density=1.0, where=any_leaf)
    state = method.init(params)
    other = method.init(jax.tree.map(lambda leaf: -leaf[..., ::-1], params))
    restored = serialization.from_state_dict(other, serialization.to_state_dict(state))
    assert_same(restored, state)
    assert bsj.get_layouts(restored)["w"].shape == bsj.get_layouts(state)["w"].shape


def stacked_case():
    params = {"w": jax.random.normal(jax.random.key(0), (3, 3, 3, 8, 8))}
    state = bsj.hrbp_prune(0.5, group_size=4, block_density=1.0).init(params)  # default where
    kernels = bsj.apply_masks(params, bsj.get_masks(state))["w"]
    return kernels, bsj.get_layouts(state)["w"], jax.random.normal(jax.random.key(1), (2, 6, 6, 8))


@pytest.mark.parametrize("is_packed", [False, True])
def test_conv_in_a_scan_over_a_stack(is_packed):
    kernels, layouts, x = stacked_case()
    weights = bsj.pack(kernels, layouts) if is_packed else kernels

    @jax.jit
    def scanned(x, weights, layouts):
        def layer(x, one):
            return jnp.tanh(bsj.conv(x, *one)), None

        return jax.lax.scan(layer, x, (weights, layouts))[0]

    def dense(x, kernels):
        for kernel in kernels:
            x = jnp.tanh(bsj.conv(x, kernel, bsj.Dense()))
        return x

    np.testing.assert_allclose(scanned(x, weights, layouts), dense(x, kernels), atol=1e-5)
    gradient = jax.grad(lambda w: (scanned(x, w, layouts) ** 2).sum())(weights)
    expected = jax.grad(lambda w: (dense(x, w) ** 2).sum())(kernels)
    gradient = bsj.unpack(gradient, layouts) if is_packed else gradient
    expected = jnp.where(bsj.layout_to_mask(layouts), expected, 0)
    np.testing.assert_allclose(gradient, expected, rtol=1e-4, atol=1e-4)


def test_a_vmapped_ensemble_runs_stacked_layouts():
    kernels, layouts, x = stacked_case()
    found = jax.vmap(lambda kernel, layout: bsj.conv(x, kernel, layout))(kernels, layouts)
    expected = jnp.stack([bsj.conv(x, kernel, bsj.Dense()) for kernel in kernels])
    np.testing.assert_allclose(found, expected, atol=1e-4)


def test_nn_scan_takes_stacked_layouts():
    """Params and layouts of `nn.scan` are stacked alike, and `hrbp_prune` finds them by default."""

    class Layer(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            return nn.relu(bsj.linen.BlockSparseConv(8, (3, 3))(x)), None

    variable_axes = {"params": 0, "layouts": 0}
    layers = nn.scan(Layer, variable_axes=variable_axes, split_rngs={"params": True}, length=3)()
    x = jax.random.normal(jax.random.key(1), (2, 6, 6, 8))
    params = layers.init(jax.random.key(0), x, None)["params"]
    state = bsj.hrbp_prune(0.5, group_size=4, block_density=1.0).init(params)
    params = bsj.apply_masks(params, bsj.get_masks(state))
    variables = {"params": params, "layouts": bsj.get_layouts(state)}
    y, _ = layers.apply(variables, x, None)
    expected, _ = layers.apply({"params": params}, x, None)
    np.testing.assert_allclose(y, expected, atol=1e-5)


@pytest.mark.parametrize(
    "call", [bsj.conv, lambda x, w, layout: bsj.choose_implementation(x, layout)]
)
def test_a_stack_of_layouts_is_no_layout_of_one_convolution(call):
    kernels, layouts, x = stacked_case()
    with pytest.raises(ValueError, match=r"layout: .* got a stack of \(3,\); .* lax.scan"):
        call(x, kernels[0], layouts)


def test_the_default_choice_and_what_it_leaves_out():
    params = {
        "stack": jnp.ones((4, 3, 3, 16, 16)),
        "conv": jnp.ones((3, 3, 16, 16)),
        "stem": jnp.ones((3, 3, 3, 16)),
        "stacked_stems": jnp.ones((4, 3, 3, 32, 16)),
        "depthwise": jnp.ones((4, 3, 3, 1, 16)),
        "classifier": jnp.ones((16, 10)),
    }
    state = bsj.rigl(0.5, schedule=bsj.every(100)).init(params)
    sparse = {name for name, mask in bsj.get_masks(state).items() if jnp.ndim(mask)}
    assert sparse == {"stack", "conv"}
    summary = bsj.summarize(bsj.apply_masks(params, bsj.get_masks(state)), state)
    assert [row.name for row in summary.dense_convs] == ["depthwise", "stacked_stems", "stem"]
    assert (
        "dense, though conv kernels by shape: depthwise (4x3x3x1x16), stacked_stems "
        "(4x3x3x32x16), stem (3x3x3x16)" in str(summary)
    )
    many = {f"stem{i}": jnp.ones((3, 3, 3, 8)) for i in range(9)} | {"conv": params["conv"]}
    state = bsj.magnitude(0.5).init(many)
    text = str(bsj.summarize(bsj.apply_masks(many, bsj.get_masks(state)), state))
    assert "stem7 (3x3x3x8) and 1 more" in text
    state = bsj.magnitude(0.5).init({"conv": params["conv"]})
    assert "by shape" not in str(bsj.summarize({"conv": jnp.zeros((3, 3, 16, 16))}, state))


@pytest.mark.parametrize(
    "pattern", [P.block(4), P.one_by_n(4), P.kernel(), P.window(), P.n_of_m(2, 4)], ids=str
)
@pytest.mark.parametrize("shape", [(3, 8, 8), (8,), (), (0, 8), (2, 0, 3, 8, 8)], ids=str)
def test_leaves_without_kernels_are_refused_by_name(pattern, shape):
    with pytest.raises(ValueError, match=r"params\['w'\]: expected a conv kernel"):
        pattern.check_leaves({"w": jnp.ones(shape)})


def test_leaves_of_three_axes_under_patterns_that_fit_any():
    """Single weights take any leaf; `[k, cin, cout]` of a 1-D convolution has channels."""
    scores = {"w": jnp.arange(3.0 * 8 * 8).reshape(3, 8, 8)}
    mask = bsj.masks_from_scores(scores, 0.5, where=any_leaf)["w"]
    assert int(mask.sum()) == 96
    mask = bsj.masks_from_scores(scores, 0.5, pattern=P.channel(), where=any_leaf)["w"]
    assert mask.any((0, 1)).tolist() == mask.all((0, 1)).tolist()
    assert int(mask.any((0, 1)).sum()) == 4


def test_fixed_masks_of_other_ranks_have_layouts():
    dense = jnp.zeros((4, 6), bool).at[:2, :3].set(True).at[2:, 3:].set(True)
    masks = {"d": dense, "s": jnp.stack([dense, ~dense])[:, None, None], "any": jnp.eye(3) > 0}
    state = bsj.fixed_masks(masks).init(jax.tree.map(lambda mask: mask + 1.0, masks))
    layouts = bsj.get_layouts(state)
    for name in ("d", "s"):
        np.testing.assert_array_equal(bsj.layout_to_mask(layouts[name]), masks[name])
    assert layouts["s"].filters.shape == (2, 2, 3)


def test_mask_to_layout_reads_what_a_pattern_drew():
    scores = jax.random.uniform(jax.random.key(0), (2, 2, 3, 3, 8, 8))
    layout = bsj.layouts_from_scores({"w": scores}, 0.5, pattern=P.one_by_n(4))["w"]
    mask = bsj.layout_to_mask(layout)
    assert mask.shape == scores.shape
    read = bsj.mask_to_layout(mask, layout.filters[0, 0])
    assert_same(read, layout)
    assert float(bsj.kept_score(scores, layout)) == pytest.approx(
        float(jnp.where(mask, scores, 0).sum()), rel=1e-5
    )


@given(
    pattern=st.sampled_from(
        (
            P.block(4, 1.0),
            P.block(3, 1.0, 2),
            P.one_by_n(3),
            P.kernel(),
            P.window(),
            P.channel("input"),
            P.channel("output"),
            P.unstructured(),
            P.n_of_m(1, 2),
        )
    ),
    stack=st.lists(st.integers(1, 3), max_size=2),
    kernel=st.tuples(*(st.integers(1, 3) for _ in range(2))),
    cin=st.integers(1, 4),
    cout=st.integers(1, 7),
    density=st.floats(0.05, 1),
    seed=st.integers(0, 9),
)
@settings(max_examples=3, deadline=None)
def test_any_stack_is_drawn_moved_and_read_kernel_by_kernel(
    pattern, stack, kernel, cin, cout, density, seed
):
    """Draws of few different numbers, so that ties are many."""
    shape = (*stack, *kernel, 2 * cin, cout)
    scores = jnp.round(4 * jax.random.uniform(jax.random.key(seed), shape))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # few sets miss the density
        count = pattern.counts({"w": shape}, {"w": density})["w"]
    units = pattern.units(shape)
    assert units.rows * units.sets * units.weights == scores.size
    kept = pattern.draw(scores, count)
    sets = pattern.kept_sets(kept.mask, kept.layout)
    assert sets.shape == (units.rows, units.sets)
    moved = pattern.move(sets, kept.mask, kept.layout)
    assert_same(moved, kept)
    one = [pattern.draw(scores[i], count) for i in np.ndindex(*stack)]
    masks = jnp.stack([layer.mask for layer in one])
    np.testing.assert_array_equal(kept.mask, masks.reshape(shape))
    if isinstance(kept.layout, bsj.BlockLayout):
        stacked = jax.tree.map(lambda *a: jnp.stack(a), *(layer.layout for layer in one))
        for a, b in zip(jax.tree.leaves(kept.layout), jax.tree.leaves(stacked), strict=True):
            np.testing.assert_array_equal(a, b.reshape(a.shape))
        packed = bsj.pack(scores, kept.layout)
        assert packed.shape == (*stack, *kept.layout.packed_shape)
        np.testing.assert_array_equal(
            bsj.unpack(packed, kept.layout), jnp.where(kept.mask, scores, 0)
        )
