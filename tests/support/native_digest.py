"""A digest of what the native kernels compute: equal bits have equal digests."""

import dataclasses
import hashlib

import jax
import numpy as np

from experiments.bench import shapes
from pallas_kernels.block_sparse_conv import ConvSpec

SPEC = ConvSpec(
    cin=40,
    height=9,
    width=7,
    batch=5,
    kernel=(3, 3),
    cout=48,
    groups=3,
    kept=13,
    kept_taps=4,
    group_size=16,
    padding=((1, 1), (1, 1)),
)


def digest() -> str:
    """Of all results of a few convolutions."""
    bits = hashlib.sha256()
    strided = dataclasses.replace(SPEC, strides=(1, 2), height=17, width=18)
    plain = dataclasses.replace(SPEC, batch=16, height=12, width=35)
    specs = [dataclasses.replace(strided, batch=n, groups=g) for n, g in ((1, 1), (5, 3), (64, 3))]
    specs += [
        dataclasses.replace(plain, group_size=f, padding=((p, p), (p, p)))
        for f in (8, 16, 24)
        for p in (0, 1)
    ]
    for spec in specs:
        spec = dataclasses.replace(spec, cout=spec.groups * spec.group_size)
        x, dy, values, *index = shapes.random_operands(spec)
        y, pullback = jax.vjp(
            lambda x, v, spec=spec, index=index: shapes.convolve(spec, "cpu", x, v, *index),
            x,
            values,
        )
        for a in (y, *pullback(dy)):
            bits.update(np.asarray(a).tobytes())
    return bits.hexdigest()
