"""Optimizer states on 8 devices: the same masks, bit for bit, as on one.

The devices are host devices of a new process, as XLA counts them once at its start.
"""

import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from new_process import host_devices, run_python
from sparse_methods import METHODS, chain, slow_unless, small_tree

import blocksparse_jax as bsj

DEVICES = 8
STEPS = 7
# The search for groups takes long to compile for 8 devices: at init of all HRBP, and in the update
# of "hrbp-gradient".
SEARCH_AT_INIT = ["hrbp", "hrbp-dynamic", "hrbp-gradient"]
# Masks exchanged at some steps, in blocks too, masks that follow the weights, resized layouts.
FAST = ["rigl", "hrbp-dynamic", "sr-ste", "subp"]
OTHERS = [name for name in METHODS if name not in (*FAST, "hrbp-gradient")]
SEARCH = ["hrbp", "hrbp-gradient", "--search"]


@pytest.mark.parametrize(
    "names",
    [FAST, slow_unless(False, OTHERS), slow_unless(False, SEARCH)],
    ids=["fast", "others", "search"],
)
def test_masks_on_8_devices_are_those_on_one(names):
    """Every method, with its parameters and state replicated or sharded over the filters, and the
    batch sharded; the first masks are drawn on all devices too.
    """
    done = run_python(__file__, *names, **host_devices(DEVICES))
    assert done.returncode == 0, done.stdout + done.stderr
    reports = json.loads(done.stdout.splitlines()[-1])
    assert sorted(reports) == sorted(set(names) - {"--search"})
    for name, report in reports.items():
        assert report == dict.fromkeys(PLACEMENTS, "the same"), name


def rounded(tree, digits):
    """Values with few binary digits: sums of them are exact in any order."""
    return jax.tree.map(lambda x: jnp.clip(jnp.round(x * 2**digits) / 2**digits, -3, 3), tree)


def gradients(params, batch):
    """Of a loss over a batch, which lies on all devices."""

    def loss(params):
        return sum(
            jnp.mean(jnp.sum(p * x, axis=range(1, x.ndim)))
            for p, x in zip(jax.tree.leaves(params), jax.tree.leaves(batch), strict=True)
        )

    return jax.grad(loss)(params)


def batch_at(step):
    """An example for each device: its gradient is the example itself."""
    keys = iter(jax.random.split(jax.random.key(100 + step), 8))
    examples = jax.tree.map(
        lambda p: jax.random.normal(next(keys), (DEVICES, *p.shape)), small_tree()
    )
    return rounded(examples, 3)


def replicated(shape):
    return P()


def over_filters(shape):
    """Arrays of the size of a parameter are sharded: kernels over their filters, the classifier
    over its inputs.
    """
    shapes = [leaf.shape for leaf in jax.tree.leaves(small_tree())]
    if shape not in shapes:
        return P()
    return P("data", None) if len(shape) == 2 else P(*[None] * (len(shape) - 1), "data")


PLACEMENTS = {"replicated": replicated, "over filters": over_filters}


def shardings(tree, place, mesh):
    return jax.tree.map(lambda leaf: NamedSharding(mesh, place(leaf.shape)), tree)


def train(tx, params, state, place, mesh):
    """The masks after every step. The step is compiled once, and the state stays where it was."""
    traces = []

    def step(params, state, batch):
        traces.append(None)
        updates, state = tx.update(gradients(params, batch), state, params)
        return optax.apply_updates(params, updates), state

    if mesh is None:
        jitted = jax.jit(step)
    else:
        placed = shardings((params, state), place, mesh)
        params, state = jax.device_put((params, state), placed)
        jitted = jax.jit(step, out_shardings=placed)
    history = []
    for t in range(STEPS):
        batch = batch_at(t)
        if mesh is not None:
            batch = jax.device_put(batch, NamedSharding(mesh, P("data")))
        params, state = jitted(params, state, batch)
        history.append(bsj.get_masks(state))
    assert len(traces) == 1
    if mesh is not None:
        now = jax.tree.map(lambda leaf: leaf.sharding, (params, state))
        assert jax.tree.leaves(now) == jax.tree.leaves(placed)
    return params, state, history


def difference(sharded, expected):
    """Where two runs differ first, every device's part of the masks looked at; else None."""
    for t, (masks, others) in enumerate(zip(sharded[2], expected[2], strict=True)):
        for mask, other in zip(jax.tree.leaves(masks), jax.tree.leaves(others), strict=True):
            for shard in mask.addressable_shards:
                if not np.array_equal(shard.data, np.asarray(other)[shard.index]):
                    return f"masks differ at step {t} on {shard.device}"
    for part, other in zip(sharded[:2], expected[:2], strict=True):
        for (path, a), b in zip(
            jax.tree.leaves_with_path(part), jax.tree.leaves(other), strict=True
        ):
            if not np.allclose(np.asarray(a, float), np.asarray(b, float), rtol=1e-6, atol=1e-7):
                return f"{jax.tree_util.keystr(path)} differs"
    return None


def compare(name, mesh, init_on_all):
    """One method under each placement: "the same", or what differs from one device."""
    tx = bsj.keep_zeros(chain(name, optax.sgd(0.125, momentum=0.5)))
    params = rounded(small_tree(), 4)
    state = tx.init(params)
    expected = train(tx, params, state, None, None)
    report = {}
    for placement, place in PLACEMENTS.items():
        first = state
        if init_on_all:
            first = tx.init(jax.device_put(params, shardings(params, place, mesh)))
        sharded = train(tx, params, first, place, mesh)
        report[placement] = difference(sharded, expected) or "the same"
    return report


if __name__ == "__main__":
    assert len(jax.devices()) == DEVICES
    data_mesh = jax.make_mesh((DEVICES,), ("data",), axis_types=(AxisType.Auto,))
    search = "--search" in sys.argv
    print(
        json.dumps(
            {
                name: compare(name, data_mesh, search or name not in SEARCH_AT_INIT)
                for name in sys.argv[1:]
                if name in METHODS
            }
        )
    )
