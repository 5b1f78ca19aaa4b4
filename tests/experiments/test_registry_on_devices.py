"""The masks of every method of the registry on 8 devices: those of one, step by step.

The devices are host devices of a new process, as XLA counts them once at its start. It computes in
float64, so that the order of a sum over the batch decides nothing.
"""

import functools
import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from new_process import host_devices, run_python
from small_runs import fixes_sparsity
from tiny_runs import PER_EPOCH, config

from experiments.data import load
from experiments.training.config import resolve
from experiments.training.execution import channels_of, masks_of
from experiments.training.registry import METHODS
from experiments.training.seeding import first_batch, trainer_for

DEVICES = 8
EPOCHS = 2
PROCESSES = 5  # each runs its share of the methods, and starts JAX once

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("first", range(PROCESSES))
def test_masks_on_8_devices_are_those_on_one(first, tmp_path):
    """Through the trainer, with the batch sharded: masks of every step, channels that are left."""
    names = list(METHODS)[first::PROCESSES]
    environment = host_devices(DEVICES) | {"JAX_ENABLE_X64": "1"}
    done = run_python(__file__, str(tmp_path), *names, **environment)
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == dict.fromkeys(names, "the same")


def as_float64(tree):
    return jax.tree.map(
        lambda x: x.astype(float) if jnp.issubdtype(x.dtype, jnp.floating) else x, tree
    )


def train(settings, data, mesh):
    """After each step: the masks, and how many channels each space of the network has."""
    trainer = trainer_for(settings, data)
    network = trainer.network
    network._create = functools.partial(network._create, dtype=jnp.float64)
    initial = trainer.initial()
    trainer.initial = lambda: as_float64(initial)
    state = trainer.init(as_float64(first_batch(settings, data)))
    if mesh is not None:
        state = jax.device_put(state, NamedSharding(mesh, P()))
    history = []
    for step in range(trainer.length.total):
        epoch, done = divmod(step, PER_EPOCH)
        batches = data.train_batches(epoch, settings.batch_size, settings.seed, start_step=done)
        batch = as_float64(next(iter(batches)))
        if mesh is not None:
            batch = jax.device_put(batch, NamedSharding(mesh, P("data")))
        state, _ = trainer.step(state, step, *batch)
        history.append((masks_of(state), channels_of(state)))
    assert all(leaf.dtype == float for leaf in jax.tree.leaves(state.params))
    return state, history


def difference(sharded, expected):
    """Where two runs differ first, every device's part of the masks looked at; else "the same"."""
    for step, ((masks, left), (others, left_there)) in enumerate(
        zip(sharded[1], expected[1], strict=True)
    ):
        if left != left_there:
            return f"step {step} leaves the channels {left}, on one device {left_there}"
        for mask, other in zip(jax.tree.leaves(masks), jax.tree.leaves(others), strict=True):
            for shard in mask.addressable_shards:
                if not np.array_equal(shard.data, np.asarray(other)[shard.index]):
                    return f"masks differ at step {step} on {shard.device}"
    params = [jax.tree.leaves(run[0].params) for run in (sharded, expected)]
    assert all(len(leaf.sharding.device_set) == DEVICES for leaf in params[0])
    same = all(np.allclose(a, b, rtol=1e-9, atol=1e-12) for a, b in zip(*params, strict=True))
    return "the same" if same else "parameters differ"


def compare(name, folder, mesh):
    sparsity = None if fixes_sparsity(name) else 0.8
    settings = resolve(
        config(folder, method=name, epochs=EPOCHS, sparsity=sparsity, execution="masked")
    )
    data = load(settings.dataset, settings.data_dir)
    runs = [train(settings, data, mesh) for mesh in (mesh, None)]
    return difference(*runs)


if __name__ == "__main__":
    from pathlib import Path

    assert len(jax.devices()) == DEVICES
    data_mesh = jax.make_mesh((DEVICES,), ("data",), axis_types=(AxisType.Auto,))
    print(json.dumps({name: compare(name, Path(sys.argv[1]), data_mesh) for name in sys.argv[2:]}))
