"""Between batch norms a sharded batch stays sharded, and the sums are those of the whole batch.

The devices are host devices of a new process, as XLA counts them once at its start.
"""

import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
from fused_passes import FUSED
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from new_process import host_devices, run_python

import blocksparse_jax as bsj
from pallas_kernels.block_sparse_conv import choice

DEVICES = 2
SHAPE = (3, 3, 16, 16)
WAYS = ("Auto", "Explicit", "shard_map")


def test_the_sums_are_those_of_the_whole_batch():
    done = run_python(__file__, **host_devices(DEVICES))
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    assert done.stdout.count("agrees") == 2 * len(WAYS)


def step(x, kernels, scale, bias, layout, name, mean=lambda sums: sums):
    """Two convolutions with a shortcut, whose loss depends on everything."""
    options = {"data_format": "CHWN", "implementation": name}
    z, sums = bsj.conv_with_sums(x, kernels[0], layout, **options)
    norm = (mean(sums), scale, bias)
    stream, y, sums = bsj.norm_add_act_conv(z, *norm, x, kernels[1], layout, **options)
    out = bsj.norm_act_apply(y, mean(sums), scale, bias, stream, data_format="CHWN")
    return (out**2).sum() / 1000


def main():
    choice.IMPLEMENTATIONS["fused"] = FUSED
    layout = bsj.random_groups(jax.random.key(0), SHAPE, group_size=8, kept=5, kept_taps=3)
    keys = jax.random.split(jax.random.key(1), 5)
    x = jax.random.normal(keys[0], (16, 6, 6, 8)) + jnp.arange(8.0)  # the devices' means differ
    kernels = [0.3 * jax.random.normal(key, SHAPE) for key in keys[1:3]]
    scale, bias = 1 + 0.2 * jax.random.normal(keys[3], (16,)), jax.random.normal(keys[4], (16,))
    gradients = jax.value_and_grad(step, (0, 1, 2, 3))
    expected = gradients(x, kernels, scale, bias, layout, "dense")
    images = P(None, None, None, "data")
    for way in WAYS:
        kind = AxisType.Explicit if way == "Explicit" else AxisType.Auto
        mesh = jax.make_mesh((DEVICES,), ("data",), axis_types=(kind,))
        arrays = jax.device_put((kernels, scale, bias), NamedSharding(mesh, P()))
        sharded = jax.device_put(x, NamedSharding(mesh, images))
        for name in ("fused", "xla"):

            def run(x, kernels, scale, bias, name=name, way=way, mesh=mesh):
                if way != "shard_map":
                    return gradients(x, kernels, scale, bias, layout, name)

                def local(x, kernels, scale, bias):
                    mean = lambda sums: jax.lax.pmean(sums, "data")  # noqa: E731
                    part = step(x, kernels, scale, bias, layout, name, mean)
                    return jax.lax.psum(part, "data")

                total = jax.shard_map(
                    local, mesh=mesh, in_specs=(images, P(), P(), P()), out_specs=P()
                )
                return jax.value_and_grad(total, (0, 1, 2, 3))(x, kernels, scale, bias)

            with jax.set_mesh(mesh):
                compiled = jax.jit(run).lower(sharded, *arrays).compile()
                results = compiled(sharded, *arrays)
            gathers = re.findall(r"all-gather", compiled.as_text())
            assert not gathers, f"{way}, {name}: the batch is gathered"
            for a, b in zip(jax.tree.leaves(results), jax.tree.leaves(expected), strict=True):
                np.testing.assert_allclose(a, b, rtol=0, atol=2e-5 * float(jnp.abs(b).max()))
            print(f"{way}, {name}: agrees")


if __name__ == "__main__":
    sys.exit(main())
