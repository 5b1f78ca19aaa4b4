"""Runs of SUBP over given kernels: which blocks are kept after each update."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import references as ref

import blocksparse_jax as bsj


def conv_kernels(path, leaf):
    """Chooses every kernel of a convolution, the stem's too."""
    return leaf.ndim == 4


def channels_of(state, block):
    return ref.subp_channels(np.asarray(bsj.get_masks(state)["conv"]), block)


@functools.cache
def compiled(**options):
    """Jitted `init(key, kernel)` and `update(kernel, state)`, which takes the kernel as the weights
    after the update: neither another key nor another hypothesis example compiles again.
    """

    def method(key):
        return bsj.sparse(bsj.subp(where=conv_kernels, key=key, **options), optax.set_to_zero())

    def init(key, kernel):
        return method(key).init({"conv": kernel})

    def update(kernel, state):
        return method(None).update({"conv": jnp.zeros_like(kernel)}, state, {"conv": kernel})[1]

    return jax.jit(init), jax.jit(update)


def run_subp(kernels, seed=0, **options):
    """Kept blocks, `[groups, cin]`, before the first update and after each of the updates that end
    in `kernels`.
    """
    block = ref.subp_block(kernels[0].shape[-1], options.get("block", 16))
    init, update = compiled(**options)
    state = init(jax.random.key(seed), kernels[0])
    yield channels_of(state, block)
    for kernel in kernels:
        state = update(kernel, state)
        yield channels_of(state, block)
