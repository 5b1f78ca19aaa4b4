"""Shared fixtures: a small network's parameters, and warnings of third parties that are not ours to
mend.
"""

import gc
import os
import shutil
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from described_gpu import pytest_terminal_summary  # noqa: F401  what the compiler made of each GPU kernel, at the end of the log

# Most of the suite's time is XLA's: its code generator does less here (its graph passes as always).
# CI's other Python runs it in full.
_FLAGS = ["--xla_backend_optimization_level=1"]
if jax.__version_info__ < (0, 11):  # which has no other emitters
    _FLAGS.append("--xla_cpu_use_fusion_emitters=false")
os.environ.setdefault("XLA_FLAGS", " ".join(_FLAGS))

# What one test (or one xdist worker) has compiled, the others need not compile again.
_RUN = os.environ.get("PYTEST_XDIST_TESTRUNUID", str(os.getpid()))
_CACHE = Path(tempfile.gettempdir()) / f"blocksparse_jax-tests-{_RUN}"
jax.config.update("jax_compilation_cache_dir", str(_CACHE))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.03)


def pytest_collection_modifyitems(items):
    """The long tests first, so that no worker begins one when the others are done."""
    items.sort(key=lambda item: item.path.stem not in ("test_train", "test_execution"))


def pytest_collection_finish(session):
    """What was imported stays: the garbage collector need not walk through it over and over."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure(config):
    """The process that began the run removes the cache."""
    if not hasattr(config, "workerinput"):
        shutil.rmtree(_CACHE, ignore_errors=True)


def small_tree():
    """A stem, two conv layers and a classifier, as a linen-like dict."""
    keys = iter(jax.random.split(jax.random.key(7), 8))
    return {
        "stem": {"kernel": jax.random.normal(next(keys), (3, 3, 3, 16))},
        "conv1": {"kernel": jax.random.normal(next(keys), (3, 3, 16, 32)), "bias": jnp.ones(32)},
        "conv2": {"kernel": jax.random.normal(next(keys), (1, 1, 32, 32))},
        "classifier": {"kernel": jax.random.normal(next(keys), (32, 10))},
    }


params = pytest.fixture(small_tree, name="params")
