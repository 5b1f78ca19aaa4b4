"""Bad input: the message names the argument, the value and what was expected."""

import re

import jax
import jax.numpy as jnp
import optax
import pytest

import blocksparse_jax as bsj

KERNEL = jnp.ones((3, 3, 16, 32))
LAYOUT = bsj.random_groups(jax.random.key(0), KERNEL.shape, group_size=16, kept=4, kept_taps=3)
X = jnp.ones((2, 8, 8, 16))


@pytest.mark.parametrize("sparsity", [-0.1, 1.0, 1.5, float("nan"), "high", None])
@pytest.mark.parametrize(
    "make",
    [
        lambda s: bsj.hrbp_prune(s, group_size=16),
        lambda s: bsj.rigl(s, until=10),
        lambda s: bsj.subp(s, start=0, end=1),
        lambda s: bsj.gradual_magnitude(s, start=0, end=1),
        lambda s: bsj.random_masks(jax.random.key(0), {"w": KERNEL}, s),
        lambda s: bsj.random_channel_layouts(jax.random.key(0), {"w": KERNEL}, s),
    ],
    ids=["hrbp", "rigl", "subp", "gradual", "random", "random-channel"],
)
def test_sparsity_outside_its_range(make, sparsity):
    with pytest.raises(ValueError, match=r"sparsity: expected a number in \[0.0, 1.0\), got "):
        make(sparsity)


BAD_METHODS = {
    "group_size: expected an integer of at least 1, got 0": lambda: bsj.hrbp_prune(
        0.5, group_size=0
    ),
    "group_size: expected an integer of at least 1, got 2.5": lambda: bsj.hrbp_prune(
        0.5, group_size=2.5
    ),
    "channel_block: expected an integer of at least 1, got -8": lambda: bsj.hrbp_prune(
        0.5, group_size=8, channel_block=-8
    ),
    "block_density: expected a number in": lambda: bsj.hrbp_prune(
        0.5, group_size=8, block_density=0.0
    ),
    "did you mean 'magnitude'": lambda: bsj.hrbp_prune(0.5, group_size=8, scores="magnitud"),
    "schedule: expected a schedule such as every(100": lambda: bsj.hrbp_prune(
        0.5, group_size=8, update=100
    ),
    "drop_fraction: expected a number": lambda: bsj.rigl(0.5, until=10, drop_fraction=1.5),
    "update_every: expected an integer of at least 1, got 0": lambda: bsj.rigl(
        0.5, until=10, update_every=0
    ),
    "until: expected a step after start=20, got 10": lambda: bsj.rigl(0.5, start=20, until=10),
    "end: expected a step after start=5": lambda: bsj.gradual_magnitude(0.5, start=5, end=5),
    "initial_sparsity: expected at most": lambda: bsj.gradual_magnitude(
        0.5, start=0, end=5, initial_sparsity=0.7
    ),
    "block: expected an integer": lambda: bsj.subp(0.5, block=0, start=0, end=1),
    "did you mean 'l1'": lambda: bsj.subp(0.5, criterion="l11", start=0, end=1),
    "did you mean 'cubic'": lambda: bsj.subp(0.5, schedule="cubik", start=0, end=1),
    "version: expected 1": lambda: bsj.subp(0.5, version=3, start=0, end=1),
    "tau: expected a number above 0": lambda: bsj.subp(0.5, tau=0.0, start=0, end=1),
    "alpha: expected a number of at least 0, got -1": lambda: bsj.subp(
        0.5, alpha=-1, start=0, end=1
    ),
    "decay: expected a number of at least 0, got nan": lambda: bsj.subp(
        0.5, decay=float("nan"), start=0, end=1
    ),
    "until: expected a step, an integer of at least 0, got 'x'": lambda: bsj.rigl(0.5, until="x"),
    "until: expected a step, an integer of at least 0, got nan": lambda: bsj.rigl(
        0.5, until=float("nan")
    ),
    "start: expected a step, an integer of at least 0, got -5": lambda: bsj.rigl(
        0.5, start=-5, until=10
    ),
    "start: expected a step, an integer of at least 0, got 'a'": lambda: bsj.subp(
        0.5, start="a", end=9
    ),
    "start: expected a step, an integer of at least 0, got 0.5": lambda: bsj.subp(
        0.5, start=0.5, end=3.2
    ),
    "end: expected a step, an integer of at least 0, got 3.2": lambda: bsj.subp(
        0.5, start=0, end=3.2
    ),
    "end: expected a step after start=7, got 7": lambda: bsj.subp(0.5, start=7, end=7),
    "start: expected a step, an integer of at least 0, got None": lambda: bsj.gradual_magnitude(
        0.5, start=None, end=9
    ),
    "end: expected a step, an integer of at least 0, got True": lambda: bsj.gradual_magnitude(
        0.5, start=0, end=True
    ),
    "start: expected a step, an integer of at least 0, got -1": lambda: bsj.periodic(2, start=-1),
    "until: expected a step after start=4, got 4": lambda: bsj.periodic(2, start=4, until=4),
    "until: expected a step, an integer of at least 0, got inf": lambda: bsj.periodic(
        2, until=float("inf")
    ),
    "until: expected a step, an integer of at least 0 (static: inject_hyperparams(...": lambda: (
        optax.inject_hyperparams(
            bsj.rigl, static_args=("sparsity", "update_every", "start", "drop_fraction")
        )(sparsity=0.5, until=9).init({"w": KERNEL})
    ),
    "inner: expected an optax transformation such as optax.chain(rigl(...), "
    "optax.sgd(0.1)), got 3": lambda: bsj.keep_zeros(3),
    "inner: expected an optax transformation such as optax.chain(rigl(...), "
    "optax.sgd(0.1)), got <function": lambda: bsj.keep_zeros(optax.sgd),
    "power: expected a number above 0, got 0": lambda: bsj.gradual_magnitude(
        0.5, start=0, end=5, power=0
    ),
    "sparsity: expected a number in [0.0, 1.0), got '0.9'": lambda: bsj.hrbp_prune("0.9"),
    "sparsity: expected a number in [0.0, 1.0), got False": lambda: bsj.hrbp_prune(False),
    "key: expected one JAX random key such as jax.random.key(0), got 0": lambda: bsj.rigl(
        0.5, until=9, key=0
    ),
    "key: expected one JAX random key such as jax.random.key(0), got key<fry>[2]": lambda: (
        bsj.hrbp_prune(0.5, key=jax.random.split(jax.random.key(0)))
    ),
    "group_size: expected an integer of at least 1 (static: inject_hyperparams(...": lambda: (
        optax.inject_hyperparams(bsj.hrbp_prune)(sparsity=0.5).init({"w": KERNEL})
    ),
    "where: expected a predicate of two arguments": lambda: bsj.rigl(
        0.5, until=9, where=lambda path: True
    ).init({"w": KERNEL}),
    "params: expected a tree of arrays, got one without leaves": lambda: bsj.rigl(
        0.5, until=9
    ).init({}),
    "params['w']: expected floats, got int32": lambda: bsj.rigl(0.5, until=9).init(
        {"w": KERNEL.astype(int)}
    ),
    "n: expected at most m=4, got 5": lambda: bsj.sr_ste(5, 4),
    "m: expected an integer": lambda: bsj.sr_ste(2, 0),
    "decay: expected a number of at least 0": lambda: bsj.sr_ste(2, 4, -1.0),
    "did you mean 'input'": lambda: bsj.sr_ste(2, 4, axis="inputs"),
    "scores: 'gradient' draws masks inside the training step, where budget='global'": lambda: (
        bsj.hrbp_prune(0.9, scores="gradient", budget="global")
    ),
    "pass the scores as a tree": lambda: bsj.drop_and_grow(
        0.9,
        pattern=bsj.patterns.one_by_n(16),
        scores="gradient",
        budget="global",
        schedule=bsj.every(100),
    ),
    "budget: NOfM(n=2, m=4, axis='input') fixes the sparsity of every layer": lambda: bsj.one_shot(
        None, pattern=bsj.patterns.n_of_m(2, 4), budget={"w": 0.9}
    ),
    "schedule: expected between(start, end, every=...), got None": lambda: bsj.subp(0.5),
    "schedule: expected a schedule such as every(100, until=30_000) (static: inject_hyperparams(..."
    ', static_args=("schedule",))), got': lambda: optax.inject_hyperparams(bsj.rigl)(
        sparsity=0.9, schedule=bsj.every(100)
    ).init({"w": KERNEL}),
    "params['rate']: expected an array, got 0.5; wrap it": lambda: bsj.rigl(0.5, until=9).init(
        {"w": KERNEL, "rate": 0.5}
    ),
    "positions: expected at least one layer that is used, got {}": lambda: bsj.metrics.kept_flops(
        {"w": KERNEL > 0}, {"w": KERNEL}, {}
    ),
    "masks: expected either masks or layouts": lambda: bsj.fixed_masks(),
    "masks['w']: expected dtype bool": lambda: bsj.fixed_masks({"w": jnp.ones(3)}),
    "masks: expected at least one bool array": lambda: bsj.fixed_masks({"w": jnp.asarray(True)}),
    "every: expected an integer": lambda: bsj.periodic(0),
}


@pytest.mark.parametrize("message", BAD_METHODS)
def test_bad_arguments_of_methods(message):
    with pytest.raises(ValueError, match=re.escape(message)):
        BAD_METHODS[message]()


def test_traced_sparsity_says_why():
    with pytest.raises(ValueError, match="sparsity: shapes depend on it"):
        jax.jit(lambda s: bsj.hrbp_prune(s, group_size=8).init({"w": KERNEL}))(0.5)


@pytest.mark.parametrize(
    "method",
    [
        bsj.hrbp_prune(0.5, group_size=8, where=lambda n, p: True),
        bsj.subp(0.5, start=0, end=1, where=lambda n, p: True),
    ],
)
def test_wrong_rank_names_the_leaf(method):
    with pytest.raises(
        ValueError,
        match=r"params\['bias'\]: expected a conv kernel \(kh, kw, cin, cout\).*got \(4,\)",
    ):
        method.init({"bias": jnp.ones(4)})
    with pytest.raises(
        ValueError,
        match=r"params\['three'\]: .*got shape \(3, 4, 4\); three axes may be .* with `where`",
    ):
        method.init({"three": jnp.ones((3, 4, 4))})


def test_n_of_m_names_the_layer_it_does_not_fit():
    with pytest.raises(
        ValueError,
        match=r"params\['conv'\]: m: 4 does not divide the input axis of length 6; exclude the "
        r"layer",
    ):
        bsj.sr_ste(2, 4).init({"conv": jnp.ones((3, 3, 6, 8))})


def test_nothing_to_prune_lists_the_leaves():
    with pytest.raises(ValueError, match=r"where: no leaf of params was chosen.*bias\[8\]"):
        bsj.rigl(0.5, until=10).init({"bias": jnp.ones(8)})


@pytest.mark.parametrize(
    "make",
    [
        lambda budget: bsj.hrbp_prune(0.5, budget=budget),
        lambda budget: bsj.rigl(0.5, until=10, budget=budget),
        lambda budget: bsj.gradual_magnitude(0.5, start=0, end=9, budget=budget),
        lambda budget: bsj.random_masks(jax.random.key(0), {"w": KERNEL}, 0.5, budget=budget),
    ],
    ids=["hrbp", "rigl", "gradual", "random"],
)
@pytest.mark.parametrize(
    ("budget", "message"),
    [
        (
            "erkk",
            "budget: expected one of 'uniform', 'erk', 'er', 'global', got 'erkk'; did you mean "
            "'erk'",
        ),
        (None, "budget: expected one of 'uniform', 'erk', 'er', 'global', got None"),
        ({"w": 1.5}, r"budget\['w'\]: expected a number in \[0.0, 1.0\), got 1.5"),
    ],
)
def test_a_wrong_budget_is_named_before_the_first_use(make, budget, message):
    with pytest.raises(ValueError, match=message):
        make(budget)


@pytest.mark.parametrize("budget", [{"conv9": 0.5}, "erkk"])
def test_unknown_budget(budget):
    with pytest.raises(
        ValueError,
        match=r"budget: ('conv9' is no sparse layer|expected one of 'uniform', 'erk', 'er', "
        r"'global', got 'erkk'; did you mean 'erk')",
    ):
        bsj.rigl(0.5, until=10, budget=budget).init({"conv": KERNEL})


def test_an_unreachable_density_warns_with_what_it_got():
    with pytest.warns(
        UserWarning,
        match="sparsity: density 0.1000 cannot be reached by whole blocks, the nearest is off by "
        "0.0250",
    ):
        bsj.hrbp_prune(0.9, group_size=8).init({"w": jnp.ones((1, 1, 8, 8))})


def test_a_density_far_from_a_small_target_warns_too():
    """Half a percentage point is five times the 0.1% that are asked for; more than 5% of the target
    is worth a word.
    """
    with pytest.warns(
        UserWarning,
        match="sparsity: density 0.0010 cannot be reached by whole blocks, the nearest is off by "
        "0.0042",
    ):
        bsj.hrbp_prune(0.999).init({"w": jnp.ones((3, 3, 64, 64))})


def test_a_layer_of_which_nothing_is_kept_warns():
    with pytest.warns(UserWarning, match="masks: nothing is kept at 'w'"):
        bsj.fixed_masks({"w": jnp.zeros((3, 3, 8, 8), bool)})


def test_masks_of_another_tree():
    state = bsj.rigl(0.5, until=10).init({"w": KERNEL})
    with pytest.raises(ValueError, match="masks: expected the tree structure of params"):
        bsj.apply_masks({"other": {"w": KERNEL}}, bsj.get_masks(state))
    with pytest.raises(ValueError, match=r"masks: expected a bool array of shape \(3, 3, 8, 8\)"):
        bsj.apply_masks({"w": jnp.ones((3, 3, 8, 8))}, bsj.get_masks(state))
    with pytest.raises(ValueError, match=r"masks: expected a bool array .* got float32"):
        bsj.apply_masks(bsj.get_masks(state), {"w": KERNEL})  # swapped
    with pytest.raises(ValueError, match="state: expected the tree structure of params"):
        bsj.rigl(0.5, until=10).update({"b": {"w": KERNEL}}, state, {"b": {"w": KERNEL}})
    with pytest.raises(ValueError, match="'w' is no leaf of params"):
        bsj.fixed_masks(bsj.get_masks(state)).init({"conv": KERNEL})
    with pytest.raises(ValueError, match="masks: expected shape"):
        bsj.fixed_masks(bsj.get_masks(state)).init({"w": jnp.ones((3, 3, 8, 8))})
    with pytest.raises(ValueError, match="layouts: expected the tree structure of params"):
        bsj.pack_tree({"w": KERNEL, "b": KERNEL}, None, {"w": LAYOUT})
    with pytest.raises(
        ValueError,
        match="state: expected the tree structure of params, but it lacks 'x' and params lack 'w'",
    ):
        bsj.masked({"x": jnp.ones(3), "y": jnp.ones(3)}, state)
    with pytest.raises(ValueError, match="masks_b: "):
        bsj.sad(bsj.get_masks(state), {"x": jnp.asarray(True), "y": jnp.asarray(True)})


def test_packed_values_with_a_dense_state():
    tx = bsj.keep_zeros(optax.chain(bsj.rigl(0.5, until=10), optax.sgd(0.1)))
    state = tx.init({"w": KERNEL})
    small = {"w": jnp.ones((2, 4, 3, 16))}
    with pytest.raises(ValueError, match="packed values go with the packed state"):
        tx.update(small, state, small)


def test_params_of_another_shape_name_the_leaf():
    """Static methods too, which never look at the weights again."""
    tx = bsj.keep_zeros(optax.chain(bsj.hrbp_prune(0.75, group_size=16), optax.sgd(0.1)))
    state, other = tx.init({"w": KERNEL}), {"w": KERNEL[..., :16]}
    with pytest.raises(
        ValueError,
        match=r"params: expected shape \(3, 3, 16, 32\) at 'w' as at init, got weights \(3, 3, 16, "
        r"16\)",
    ):
        tx.update(other, state, other)


def test_no_sparse_method_in_the_state():
    state = optax.adam(0.1).init({"w": KERNEL})
    for read in (
        bsj.get_masks,
        bsj.get_layouts,
        lambda s: bsj.masked({"w": KERNEL}, s),
        lambda s: bsj.summarize({"w": KERNEL}, s),
    ):
        with pytest.raises(
            ValueError, match="state: expected the state of a chain that holds a sparse method"
        ):
            read(state)
    with pytest.raises(ValueError, match="state: expected the state of a chain"):
        bsj.keep_zeros(optax.sgd(0.1)).init({"w": KERNEL})


BAD_CONVS = {
    "x: expected rank 4": lambda: bsj.conv(X[0], KERNEL, LAYOUT),
    "a kernel of rank 4": lambda: bsj.conv(X, KERNEL[0], LAYOUT),
    "x: expected 16 channels": lambda: bsj.conv(X[..., :8], KERNEL, LAYOUT),
    "was the layout made for another layer": lambda: bsj.conv(X, KERNEL[..., :16], LAYOUT),
    "layout: expected a BlockLayout or Dense": lambda: bsj.conv(X, KERNEL, None),
    "data_format: expected one of 'NHWC', 'CHWN', got 'NCHW'; transpose x to NHWC": lambda: (
        bsj.conv(X, KERNEL, LAYOUT, data_format="NCHW")
    ),
    "got 'gpu'; on GPUs these are 'triton' and 'mosaic_gpu', and None picks": lambda: bsj.conv(
        X, KERNEL, LAYOUT, implementation="gpu"
    ),
    "implementation: .*, got 'CUDA'; on GPUs these are": lambda: bsj.nnx.sparsify(
        None, implementation="CUDA"
    ),
    "implementation: expected one of .*, got 'tritn'; did you mean 'triton'": lambda: bsj.conv(
        X, KERNEL, LAYOUT, implementation="tritn"
    ),
    "kernel_gradient: expected one of": lambda: bsj.conv(X, KERNEL, LAYOUT, kernel_gradient="full"),
    "kernel_gradient: 'dense' needs the dense kernel": lambda: bsj.conv(
        X, bsj.pack(KERNEL, LAYOUT), LAYOUT, kernel_gradient="dense"
    ),
    "padding: expected one of 'SAME', 'VALID', .*did you mean 'SAME'": lambda: bsj.conv(
        X, KERNEL, LAYOUT, padding="SAMEE"
    ),
    "padding: expected pixels of at least 0": lambda: bsj.conv(
        X, KERNEL, LAYOUT, padding=((-1, 0), (0, 0))
    ),
    "padding: expected one of 'SAME'.*, an integer, or": lambda: bsj.conv(
        X, KERNEL, LAYOUT, padding=1.5
    ),
    "strides: expected an integer of at least 1, got 0": lambda: bsj.conv(
        X, KERNEL, LAYOUT, strides=(0, 1)
    ),
    "dilation: expected an integer or two": lambda: bsj.conv(X, KERNEL, LAYOUT, dilation=(1, 1, 1)),
    r"x: expected float32, bfloat16 or float16 \(NHWC\), got int32\[2, 8, 8, 16\]": lambda: (
        bsj.conv(X.astype(int), KERNEL, LAYOUT)
    ),
    r"x: expected .* \(NHWC\), got int32\[2, 8, 8, 16\]; cast": lambda: bsj.conv(
        X.astype(int), KERNEL, bsj.Dense()
    ),
    r"x: expected no empty axis \(NHWC\), got shape \(2, 0, 8, 16\)": lambda: bsj.conv(
        X[:, :0], KERNEL, LAYOUT
    ),
    r"kernel: expected packed values \(2, 4, 3, 16\) with packed=True, got \(3, 3, 16, 32\); leave "
    r"`packed` out": lambda: bsj.conv(X, KERNEL, LAYOUT, packed=True),
    "smaller than the reach of the kernel": lambda: bsj.conv(
        X[:, :2, :2], KERNEL, LAYOUT, padding="VALID"
    ),
    "packed: a Dense": lambda: bsj.conv(X, KERNEL, bsj.Dense(), packed=True),
    "kernel: expected shape": lambda: bsj.pack(KERNEL[..., :16], LAYOUT),
    "values: expected packed shape": lambda: bsj.unpack(KERNEL, LAYOUT),
    "dy: expected the convolution's output shape": lambda: bsj.dense_kernel_gradient(
        X, X[:, :4], (3, 3)
    ),
}


@pytest.mark.parametrize("message", BAD_CONVS)
def test_bad_arguments_of_conv(message):
    with pytest.raises(ValueError, match=message):
        BAD_CONVS[message]()


@pytest.mark.parametrize(
    "name", [n for n, why in bsj.available_implementations().items() if why is not None]
)
def test_an_implementation_that_cannot_serve_says_why(name):
    with pytest.raises(NotImplementedError, match=f"implementation='{name}': "):
        bsj.conv(X, KERNEL, LAYOUT, implementation=name)


def test_a_shape_that_is_both_dense_and_packed_must_be_named():
    layout = bsj.mask_to_layout(jnp.ones((1, 1, 1, 4), bool))
    kernel = jnp.arange(4.0).reshape(1, 1, 1, 4)
    with pytest.raises(ValueError, match="say which with packed=True or packed=False"):
        bsj.conv(jnp.ones((1, 2, 2, 1)), kernel, layout)
    assert bsj.conv(jnp.ones((1, 2, 2, 1)), kernel, layout, packed=True).shape == (1, 2, 2, 4)


def _bad(**fields):
    good = {
        name: getattr(LAYOUT, name)
        for name in ("filters", "channels", "taps", "shape", "channel_block")
    }
    return bsj.BlockLayout(**(good | fields))


BAD_LAYOUTS = {
    "layout: expected a BlockLayout": lambda: bsj.Dense(),
    "layout.filters: .* exactly once": lambda: _bad(
        filters=LAYOUT.filters.at[0, 0].set(5).at[0, 1].set(5)
    ),
    "layout.channels: index .* out of range, expected 0..15": lambda: _bad(
        channels=LAYOUT.channels.at[0, 3].set(16)
    ),
    "layout.taps: index .* out of range, expected 0..8": lambda: _bad(
        taps=LAYOUT.taps.at[0, 0].set(-1)
    ),
    "layout.channels: each row must be strictly ascending": lambda: _bad(
        channels=LAYOUT.channels[:, ::-1]
    ),
    "layout.channels: expected an integer array": lambda: _bad(
        channels=LAYOUT.channels.astype(float)
    ),
    "layout.taps: expected an integer array": lambda: _bad(taps=LAYOUT.taps[:1]),
    "layout.channel_block: 3 must divide": lambda: _bad(channel_block=3),
    "layout.channels: expected aligned runs": lambda: _bad(
        channel_block=4, channels=LAYOUT.channels.at[:].set(jnp.arange(1, 5))
    ),
    r"layout.shape: expected \(kh, kw, cin, cout\), or": lambda: _bad(shape=(3, 3, 16)),
    "layout.channels: expected the leading axes": lambda: _bad(filters=LAYOUT.filters[None]),
}


@pytest.mark.parametrize("message", BAD_LAYOUTS)
def test_validate_names_the_field(message):
    with pytest.raises(ValueError, match=message):
        bsj.validate(BAD_LAYOUTS[message]())


BAD_MASKS = {
    "mask.shape: expected a conv kernel": lambda: bsj.mask_to_layout(jnp.ones((3, 3, 3), bool)),
    "mask: stacked kernels keep different counts": lambda: bsj.mask_to_layout(
        jnp.ones((2, 3, 3, 2, 2), bool).at[1, :, :, 0].set(False)
    ),
    "mask: expected dtype bool": lambda: bsj.mask_to_layout(jnp.ones((3, 3, 2, 2))),
    "is not one block of channels x taps": lambda: bsj.mask_to_layout(
        jnp.ones((3, 3, 2, 2), bool).at[0, 0, 0].set(False)
    ),
    "groups keep different": lambda: bsj.mask_to_layout(
        jnp.ones((1, 1, 2, 2), bool).at[0, 0, 0, 0].set(False)
    ),
    "filters: expected int": lambda: bsj.mask_to_layout(
        jnp.ones((1, 1, 2, 2), bool), jnp.array([[0, 0]])
    ),
}


@pytest.mark.parametrize("message", BAD_MASKS)
def test_masks_without_a_layout_say_where(message):
    with pytest.raises(ValueError, match=message):
        BAD_MASKS[message]()


def test_the_sparse_method_comes_first():
    params = {"w": KERNEL}
    with pytest.raises(ValueError, match=r"method: expected a sparse method first.* swap"):
        bsj.sparse(optax.adam(1e-3), bsj.magnitude(0.5)).init(params)
    with pytest.raises(ValueError, match="optimizer: expected one or more transformations"):
        bsj.sparse(bsj.magnitude(0.5))
    with pytest.raises(ValueError, match=r"method: expected an optax transformation .* got 0.9"):
        bsj.sparse(0.9, optax.sgd(0.1))


@pytest.mark.parametrize(
    ("draw", "message"),
    [
        (lambda weights: {}, r"draw: expected .* for every chosen leaf \['w'\], got \[\]"),
        (lambda weights: {"w": weights["w"] > 0}, "draw: expected .*Kept.* got ArrayImpl at 'w'"),
        (
            lambda weights: {"w": bsj.transforms.Kept(weights["w"], bsj.Dense())},
            "draw: expected a bool mask of shape .* at 'w', got float32",
        ),
    ],
)
def test_a_method_of_your_own_that_draws_no_masks(draw, message):
    method = bsj.transforms.sparse_transformation(bsj.Spec("mine", 0.5), draw=draw)
    with pytest.raises(ValueError, match=message):
        method.init({"w": KERNEL})


def test_hints_at_what_was_meant():
    params = {"w": KERNEL}
    with pytest.raises(ValueError, match=r"pattern: expected a pattern such as patterns.block\("):
        bsj.masks_from_scores(params, 0.9, pattern=bsj.patterns.block)
    with pytest.raises(ValueError, match=r"pattern: expected a pattern such as patterns.block\("):
        bsj.masks_from_scores(params, 0.9, pattern="block")
    with pytest.raises(ValueError, match=r"as a fraction, 90 percent is 0.9"):
        bsj.magnitude(90)


def test_a_kernel_without_a_layout_runs_dense():
    choice = bsj.choose_implementation(jnp.ones((1, 8, 8, 16)), bsj.Dense())
    assert (choice.implementation, choice.details) == ("dense", {})
