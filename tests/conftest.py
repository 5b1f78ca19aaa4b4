"""Shared fixtures: a small network's parameters, and warnings of third parties that are not ours to mend."""

import jax
import jax.numpy as jnp
import pytest


@pytest.fixture
def params():
    """A stem, two conv layers and a classifier, as a linen-like dict."""
    keys = iter(jax.random.split(jax.random.key(7), 8))
    return {
        "stem": {"kernel": jax.random.normal(next(keys), (3, 3, 3, 16))},
        "conv1": {"kernel": jax.random.normal(next(keys), (3, 3, 16, 32)), "bias": jnp.ones(32)},
        "conv2": {"kernel": jax.random.normal(next(keys), (1, 1, 32, 64))},
        "classifier": {"kernel": jax.random.normal(next(keys), (64, 10))},
    }
