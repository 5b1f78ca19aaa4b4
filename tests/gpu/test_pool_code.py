"""The max pool behind a norm and a ReLU, compiled for an H200 that is only described."""

import re

import jax
import jax.numpy as jnp
from described_gpu import described_h200, missing
from requirements import needs

from experiments.models.pools import max_pool


@needs(missing())
def test_pool_and_gradient_are_one_kernel_each():
    def step(z, scale, bias, weights):
        def front(z):
            return max_pool(jax.nn.relu((z * scale + bias).astype(z.dtype)), 2, 2)

        y, vjp = jax.vjp(front, z)
        dy = (weights @ y.reshape(64, -1)).reshape(y.shape)  # neither before nor behind it
        return vjp(dy)[0]

    sharding = described_h200()
    z, vector, weights = (
        jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)
        for shape, dtype in (
            ((64, 16, 16, 128), jnp.bfloat16),
            ((64, 1, 1, 1), jnp.float32),
            ((64, 64), jnp.bfloat16),
        )
    )
    compiled = (
        jax.jit(step).lower(z, vector, vector, weights).compile({"xla_gpu_autotune_level": 0})
    )
    entry = compiled.as_text().split("ENTRY")[1]
    kernels = re.findall(r"%(\w+?)[.\d]* = .*? (?:fusion|copy|custom-call)\(", entry)
    assert len([name for name in kernels if "dot" not in name and "gemm" not in name]) == 2
