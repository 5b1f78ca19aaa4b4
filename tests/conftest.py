"""How the tests run: compiler flags, a shared compilation cache, the order of the tests, and the
fixture `params`.
"""

import gc
import os
import shutil
import signal
import tempfile
import threading
from pathlib import Path

import jax
import pytest

# A hook: what the compiler made of each GPU kernel, at the end of the log.
from described_gpu import pytest_terminal_summary  # noqa: F401
from jax._src.interpreters import mlir
from sparse_methods import KINDS, METHODS, small_tree

# Nothing of what is imported while tests are collected is garbage.
gc.disable()

# Most of the suite's time is XLA's, so its code generator optimizes nothing here and works in one
# piece (its graph passes run as always). CI's other Python runs it in full.
_FLAGS = ["--xla_backend_optimization_level=0", "--xla_cpu_parallel_codegen_split_count=1"]
if jax.__version_info__ < (0, 11):  # from 0.11 on there are no other emitters
    _FLAGS.append("--xla_cpu_use_fusion_emitters=false")
os.environ.setdefault("XLA_FLAGS", " ".join(_FLAGS))

# A process in a shell's background ignores SIGINT, under nohup SIGHUP too; tests send both.
for _number, _handler in (
    (signal.SIGINT, signal.default_int_handler),
    (signal.SIGHUP, signal.SIG_DFL),
):
    if signal.getsignal(_number) == signal.SIG_IGN:
        signal.signal(_number, _handler)

# What one test or one xdist worker has compiled, the others need not compile again: reading even
# the smallest program takes a quarter of the time.
_RUN = os.environ.get("PYTEST_XDIST_TESTRUNUID", str(os.getpid()))
_CACHE = Path(tempfile.gettempdir()) / f"blocksparse_jax-tests-{_RUN}"
_MAPS = Path("/proc/self/maps")
_count = {"tests": 0}
jax.config.update("jax_compilation_cache_dir", str(_CACHE))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
jax.config.update("jax_traceback_in_locations_limit", 0)  # which nobody reads here
# Which masks the methods draw, the battery of all methods, training on 8 devices, and the GPU
# kernels in interpreters and dry runs: `long`.
_LONG = [
    "test_budgets",
    "test_campfire",
    "test_channel_order",
    "test_channel_pruning",
    "test_channel_removal",
    "test_data_scores",
    "test_drop_and_grow",
    "test_dynamic_hrbp",
    "test_bench_gpu",
    "test_exchange_methods",
    "test_gradual",
    "test_group_lasso",
    "test_grouping",
    "test_independent_draws",
    "test_lottery",
    "test_methods",
    "test_optax_battery",
    "test_patterns",
    "test_ranks",
    "test_sharded_batch",
    "test_sharded_state",
    "test_shrinking_methods",
    "test_subp",
    "test_subp_statistics",
    "test_variational",
    "test_mosaic_gpu",
    "test_triton",
    "test_two_of_four",
]
# Compiled and interpreted GPU kernels, and commands that start processes or train for many steps:
# `ci`, for they would be a quarter of `make test`.
_ONLY_IN_CI = [
    "test_bench",
    "test_bench_gpu",
    "test_captured_steps",
    "test_channel_order",
    "test_channel_spaces",
    "test_compare",
    "test_compression_methods",
    "test_export",
    "test_first_call",
    "test_fused_networks",
    "test_history",
    "test_loop_speed",
    "test_masked_step",
    "test_mosaic_gpu",
    "test_nest_runs",
    "test_prepare_data",
    "test_report_page",
    "test_sharded_batch",
    "test_sharded_norms",
    "test_sharded_state",
    "test_smaller_networks",
    "test_stop_and_extend",
    "test_sweep",
    "test_triton",
    "test_triton_code",
    "test_two_of_four",
]
# Some of their tests take 10 seconds and more.
_FIRST = [
    "test_bench",
    "test_captured_steps",
    "test_compare",
    "test_compression_methods",
    "test_execution",
    "test_first_call",
    "test_fused_networks",
    "test_nest_runs",
    "test_sharded_batch",
    "test_sharded_norms",
    "test_sharded_state",
    "test_sweep",
    "test_train",
]


def _used_ten_times(make_ir_context):
    """One MLIR context for ten programs of a thread, as in jax 0.12: to make one takes longer than
    to lower most of the tests' programs.
    """
    local = threading.local()

    def context():
        uses = getattr(local, "uses", 0)
        if uses % 10 == 0:
            local.context = make_ir_context()
        local.uses = uses + 1
        return local.context

    return context


if jax.__version_info__ < (0, 11):
    mlir.make_ir_context = _used_ten_times(mlir.make_ir_context)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Starts the tests that take longest first, so that no worker begins one when the others are
    done, and marks what only CI runs, and what CI's other Python leaves out: of the tests of all
    methods that runs those of one method of each kind.
    """
    for item in items:
        of_methods = getattr(item.module, "METHODS", None) is METHODS and hasattr(item, "callspec")
        name = item.callspec.params.get("name") if of_methods else None
        if item.path.stem in _LONG or (name in METHODS and name not in KINDS):
            item.add_marker("long")
        if item.path.stem in _ONLY_IN_CI:
            item.add_marker("ci")
    items.sort(key=lambda item: item.path.stem not in _FIRST)


def pytest_collection_finish(session):
    """Spares the garbage collector what was imported, which stays anyway, and most of its passes
    over the objects that tracing makes: they took a twentieth of the time.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(10_000, 10, 10)
    gc.enable()


def pytest_runtest_teardown(item, nextitem):
    """Frees what was compiled before Linux refuses more: a process may hold 65530 memory maps, and
    every compiled program takes some. Beyond them XLA's compiler crashes.
    """
    _count["tests"] += 1
    ends = nextitem is None or nextitem.path != item.path  # a worker's chunk, or a module
    if (ends or _count["tests"] % 16 == 0) and _memory_maps() > 20_000:
        jax.clear_caches()
        gc.collect()  # programs in reference cycles too


def _memory_maps():
    return _MAPS.read_bytes().count(b"\n") if _MAPS.exists() else 0


def pytest_unconfigure(config):
    """Removes the cache, in the process that began the run."""
    if not hasattr(config, "workerinput"):
        shutil.rmtree(_CACHE, ignore_errors=True)


params = pytest.fixture(small_tree, name="params")
