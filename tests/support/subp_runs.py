"""Runs of SUBP over given kernels: which blocks are kept after each update."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import references as ref

import blocksparse_jax as bsj


def conv_kernels(path, leaf):
    """Chooses every kernel of a convolution, the stem's too."""
    return leaf.ndim == 4


def channels_of(state, block):
    return ref.subp_channels(np.asarray(bsj.get_masks(state)["conv"]), block)


@functools.cache
def compiled(**options):
    """Jitted `init(params)` and `update(key, kernel, state)`: neither another key nor another
    hypothesis example compiles again.
    """

    def method(key):
        return bsj.subp(where=conv_kernels, key=key, **options)

    def update(key, kernel, state):
        return method(key).update({"conv": jnp.zeros_like(kernel)}, state, {"conv": kernel})[1]

    return jax.jit(method(None).init), jax.jit(update)


def run_subp(kernels, seed=0, **options):
    """Kept blocks, `[groups, cin]`, before the first update and after each of the updates with
    `kernels`.
    """
    block = ref.subp_block(kernels[0].shape[-1], options.get("block", 16))
    init, update = compiled(**options)
    state = init({"conv": kernels[0]})
    yield channels_of(state, block)
    for kernel in kernels:
        state = update(jax.random.key(seed), kernel, state)
        yield channels_of(state, block)
