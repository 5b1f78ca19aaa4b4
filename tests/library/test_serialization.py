"""`flax.serialization` writes and restores optimizer states that hold layouts."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import serialization

import blocksparse_jax as bsj

PARAMS = {"conv": {"kernel": jax.random.normal(jax.random.key(0), (3, 3, 30, 32))}}
METHODS = {
    "BlockLayout": lambda: bsj.hrbp_prune(0.8, group_size=16, block_density=1),
    "FilterGroups": lambda: bsj.gradual(
        0.8,
        pattern=bsj.patterns.block(group_size=16, block_density=1),
        schedule=bsj.between(0, 4, every=2),
    ),
}


@pytest.mark.parametrize("kind", ["BlockLayout", "FilterGroups"])
def test_a_state_is_restored_into_one_of_other_values(kind):
    tx = bsj.sparse(METHODS[kind](), optax.adam(1e-2))
    state, other = tx.init(PARAMS), tx.init(jax.tree.map(lambda leaf: leaf[..., ::-1], PARAMS))
    is_kind = lambda node: type(node).__name__ == kind  # noqa: E731
    assert any(map(is_kind, jax.tree.leaves(state, is_leaf=is_kind)))
    restored = serialization.from_bytes(other, serialization.to_bytes(state))
    assert jax.tree.structure(restored) == jax.tree.structure(state)
    for before, after in zip(jax.tree.leaves(state), jax.tree.leaves(restored), strict=True):
        np.testing.assert_array_equal(before, after)
    differ = [
        (jnp.asarray(a) != jnp.asarray(b)).any()
        for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(other), strict=True)
    ]
    assert any(differ), "the target already had these values"
