"""How the tests run: compiler flags, a shared compilation cache, the order of the tests, and the
fixture `params`.
"""

import gc
import os
import shutil
import tempfile
from pathlib import Path

import jax
import pytest

# A hook: what the compiler made of each GPU kernel, at the end of the log.
from described_gpu import pytest_terminal_summary  # noqa: F401
from sparse_methods import small_tree

# Most of the suite's time is XLA's, so its code generator optimizes nothing here and works in one
# piece (its graph passes run as always). CI's other Python runs it in full.
_FLAGS = ["--xla_backend_optimization_level=0", "--xla_cpu_parallel_codegen_split_count=1"]
if jax.__version_info__ < (0, 11):  # from 0.11 on there are no other emitters
    _FLAGS.append("--xla_cpu_use_fusion_emitters=false")
os.environ.setdefault("XLA_FLAGS", " ".join(_FLAGS))

# What one test or one xdist worker has compiled, the others need not compile again: reading even
# the smallest program takes a quarter of the time.
_RUN = os.environ.get("PYTEST_XDIST_TESTRUNUID", str(os.getpid()))
_CACHE = Path(tempfile.gettempdir()) / f"blocksparse_jax-tests-{_RUN}"
_MAPS = Path("/proc/self/maps")
jax.config.update("jax_compilation_cache_dir", str(_CACHE))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


def pytest_collection_modifyitems(items):
    """Starts the long tests first, so that no worker begins one when the others are done."""
    items.sort(key=lambda item: item.path.stem not in ("test_train", "test_execution"))


def pytest_collection_finish(session):
    """Spares the garbage collector what was imported: it stays anyway."""
    gc.collect()
    gc.freeze()


def pytest_runtest_teardown(item, nextitem):
    """Frees what was compiled before Linux refuses more: a process may hold 65530 memory maps, and
    every compiled program takes dozens. Beyond them XLA's compiler crashes.
    """
    ends = nextitem is None or nextitem.path != item.path  # a worker's chunk, or a module
    if ends and _MAPS.exists() and len(_MAPS.read_bytes().splitlines()) > 20_000:
        jax.clear_caches()


def pytest_unconfigure(config):
    """Removes the cache, in the process that began the run."""
    if not hasattr(config, "workerinput"):
        shutil.rmtree(_CACHE, ignore_errors=True)


params = pytest.fixture(small_tree, name="params")
