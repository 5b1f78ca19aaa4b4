"""Every sparse method with small settings, and a small network to prune: what the tests of all
methods run over.

A new method needs one line in `METHODS`, and one of a new kind a place in `KINDS`.
"""

import jax
import jax.numpy as jnp
import optax
import pytest

import blocksparse_jax as bsj


def small_tree():
    """The parameters of a stem, two conv layers and a classifier, as a linen-like dict."""
    return _small_tree()


@jax.jit
def _small_tree():
    keys = iter(jax.random.split(jax.random.key(7), 8))
    return {
        "stem": {"kernel": jax.random.normal(next(keys), (3, 3, 3, 16))},
        "conv1": {"kernel": jax.random.normal(next(keys), (3, 3, 16, 32)), "bias": jnp.ones(32)},
        "conv2": {"kernel": jax.random.normal(next(keys), (1, 1, 32, 32))},
        "classifier": {"kernel": jax.random.normal(next(keys), (32, 10))},
    }


@jax.jit
def noise(params, step):
    """Fresh, full gradients for each step: nothing in them knows about masks."""
    leaves, structure = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.fold_in(jax.random.key(11), step), len(leaves))
    drawn = [
        jax.random.normal(k, leaf.shape, leaf.dtype) for k, leaf in zip(keys, leaves, strict=True)
    ]
    return jax.tree.unflatten(structure, drawn)


def only_conv1(name, leaf):
    """A choice of one layer: the update of "hrbp-gradient" holds the whole search for groups, which
    takes long to compile for each layer.
    """
    return name == "conv1/kernel"


def quartic(params, scale):
    """A loss for SNIP, whose gradient grows with the weights."""
    return scale * sum(jnp.sum(leaf**4) for leaf in jax.tree.leaves(params))


def quartic_of_each(params, scales):
    """The same for GraSP, which cuts its batch."""
    return quartic(params, scales.sum().astype(jax.tree.leaves(params)[0].dtype))


# name -> (params -> method). The masks of moving methods move at steps 3, 6, ... or 2, 5, ...
METHODS = {
    "hrbp": lambda p: bsj.hrbp_prune(0.7, group_size=16),
    "hrbp-gradient": lambda p: bsj.hrbp_prune(
        0.75, group_size=16, scores="gradient", where=only_conv1
    ),
    "hrbp-dynamic": lambda p: bsj.hrbp_prune(
        0.75, group_size=16, block_density=1.0, schedule=bsj.every(3), drop_fraction=0.6
    ),
    "rigl": lambda p: bsj.rigl(0.7, update_every=3, until=1000, drop_fraction=0.6),
    "set": lambda p: bsj.set_(0.7, schedule=bsj.every(3), drop_fraction=0.6),
    "snfs": lambda p: bsj.snfs(0.7, schedule=bsj.every(3), drop_fraction=0.6),
    "deep-r": lambda p: bsj.deep_r(0.7, schedule=bsj.between(1, 1000), temperature=0.1),
    "dsr": lambda p: bsj.dsr(0.7, schedule=bsj.every(3), threshold=0.3),
    "srigl": lambda p: bsj.srigl(0.7, schedule=bsj.every(3), drop_fraction=0.6),
    "mest": lambda p: bsj.mest(0.7, schedule=bsj.between(2, 20, every=3), fraction=0.3),
    "granet": lambda p: bsj.granet(0.7, schedule=bsj.between(2, 20, every=3)),
    "nest": lambda p: bsj.nest(0.7, schedule=bsj.between(2, 20, every=3), grow_until=5),
    "narang": lambda p: bsj.narang(0.7, schedule=bsj.between(2, 20, every=3)),
    "gradual": lambda p: bsj.gradual_magnitude(0.7, start=2, end=20, update_every=3),
    "gradual-blocks": lambda p: bsj.gradual(
        0.7, pattern=bsj.patterns.one_by_n(16), schedule=bsj.between(2, 20, every=3)
    ),
    "campfire": lambda p: bsj.campfire(0.7, era=(2, 18), window_share=0.5),
    "subp-hard": lambda p: bsj.subp(0.5, block=16, start=2, end=20, update_every=3, soft=False),
    "group-lasso": lambda p: bsj.group_lasso(
        0.7, schedule=bsj.between(2, 20, every=3), strength=0.5, threshold=1.0
    ),
    "brain-damage": lambda p: bsj.brain_damage(
        0.7, schedule=bsj.between(2, 20, every=3), strength=0.5, threshold=0.8
    ),
    "magnitude": lambda p: bsj.magnitude(0.7),
    "snip": lambda p: bsj.one_shot(0.7, scores=bsj.snip(quartic, p, 1.0), budget="global"),
    "grasp": lambda p: bsj.one_shot(
        0.7, scores=bsj.grasp(quartic_of_each, p, jnp.array([1.0, 2.0])), budget="global"
    ),
    "synflow": lambda p: bsj.one_shot(
        0.7, scores=bsj.synflow(quartic, p, 1.0, sparsity=0.7, rounds=3), budget="global"
    ),
    "rumi": lambda p: bsj.fixed_masks(
        bsj.rumi_masks(bsj.random_masks(jax.random.key(3), p, 0.9), clusters=2, min_rows=4)
    ),
    "dsb": lambda p: bsj.fixed_masks(bsj.dsb_masks(p, 0.7, block=8)),
    "deep-compression": lambda p: bsj.deep_compression(
        0.7, schedule=bsj.between(2, 20, every=3), budget="erk"
    ),
    "variational-dropout": lambda p: bsj.variational_dropout(0.7),
    "fixed": lambda p: bsj.fixed_masks(bsj.random_masks(jax.random.key(3), p, 0.7)),
    "random-channel": lambda p: bsj.fixed_masks(
        layouts=bsj.random_channel_layouts(jax.random.key(0), p, 0.7)
    ),
    "subp": lambda p: bsj.subp(0.5, block=16, start=2, end=20, update_every=3),
    "sr-ste": lambda p: bsj.sr_ste(2, 4),
    "ste": lambda p: bsj.ste(1, 4, axis="kernel"),
}
STRAIGHT_THROUGH = ["subp", "sr-ste", "ste", "variational-dropout"]
HARD = [name for name in METHODS if name not in STRAIGHT_THROUGH]
# Hard methods whose masks stay as they are at init.
STATIC = ["hrbp", "magnitude", "snip", "grasp", "synflow", "rumi", "dsb"]
STATIC += ["fixed", "random-channel"]
# Hard methods that prune weights in the midst of training.
MOVING = [name for name in HARD if name not in (*STATIC, "hrbp-gradient")]
# Of these, the ones that grow as many weights as they prune.
EXCHANGING = ["hrbp-dynamic", "rigl", "set", "snfs", "deep-r", "dsr", "srigl", "mest"]
# One method of each kind: masks or layouts that stay, weights exchanged or pruned at some steps,
# masks that follow the weights, and a soft method that resizes its layouts.
KINDS = ["fixed", "random-channel", "rigl", "gradual", "sr-ste", "subp"]


def slow_unless(condition, *values, **options):
    """A parameter set that is a slow test where the condition does not hold."""
    return pytest.param(*values, marks=[] if condition else [pytest.mark.slow], **options)


def kinds_first(names):
    """Names of methods as parameters for a test of what all methods inherit from the frame: those
    of `KINDS` run always, the others are slow tests.
    """
    return [slow_unless(name in KINDS, name) for name in names]


def chain(name, *optimizer):
    """`optax.chain` of a method for `small_tree()` and an optimizer."""
    return optax.chain(METHODS[name](small_tree()), *optimizer)
