"""The max pool behind a norm and a ReLU, compiled for an H200 that is only described."""

import math
import re

import jax
import jax.numpy as jnp
from described_gpu import described_h200, missing
from requirements import needs

import blocksparse_jax as bsj
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


BYTES = {"f32": 4, "bf16": 2, "s8": 1, "pred": 1}


def moved_bytes(reads_pending):
    """What XLA's kernels read and write around a pool between two convolutions and its gradient."""
    options = {"data_format": "CHWN", "implementation": "dense"}

    def total(x, first, second, scale, bias):
        z, sums = bsj.conv_with_sums(x, first, bsj.Dense(), **options)
        x = bsj.PendingActivations(
            z, sums, scale, bias, data_format="CHWN", dtype=jnp.dtype("bfloat16")
        )
        x = bsj.max_pool(x if reads_pending else bsj.activations(x))
        return bsj.conv(x, second, bsj.Dense(), **options).astype(jnp.float32).sum()

    shapes = ((64, 32, 32, 128), (3, 3, 64, 64), (3, 3, 64, 64), (64,), (64,))
    arrays = [
        jax.ShapeDtypeStruct(
            shape, jnp.bfloat16 if len(shape) > 1 else jnp.float32, sharding=described_h200()
        )
        for shape in shapes
    ]
    compiled = (
        jax.jit(jax.grad(total, range(5))).lower(*arrays).compile({"xla_gpu_autotune_level": 0})
    )
    entry = compiled.as_text().split("ENTRY")[1]
    found = re.findall(r"%(\S+) = (\(.*?\)|\S+) ([\w-]+)\((.*)", entry)
    shape_of = {name: shape for name, shape, _, _ in found}

    def size(shape):
        return sum(
            BYTES.get(dtype, 0) * math.prod(int(n) for n in sizes.split(",") if n)
            for dtype, sizes in re.findall(r"(\w+)\[([\d,]*)\]", shape)
        )

    return sum(
        size(shape)
        + sum(size(shape_of[name]) for name in re.findall(r"%([\w.-]+)", rest) if name in shape_of)
        for _, shape, code, rest in found
        if code == "fusion"
    )


@needs(missing())
def test_a_pool_of_pending_activations_moves_fewer_bytes():
    assert moved_bytes(True) < 0.95 * moved_bytes(False)
