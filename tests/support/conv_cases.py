"""The convolutions that tests of the kernels share: sizes, all implementations, and how to run and
compare them.
"""

import dataclasses
import math

import numpy as np
import pytest
from hypothesis import strategies as st
from jax import lax

from experiments.bench import shapes
from pallas_kernels.block_sparse_conv import (
    PASSES,
    ConvSpec,
    Implementation,
    available_implementations,
    cpu,
    xla,
)

NAMES = [name for name, reason in available_implementations().items() if reason is None]


def forced(variant: str) -> Implementation:
    """The native kernels in one of the variants that this CPU can run."""

    def in_it(run):
        def call(*operands, **options):
            with pytest.MonkeyPatch.context() as patch:
                patch.setenv(cpu.kernels.VARIABLE, variant)
                return run(*operands, **options)

        return call

    passes = {name: in_it(getattr(cpu.IMPLEMENTATION, name)) for name in PASSES}
    return dataclasses.replace(cpu.IMPLEMENTATION, **passes)


VARIANTS = {
    f"cpu:{variant}": forced(variant) for variant in cpu.kernels.variants()[1:] if "cpu" in NAMES
}  # "cpu" is the first
IMPLEMENTATIONS = (
    {name: name for name in NAMES}
    | VARIANTS
    | {f"xla:{name}": f for name, f in xla.FORMULATIONS.items() if name != "dense"}
)

BASE = ConvSpec(
    cin=9,
    height=7,
    width=6,
    batch=3,
    kernel=(3, 3),
    cout=8,
    groups=2,
    kept=4,
    kept_taps=3,
    group_size=4,
)
CASES = {
    "same": dataclasses.replace(BASE, padding=((1, 1), (1, 1))),
    "stride": dataclasses.replace(BASE, strides=(2, 3), padding=((0, 1), (1, 0))),
    "rectangular, dilated, wide padding": dataclasses.replace(
        BASE, kernel=(2, 4), dilation=(3, 1), padding=((4, 0), (0, 5))
    ),
    "1x1, stride, batch 1": dataclasses.replace(
        BASE, kernel=(1, 1), kept_taps=1, strides=(2, 3), padding=((2, 0), (0, 1)), batch=1
    ),
    "one group, all kept": dataclasses.replace(
        BASE, kernel=(2, 2), groups=1, kept=9, kept_taps=4, group_size=8
    ),
}


def conv(spec: ConvSpec, name: str | None, x, values, *index):
    """The convolution of a spec in one of `IMPLEMENTATIONS`; None lets the library choose."""
    return shapes.convolve(spec, IMPLEMENTATIONS.get(name, name), x, values, *index)


def assert_close(arrays, reference, tolerance):
    """Each array differs from its reference by at most this fraction of the largest value."""
    for a, b in zip(arrays, reference, strict=True):
        assert a.shape == b.shape
        a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * np.abs(b).max(initial=1e-30))


@st.composite
def specs(draw):
    """Specs of small convolutions of any geometry."""

    def pair(low, high):
        return draw(st.tuples(st.integers(low, high), st.integers(low, high)))

    kernel, strides, dilation, groups = pair(1, 4), pair(1, 3), pair(1, 3), draw(st.integers(1, 3))
    cin, group_size = draw(st.integers(1, 7)), draw(st.integers(1, 5))
    height, width = pair(1, 9)
    reach = [(k - 1) * d for k, d in zip(kernel, dilation)]
    kind = draw(st.sampled_from(["SAME", "VALID", "explicit"]))
    if kind == "SAME":
        padding = lax.padtype_to_pads((height, width), [r + 1 for r in reach], strides, "SAME")
    else:
        padding = [(0, 0), (0, 0)] if kind == "VALID" else [pair(0, 4), pair(0, 4)]
    height, width = (
        max(size, r + 1 - sum(p)) for size, r, p in zip((height, width), reach, padding)
    )
    return ConvSpec(
        cin=cin,
        height=height,
        width=width,
        batch=draw(st.integers(1, 3)),
        kernel=kernel,
        cout=groups * group_size,
        groups=groups,
        kept=draw(st.integers(1, cin)),
        kept_taps=draw(st.integers(1, math.prod(kernel))),
        group_size=group_size,
        strides=strides,
        padding=tuple((int(a), int(b)) for a, b in padding),
        dilation=dilation,
    )
