"""The zoo in convolutions between batch norms: the same training step as in the plain network."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import blocksparse_jax as bsj
from blocksparse_jax.tree import conv_kernels, path_name
from experiments.models import create

FAMILIES = {
    "vgg19": ({"width": 0.0625}, None, 16),
    "resnet20": ({"width": 0.5}, (1, 2), 8),
    "resnet50": ({"width": 0.0625, "stem": "imagenet"}, (1, 2), 32),
    "mobilenet_v1": ({"width": 0.0625}, None, 8),
}

SLOW = [pytest.mark.slow]


def step(name, fused, variables=None, layouts=None, dtype=jnp.float64, **more):
    """The loss, the gradients and the statistics of one step."""
    options, blocks, size = FAMILIES[name]
    model = create(name, num_classes=5, fused=fused, dtype=dtype, **options, **more)
    model = model if blocks is None else model.clone(blocks=blocks)
    rng = np.random.default_rng(0)
    images = jnp.asarray(rng.standard_normal((4, size, size, 3)), dtype)
    labels = jnp.arange(4) % 5
    if variables is None:
        variables = model.init(jax.random.key(0), images)
        variables = jax.tree.map(
            lambda a: (a + 0.1 * rng.standard_normal(a.shape)).astype(dtype), variables
        )
        variables["batch_stats"] = jax.tree.map(jnp.abs, variables["batch_stats"])

    def loss(params):
        given = {"params": params, "batch_stats": variables["batch_stats"]}
        given |= {"layouts": layouts} if layouts else {}
        logits, changed = model.apply(given, images, train=True, mutable=["batch_stats"])
        cross = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        return cross.mean(), changed["batch_stats"]

    return variables, jax.jit(jax.value_and_grad(loss, has_aux=True))(variables["params"])


def assert_same(results, expected, tolerance):
    assert jax.tree.structure(results) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(results), jax.tree.leaves(expected)):
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * max(1e-2, np.abs(b).max()))


@pytest.mark.parametrize(
    ("name", "data_format"),
    [
        pytest.param(
            name, data_format, marks=[] if name == "resnet50" and data_format == "CHWN" else SLOW
        )
        for name in FAMILIES
        for data_format in ("CHWN", "NHWC")
    ],
)
def test_the_step_is_that_of_the_plain_network(name, data_format):
    with jax.enable_x64(True):
        variables, expected = step(name, False, data_format=data_format)
        _, results = step(name, True, variables, data_format=data_format)
        assert_same(results, expected, 1e-5)


def test_the_step_of_a_block_sparse_network():
    variables, _ = step("resnet20", False, dtype=jnp.float32)

    def layout(path, leaf):
        if not conv_kernels(path_name(path), leaf):
            return bsj.Dense()
        key = jax.random.key(len(path_name(path)))
        taps = min(3, leaf.shape[0] * leaf.shape[1])
        return bsj.random_groups(key, leaf.shape, group_size=4, kept=4, kept_taps=taps)

    layouts = jax.tree_util.tree_map_with_path(layout, variables["params"])
    variables["params"] = jax.tree.map(
        lambda at, leaf: bsj.pack(leaf, at) if isinstance(at, bsj.BlockLayout) else leaf,
        layouts,
        variables["params"],
        is_leaf=bsj.is_layout,
    )
    (_, expected), (_, results) = (
        step("resnet20", fused, variables, layouts, jnp.float32) for fused in (False, True)
    )
    assert_same(results, expected, 1e-3)
