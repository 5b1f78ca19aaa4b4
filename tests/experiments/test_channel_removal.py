"""Networks of the zoo with channels removed: the smaller network computes the same function."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sparse_methods import slow_unless

import blocksparse_jax as bsj
from blocksparse_jax.tree import path_name
from experiments.models import create, widths_of
from experiments.models.spaces import channel_spaces

# The shallow ResNets have shortcuts with and without a convolution.
NETWORKS = {
    "cnn": {"width": 0.25},
    "resnet20": {"blocks": (2, 1, 1)},
    "resnet50": {"width": 0.125, "blocks": (2, 1, 1, 1)},
    "vgg19": {"width": 0.125},
    "mobilenet_v1": {"width": 0.25},
}


def network(name, *, widths=None, blocks=None, **options):
    model = create(name, num_classes=10, widths=widths, **options)
    return model if blocks is None else model.clone(blocks=blocks)


def random_variables(model, images):
    """No norm is the identity, no two channels are alike."""
    shapes = jax.eval_shape(model.init, jax.random.key(0), images)
    rng = np.random.default_rng(0)

    def values(path, leaf):
        array = rng.normal(size=leaf.shape).astype(np.float32)
        if leaf.ndim > 1:
            return jnp.asarray(array / np.sqrt(np.prod(leaf.shape[:-1])))
        return jnp.asarray(np.abs(array) + 0.5 if path_name(path).endswith("var") else array)

    return jax.tree.map_with_path(values, shapes)


def kept_channels(params):
    """About two thirds of each space, a number that no other space has by chance."""
    spaces, sizes, rng = channel_spaces(params), {}, np.random.default_rng(1)
    leaves = {path_name(path): leaf for path, leaf in jax.tree.leaves_with_path(params)}
    for space, ((name, axis), *_) in spaces.items():
        sizes[space] = leaves[name].shape[axis]
    return spaces, {
        space: np.arange(n) == rng.integers(n) if n < 3 else rng.permutation(n) < -(-2 * n // 3)
        for space, n in sizes.items()
    }


def silenced(tree, spaces, kept, ends):
    """The tree with zeros at the removed channels of the leaves and axes that `ends` accepts."""
    gone = {}
    for space, entries in spaces.items():
        for name, axis in entries:
            if ends(name, axis):
                gone.setdefault(name, []).append((axis, kept[space]))

    def zero(path, leaf):
        for axis, keeps in gone.get(path_name(path), ()):
            leaf = leaf * jnp.expand_dims(keeps, [a for a in range(leaf.ndim) if a != axis])
        return leaf

    return jax.tree.map_with_path(zero, tree)


def reads(name, axis):
    """A kernel's input axis: no layer reads the channel."""
    return name.endswith("kernel") and axis != 3


def norms(name, axis):
    """A norm's factor and shift: no layer of a stream writes to the channel."""
    return name.endswith(("scale", "bias"))


@pytest.mark.parametrize("silent", [reads, norms], ids=["nothing_reads", "nothing_writes"])
@pytest.mark.parametrize(
    "name", [slow_unless(name in ("cnn", "resnet20"), name) for name in NETWORKS]
)
def test_the_smaller_network_computes_the_function_of_the_larger_one(name, silent):
    """With zero channels, in training mode (statistics and gradients too) and at inference."""
    size = 32 if name == "vgg19" else 16  # its last norms need more than a few values
    images = jax.random.normal(jax.random.key(1), (4, size, size, 3))
    large = network(name, **NETWORKS[name])
    variables = random_variables(large, images)
    params, stats = variables["params"], variables["batch_stats"]
    spaces, kept = kept_channels(params)
    params = silenced(params, spaces, kept, silent)
    fewer, fewer_stats = bsj.remove_channels(spaces, kept, params, stats)
    small = network(name, widths=widths_of(fewer), **NETWORKS[name])

    def run(model, params, stats):
        def loss(params):
            logits, changed = model.apply(
                {"params": params, "batch_stats": stats},
                images,
                train=True,
                mutable=["batch_stats"],
            )
            return jnp.sum(jnp.sin(logits)), (logits, changed["batch_stats"])

        (_, (trained, new_stats)), grads = jax.value_and_grad(loss, has_aux=True)(params)
        inferred = model.apply({"params": params, "batch_stats": stats}, images, train=False)
        return {"train": trained, "eval": inferred}, new_stats, grads

    quick = {"xla_backend_optimization_level": 0}  # runs once: compiling counts
    jitted = jax.jit(run, static_argnums=0, compiler_options=quick)
    logits, new_stats, grads = jitted(large, params, stats)
    fewer_logits, *fewer_trees = jitted(small, fewer, fewer_stats)
    for mode, expected in logits.items():
        np.testing.assert_allclose(fewer_logits[mode], expected, rtol=2e-4, atol=2e-4)
    cut_grads, cut_stats = bsj.remove_channels(spaces, kept, grads, new_stats)
    for expected, actual in ((cut_stats, fewer_trees[0]), (cut_grads, fewer_trees[1])):
        for a, b in zip(jax.tree.leaves(expected), jax.tree.leaves(actual), strict=True):
            np.testing.assert_allclose(b, a, rtol=1e-2, atol=2e-3 * max(1, np.abs(a).max()))


@pytest.mark.parametrize("name", NETWORKS)
def test_a_network_made_for_the_widths_has_exactly_the_smaller_parameters(name):
    """Down to one channel in each space; an init gives the shapes, so shortcuts keep their form."""
    images = jax.ShapeDtypeStruct((2, 16, 16, 3), jnp.float32)
    large = network(name, **NETWORKS[name])
    shapes = jax.eval_shape(large.init, jax.random.key(0), images)
    zeros = jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float32), shapes)
    spaces, kept = kept_channels(zeros["params"])
    one = {space: np.arange(keeps.size) == 0 for space, keeps in kept.items()}
    for keeps in (kept, one):
        fewer = bsj.remove_channels(spaces, keeps, zeros["params"], zeros["batch_stats"])
        small = network(name, widths=widths_of(fewer[0]), **NETWORKS[name])
        made = jax.eval_shape(small.init, jax.random.key(0), images)
        found = made["params"], made["batch_stats"]
        assert jax.tree.map(jnp.shape, found) == jax.tree.map(jnp.shape, tuple(fewer))
    assert widths_of(zeros["params"]) == widths_of(shapes["params"])
    assert set(widths_of(fewer[0]).values()) == {1}
