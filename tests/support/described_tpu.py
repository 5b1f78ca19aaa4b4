"""Compiling a training step of the zoo for a TPU v5e on a machine without a TPU.

`test_tpu_step.py` starts this file in a process of its own, because the compiler reads the chip's
description from the environment: `python described_tpu.py CONFIG...`, each CONFIG the JSON of some
fields of a `TrainConfig`. It prints what each step costs as one line of JSON.
"""

import dataclasses
import importlib.util
import json
import sys
from pathlib import Path
from unittest import mock

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

IMAGE, CLASSES, BATCH = (32, 32, 3), 10, 128


def compiler() -> Path | None:
    """The TPU compiler: where `make tpu-compilers` puts it, or that of an installed libtpu."""
    spec = importlib.util.find_spec("libtpu")
    folders = [
        Path(sys.prefix) / "tpu" / "libtpu",
        *(spec.submodule_search_locations if spec else ()),
    ]
    files = [Path(folder) / "libtpu.so" for folder in folders]
    return next((file for file in files if file.is_file()), None)


def missing() -> str | None:
    """Why nothing can be compiled for a described TPU here; None where it can."""
    return None if compiler() else "needs the TPU compiler: `make tpu-compilers`"


def environment() -> dict[str, str]:
    """What the compiler must know of the machine that is described, and does not ask a TPU for."""
    return {
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        "TPU_ACCELERATOR_TYPE": "v5litepod-4",
        "TPU_LIBRARY_PATH": str(compiler()),
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_WORKER_HOSTNAMES": "localhost",
    }


def step_costs(**fields) -> dict[str, float]:
    """FLOPs and bytes accessed of the first training step of a config, and its convolutions."""
    from experiments.training.config import TrainConfig, resolve
    from experiments.training.length import Length
    from experiments.training.loop import Trainer

    topology = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2")
    sharding = SingleDeviceSharding(topology.devices[0])

    def described(array) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=sharding)

    config = TrainConfig(dataset="cifar10", precision="bfloat16", batch_size=BATCH, **fields)
    with mock.patch.object(jax, "default_backend", return_value="tpu"):
        config = resolve(config)
    trainer = Trainer(config, IMAGE, CLASSES, Length(steps_per_epoch=390, total=390 * 160))
    state = jax.tree.map(described, trainer.init())
    images = described(jax.ShapeDtypeStruct((BATCH, *IMAGE), jnp.float32))
    labels = described(jax.ShapeDtypeStruct((BATCH,), jnp.int32))
    with mock.patch.object(jax, "default_backend", return_value="tpu"):
        without = dataclasses.replace(state, layouts={})
        step = trainer._step.lower(without, state.layouts, images, labels, dense_gradient=False)
    compiled = step.compile()
    cost = compiled.cost_analysis()
    return {"flops": cost["flops"], "bytes": cost["bytes accessed"], "form": state.form}


if __name__ == "__main__":
    for argument in sys.argv[1:]:
        print(json.dumps(step_costs(**json.loads(argument))), flush=True)
