"""A batch sharded over devices stays sharded through the convolution, forward and backward.

The devices are host devices of a new process, as XLA counts them once at its start.
"""

import functools
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import plan_reader
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from new_process import host_devices, run_python

import blocksparse_jax as bsj
from experiments import models
from pallas_kernels.dense_conv import dense_conv

SHAPE = (3, 3, 16, 24)
LAYOUT_COUNTS = {"group_size": 8, "kept": 5, "kept_taps": 3}
CASES = {
    "native": {},
    "xla": {"implementation": "xla"},
    "dense": {"implementation": "dense"},
    "dense gradient": {"kernel_gradient": "dense"},
    "CHWN": {"data_format": "CHWN", "strides": 2},
    "dense rows": {"formulation": "rows", "data_format": "CHWN"},
    "dense taps": {"formulation": "taps"},
    "plan": {"implementation": plan_reader.NAME},
    "epilogue": {"activation": "relu", "data_format": "CHWN"},
}


OTHER_AXES = {
    "height": (P(None, "data"), P()),
    "width": (P(None, None, "data"), P()),
    "channels": (P(None, None, None, "data"), P()),
    "input channels of the kernel": (P(), P(None, None, "data")),
    "output channels of the kernel": (P(), P(None, None, None, "data")),
    "images and output channels": (P("data"), P(None, None, None, "data")),
}
"""How x and the kernel lie: all but the images is undone."""


WITH_AXIS_TYPES = ("native", "dense gradient", "dense taps", "epilogue")
"""One case for each of the rules that Explicit axes ask for; the other cases are slow there."""


@pytest.mark.parametrize(
    ("devices", "few"),
    [(8, True), *(pytest.param(n, False, marks=pytest.mark.slow) for n in (2, 8))],
)
def test_a_sharded_batch_stays_sharded(devices, few):
    done = run_python(__file__, str(devices), *["--few"] * few, **host_devices(devices))
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    explicit = len(WITH_AXIS_TYPES) + 3 if few else len(CASES) + 2 + len(OTHER_AXES) + 2
    assert done.stdout.count("agrees") == len(CASES) + 2 + len(OTHER_AXES) + 2 + explicit
    assert done.stdout.count("the members are shared out") == 2


def operands(case, images=16):
    """Activations, the kernel, its layout and the epilogue's arrays."""
    keys = jax.random.split(jax.random.key(0), 6)
    shape = (images, 6, 6, 16) if case.get("data_format") != "CHWN" else (16, 6, 6, images)
    arrays = {"x": jax.random.normal(keys[0], shape), "kernel": jax.random.normal(keys[1], SHAPE)}
    if "activation" in case:
        arrays["scale"] = jax.random.normal(keys[2], (24,))
        arrays["bias"] = jax.random.normal(keys[3], (24,))
        arrays["residual"] = jax.random.normal(keys[4], (24, 6, 6, images))
    return arrays, bsj.with_plans(bsj.random_groups(keys[5], SHAPE, **LAYOUT_COUNTS))


def loss(arrays, layout, case):
    arrays = dict(arrays)
    x, kernel = arrays.pop("x"), arrays.pop("kernel")
    if "formulation" in case:
        y = dense_conv(x, kernel, **case)
    else:
        y = bsj.conv(x, kernel, layout, **case, **arrays)
    return (jnp.tanh(y) ** 2).sum(), y


def placed(mesh, arrays, layout, case, axes, images_of=None):
    """The operands on a mesh: activations sharded along the batch, all else on every device."""
    batch = images_of or case.get("data_format", "NHWC").index("N")
    spec = P(*[None] * batch, axes)

    def put(name, array):
        is_sharded = name in ("x", "residual")
        return jax.device_put(array, NamedSharding(mesh, spec if is_sharded else P()))

    arrays = {name: put(name, array) for name, array in arrays.items()}
    return arrays, jax.device_put(layout, NamedSharding(mesh, P()))


def check(name, mesh, case, axes="data", dimension=None, images=16):
    arrays, layout = operands(case, images)
    f = jax.jit(jax.value_and_grad(functools.partial(loss, case=case), has_aux=True))
    expected = jax.device_get(f(arrays, layout))
    sharded = placed(mesh, arrays, layout, case, axes, dimension)
    compiled = f.lower(*sharded).compile()
    result = compiled(*sharded)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4),
        jax.device_get(result),
        expected,
    )
    text = compiled.as_text()
    if dimension is None and images % jax.device_count() == 0:
        assert "all-gather" not in text, name
        batch = case.get("data_format", "NHWC").index("N")
        (_, y), gradients = result
        for a in (y, gradients["x"]):
            assert a.sharding.shard_shape(a.shape)[batch] == images // jax.device_count(), name
    print(name, "agrees")


def assert_equal(result, expected):
    def close(a, b):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4 * max(1, np.abs(b).max(initial=0)))

    jax.tree.map(close, jax.device_get(result), expected)


def check_other_axes(mesh):
    """Sharding along any other axis is undone, and the numbers are the same."""
    keys = jax.random.split(jax.random.key(0), 3)
    x, kernel = jax.random.normal(keys[0], (8, 8, 8, 16)), jax.random.normal(keys[1], SHAPE)
    layout = bsj.random_groups(keys[2], SHAPE, **LAYOUT_COUNTS)

    def of_conv(x, kernel):
        return (jnp.tanh(bsj.conv(x, kernel, layout)) ** 2).sum()

    f = jax.jit(jax.value_and_grad(of_conv, (0, 1)))
    expected = jax.device_get(f(x, kernel))
    for name, specs in OTHER_AXES.items():
        placed = (
            jax.device_put(array, NamedSharding(mesh, spec))
            for array, spec in zip((x, kernel), specs, strict=True)
        )
        assert_equal(f(*placed), expected)
        print(name, "agrees")


def check_vmap(mesh):
    """A batch of batches, whose images are sharded."""
    keys = jax.random.split(jax.random.key(0), 3)
    x, kernel = jax.random.normal(keys[0], (3, 8, 4, 4, 16)), jax.random.normal(keys[1], SHAPE)
    layout = bsj.random_groups(keys[2], SHAPE, **LAYOUT_COUNTS)

    def of_conv(x, kernel):
        return (jnp.tanh(jax.vmap(lambda x: bsj.conv(x, kernel, layout))(x)) ** 2).sum()

    f = jax.jit(jax.value_and_grad(of_conv, (0, 1)))
    expected = jax.device_get(f(x, kernel))
    sharded = jax.device_put(x, NamedSharding(mesh, P(None, "data")))
    assert_equal(f(sharded, jax.device_put(kernel, NamedSharding(mesh, P()))), expected)
    print("vmap agrees")


def check_members(mesh):
    """An ensemble that is sharded over the mesh: a `shard_map` around the vmap shares it out."""
    members = jax.device_count()
    keys = jax.random.split(jax.random.key(0), members)
    x = jax.random.normal(keys[0], (members, 2, 6, 6, 16))
    kernels = jax.random.normal(keys[1], (members, *SHAPE))
    draw = functools.partial(bsj.random_groups, shape=SHAPE, **LAYOUT_COUNTS)
    layouts = jax.tree.map(lambda *parts: jnp.stack(parts), *map(draw, keys))

    def gradients(x, kernels, layouts, name=None):
        def of_member(x, kernel, layout):
            return (jnp.tanh(bsj.conv(x, kernel, layout, implementation=name)) ** 2).sum()

        return jax.grad(of_member, (0, 1))(x, kernels, layouts)

    expected = jax.device_get(jax.vmap(gradients)(x, kernels, layouts))
    with jax.set_mesh(mesh):
        sharded = jax.device_put((x, kernels, layouts), NamedSharding(mesh, P("data")))
        shared_out = jax.shard_map(jax.vmap(gradients), in_specs=P("data"), out_specs=P("data"))
        compiled = jax.jit(shared_out).lower(*sharded).compile()
        assert_equal(compiled(*sharded), expected)
        assert "all-gather" not in compiled.as_text()
        if AxisType.Explicit not in mesh.axis_types:
            assert_equal(jax.jit(jax.vmap(gradients))(*sharded), expected)
        else:
            check_refusal(gradients, sharded)
    print("the members are shared out")


def check_refusal(gradients, sharded):
    for name in (None, "xla", "dense"):
        for spmd_axis_name in (None, "data"):
            f = functools.partial(gradients, name=name)
            with pytest.raises(NotImplementedError) as refusal:
                jax.jit(jax.vmap(f, spmd_axis_name=spmd_axis_name))(*sharded)
            assert "Explicit mesh axes ['data']" in str(refusal.value)
            assert "jax.shard_map(jax.vmap(f)" in str(refusal.value)


def check_training_step(mesh):
    """A step of the zoo: no activation is gathered, and the parameters come out the same."""
    network = models.create("cnn", num_classes=10, width=0.25)
    images, labels = jax.random.normal(jax.random.key(0), (16, 16, 16, 3)), jnp.arange(16) % 10
    variables = network.init(jax.random.key(1), images)
    tx = bsj.keep_zeros(optax.chain(bsj.hrbp_prune(0.8, group_size=8), optax.sgd(0.1, 0.9)))
    state = tx.init(variables["params"])
    start = variables["params"], variables["batch_stats"], state, bsj.get_layouts(state)

    @jax.jit
    def step(params, batch_stats, state, layouts, images, labels):
        def loss(params):
            variables = {"params": params, "batch_stats": batch_stats, "layouts": layouts}
            logits, changed = network.apply(variables, images, train=True, mutable=["batch_stats"])
            # optax's loss of integer labels indexes in a way that Explicit axes refuse on jax 0.12.
            losses = optax.softmax_cross_entropy(logits, jax.nn.one_hot(labels, 10))
            return losses.mean(), changed["batch_stats"]

        (value, batch_stats), gradients = jax.value_and_grad(loss, has_aux=True)(params)
        updates, state = tx.update(gradients, state, params)
        return optax.apply_updates(params, updates), batch_stats, state, value

    expected = jax.device_get(step(*start, images, labels))
    whole = jax.device_put(start, NamedSharding(mesh, P()))
    sharded = jax.device_put((images, labels), NamedSharding(mesh, P("data")))
    compiled = step.lower(*whole, *sharded).compile()
    assert_equal(compiled(*whole, *sharded), expected)
    assert "all-gather" not in compiled.as_text()
    assert "all-reduce" in compiled.as_text()
    print("training step agrees")


if __name__ == "__main__":
    plan_reader.register()
    devices, few = int(sys.argv[1]), "--few" in sys.argv
    for kind in (AxisType.Auto, AxisType.Explicit):
        mesh = jax.make_mesh((devices,), ("data",), axis_types=(kind,))
        for name, case in CASES.items():
            if not few or kind == AxisType.Auto or name in WITH_AXIS_TYPES:
                check(f"{name} {kind}", mesh, case)
        check_vmap(mesh)
        check_members(mesh)
        check_training_step(mesh)
        plane = jax.make_mesh((2, devices // 2), ("a", "b"), axis_types=(kind,) * 2)
        check(f"two axes {kind}", plane, CASES["CHWN"], axes=("a", "b"))
        if few and kind == AxisType.Explicit:
            continue
        check(
            f"height {kind}",
            jax.make_mesh((2,), ("data",), devices=jax.devices()[:2], axis_types=(kind,)),
            CASES["native"],
            dimension=1,
        )
        check_other_axes(mesh)
