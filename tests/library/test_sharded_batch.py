"""A batch sharded over devices stays sharded through the convolution, forward and backward.

The devices are host devices of a new process, as XLA counts them once at its start.
"""

import functools
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from new_process import run_python

import blocksparse_jax as bsj
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
    "epilogue": {"activation": "relu", "data_format": "CHWN"},
}


@pytest.mark.parametrize("devices", [2, 8])
def test_a_sharded_batch_stays_sharded(devices):
    flags = f"--xla_force_host_platform_device_count={devices}"
    done = run_python(__file__, str(devices), XLA_FLAGS=flags)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    assert done.stdout.count("agrees") == 2 * len(CASES) + 4


def operands(case, images=16):
    """Activations, the kernel, its layout and the epilogue's arrays."""
    keys = jax.random.split(jax.random.key(0), 6)
    shape = (images, 6, 6, 16) if case.get("data_format") != "CHWN" else (16, 6, 6, images)
    arrays = {"x": jax.random.normal(keys[0], shape), "kernel": jax.random.normal(keys[1], SHAPE)}
    if "activation" in case:
        arrays["scale"] = jax.random.normal(keys[2], (24,))
        arrays["bias"] = jax.random.normal(keys[3], (24,))
        arrays["residual"] = jax.random.normal(keys[4], (24, 6, 6, images))
    return arrays, bsj.random_groups(keys[5], SHAPE, **LAYOUT_COUNTS)


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


if __name__ == "__main__":
    devices = int(sys.argv[1])
    for kind in (AxisType.Auto, AxisType.Explicit):
        mesh = jax.make_mesh((devices,), ("data",), axis_types=(kind,))
        for name, case in CASES.items():
            check(f"{name} {kind}", mesh, case)
        plane = jax.make_mesh((2, devices // 2), ("a", "b"), axis_types=(kind,) * 2)
        check(f"two axes {kind}", plane, CASES["CHWN"], axes=("a", "b"))
        check(
            f"height {kind}",
            jax.make_mesh((2,), ("data",), devices=jax.devices()[:2], axis_types=(kind,)),
            CASES["native"],
            dimension=1,
        )
