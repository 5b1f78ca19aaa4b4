"""An inference function is written with `jax.export` and runs in a new process."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export
from new_process import run_python

import blocksparse_jax as bsj
from experiments import models
from pallas_kernels.block_sparse_conv import available_implementations

SHAPE = (3, 3, 16, 32)
KERNEL = jax.random.normal(jax.random.key(0), SHAPE)
LAYOUT = bsj.random_groups(jax.random.key(1), SHAPE, group_size=8, kept=5, kept_taps=3)
NAMES = [None, *(n for n, reason in available_implementations().items() if reason is None)]


def infer(x, implementation=None, **options):
    bias = jnp.linspace(-1, 1, 32)
    return bsj.conv(
        x, KERNEL, LAYOUT, bias=bias, activation="relu", implementation=implementation, **options
    )


def written(f, *arguments) -> bytearray:
    return export.export(jax.jit(f), disabled_checks=bsj.native_calls())(*arguments).serialize()


def images(*shape):
    return jax.ShapeDtypeStruct(export.symbolic_shape(",".join(map(str, shape))), jnp.float32)


NEW_PROCESS = """
import sys
import jax
import numpy as np
from jax import export
import blocksparse_jax

for folder in sys.argv[1:]:
    x = np.load(f"{folder}/x.npy")
    program = export.deserialize(bytearray(open(f"{folder}/program", "rb").read()))
    np.save(f"{folder}/y.npy", program.call(x))
"""


def test_a_new_process_that_only_imports_the_package_runs_the_programs(tmp_path):
    folders = {}
    for name, batch, size in itertools.product(NAMES, (3, "b", "4*b"), (3, 8)):
        if size % {3: 3, "b": 1, "4*b": 4}[batch]:
            continue
        folder = tmp_path / f"{name} {batch} {size}"
        folder.mkdir()
        f = functools.partial(infer, implementation=name)
        (folder / "program").write_bytes(written(f, images(batch, 7, 6, 16)))
        np.save(folder / "x.npy", example(size))
        folders[folder] = jax.jit(f)(example(size))
    assert len(folders) == 4 * len(NAMES)
    done = run_python("-c", NEW_PROCESS, *map(str, folders))
    assert done.returncode == 0, done.stderr[-2000:]
    for folder, expected in folders.items():
        y = np.load(folder / "y.npy")
        np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5, err_msg=folder.name)


def example(size):
    return jnp.sin(jnp.arange(size * 7 * 6 * 16, dtype=jnp.float32)).reshape(size, 7, 6, 16)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("data_format", ["NHWC", "CHWN"])
def test_a_symbolic_batch_in_every_format_and_dtype(data_format, dtype):
    x = example(4).astype(dtype)
    shape = ["b", 7, 6, 16]
    if data_format == "CHWN":
        x, shape = x.transpose(3, 1, 2, 0), [16, 7, 6, "b"]

    def f(x):
        y = infer(x, data_format=data_format, strides=2)
        return infer(x, data_format=data_format, strides=2, residual=y)

    spec = jax.ShapeDtypeStruct(export.symbolic_shape(",".join(map(str, shape))), dtype)
    program = export.deserialize(written(f, spec))
    np.testing.assert_array_equal(program.call(x), jax.jit(f)(x))


@pytest.mark.parametrize("name", NAMES)
def test_the_gradient_has_a_symbolic_batch_too(name):
    def gradient(x, kernel):
        def loss(x, kernel):
            return (bsj.conv(x, kernel, LAYOUT, implementation=name) ** 2).sum()

        return jax.grad(loss, (0, 1))(x, kernel)

    program = export.deserialize(written(gradient, images("b", 7, 6, 16), KERNEL))
    actual, expected = program.call(example(5), KERNEL), jax.jit(gradient)(example(5), KERNEL)
    for a, b in zip(actual, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * float(jnp.abs(b).max()))


def test_a_program_of_one_batch_size_is_traced_twice_without_confusion():
    """Two symbols of one name are two sizes: the tables of choices keep them apart."""
    first, second = (written(infer, images("b", 7, 6, 16)) for _ in range(2))
    for program in (first, second):
        np.testing.assert_array_equal(
            export.deserialize(program).call(example(2)), jax.jit(infer)(example(2))
        )


def test_a_network_of_the_zoo():
    network = models.create("cnn", num_classes=10, width=0.5)
    x = jax.random.normal(jax.random.key(0), (4, 16, 16, 3))
    variables = network.init(jax.random.key(1), x)
    tx = bsj.keep_zeros(bsj.hrbp_prune(0.8, group_size=8))
    state = tx.init(variables["params"])
    layouts = bsj.get_layouts(state)

    def logits(x):
        return network.apply(variables | {"layouts": layouts}, x)

    program = export.deserialize(written(logits, images("b", 16, 16, 3)))
    np.testing.assert_allclose(program.call(x), jax.jit(logits)(x), rtol=1e-4, atol=1e-4)
