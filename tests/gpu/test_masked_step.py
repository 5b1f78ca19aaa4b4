"""Masked execution compiled for an H200 that is only described: it is the dense step, and masks."""

import math
import re

import jax
import pytest
from described_gpu import described_h200, missing
from requirements import needs

from experiments.bench.gpu.step_setup import STEP, set_up
from experiments.bench.gpu.training_units import QUICK_NETWORKS, StepOptions, Unit
from experiments.training import loop

pytestmark = needs(missing())
OPTIONS = StepOptions("bfloat16", 8, 1, 1, False)
MOST_OVER_DENSE = 1.15
BYTES = {"f32": 4, "bf16": 2, "s32": 4, "pred": 1}


def compiled_step(execution, monkeypatch):
    """The entry computation of a step: `{name: (shape, opcode, names of the operands)}`."""
    sparsity = 0.0 if execution == "dense" else 0.9
    setup = set_up(OPTIONS, Unit(QUICK_NETWORKS[0], execution, sparsity, ""), None)
    arrays = jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=described_h200()),
        (setup.state, setup.images, setup.labels),
    )
    with monkeypatch.context() as patch:
        patch.setattr(jax, "default_backend", lambda: "gpu")
        lowered = setup.trainer.lower(arrays[0], STEP, *arrays[1:])
    program = lowered.compile({"xla_gpu_autotune_level": 0}).as_text()
    entry = program[program.index("ENTRY") :]
    found = re.findall(r"%(\S+) = (\(.*?\)|\S+) ([\w-]+)\((.*)", entry)
    return {
        name: (shape, code, re.findall(r"%([\w.-]+)", rest)) for name, shape, code, rest in found
    }


def kernel_copies(step):
    """How many float32 arrays of rank 4, weights or moments, are copied whole."""
    return sum(code == "copy" and shape.startswith("f32[") for shape, code, _ in step.values())


def moved_bytes(step):
    """What the fusions and copies read and write."""

    def size(shape):
        arrays = re.findall(r"(\w+)\[([\d,]*)\]", shape)
        return sum(
            BYTES.get(dtype, 0) * math.prod(int(n) for n in sizes.split(",") if n)
            for dtype, sizes in arrays
        )

    return sum(
        size(shape) + sum(size(step[name][0]) for name in operands if name in step)
        for shape, code, operands in step.values()
        if code in ("fusion", "copy")
    )


def test_a_masked_step_moves_what_a_dense_one_does_and_its_masks(monkeypatch):
    dense, masked = (compiled_step(name, monkeypatch) for name in ("dense", "masked"))
    assert moved_bytes(masked) <= MOST_OVER_DENSE * moved_bytes(dense)
    assert kernel_copies(masked) == kernel_copies(dense) == 0


@pytest.mark.slow
def test_an_update_that_transposes_copies_the_weights(monkeypatch):
    monkeypatch.setattr(loop, "_in_order", lambda grad: grad)
    assert kernel_copies(compiled_step("masked", monkeypatch)) > 0
