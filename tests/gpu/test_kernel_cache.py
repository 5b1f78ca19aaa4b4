"""Compiled kernels lie beside the programs that JAX keeps on disk."""

import dataclasses
import functools
import importlib.util
import types

import jax
import jax.numpy as jnp
import pytest
from requirements import needs

from experiments.bench import shapes
from experiments.bench.gpu.check_cases import BASE
from pallas_kernels.block_sparse_conv import triton
from pallas_kernels.block_sparse_conv.triton import foreign, gathering, kernel_cache, kernels

PACKAGES = [
    name
    for name in ("triton", "jax_triton", "jax_cuda13_plugin")
    if importlib.util.find_spec(name) is None
]


@pytest.fixture
def cache(tmp_path):
    """JAX's compilation cache in a folder of its own."""
    before = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", str(tmp_path / "cache"))
    yield tmp_path / "cache"
    jax.config.update("jax_compilation_cache_dir", before)


def test_what_was_made_for_a_key_is_made_once(cache):
    made = []

    def make(text):
        made.append(text)
        return text

    for _ in range(2):
        assert kernel_cache.read_or_make("a", lambda: make(b"1")) == b"1"
        assert kernel_cache.read_or_make("b", lambda: make(b"2")) == b"2"
    assert made == [b"1", b"2"]
    assert len(list(cache.glob("triton_kernels/*"))) == 2, "no file is left half written"


@pytest.mark.parametrize("folder", [None, "gs://bucket/cache"])
def test_without_a_local_folder_everything_is_made_anew(folder, cache):
    jax.config.update("jax_compilation_cache_dir", folder)
    made = iter([b"1", b"2"])
    assert [kernel_cache.read_or_make("a", lambda: next(made)) for _ in range(2)] == [b"1", b"2"]


def test_a_folder_that_cannot_be_used_costs_a_warning(cache):
    cache.write_text("a file")
    with pytest.warns(UserWarning, match="jax_compilation_cache_dir: cannot read"):
        assert kernel_cache.read_or_make("a", lambda: b"1") == b"1"
    cache.unlink()
    cache.mkdir()
    (cache / "triton_kernels").symlink_to("missing/folder")
    with pytest.warns(UserWarning, match="jax_compilation_cache_dir: cannot write"):
        assert kernel_cache.read_or_make("a", lambda: b"1") == b"1"


@needs(f"not installed: {', '.join(PACKAGES)}" if PACKAGES else None)
def test_another_process_finds_the_kernels_of_a_step(cache, monkeypatch):
    """It has none in memory, and would lower the step to the same program."""
    record = dataclasses.replace(triton.IMPLEMENTATION, supports=triton.limits)
    spec = dataclasses.replace(BASE, cin=32, height=4, width=4, batch=16, cout=32, dtype="bfloat16")
    spec = dataclasses.replace(spec, groups=2, group_size=16, kept=16, kept_taps=3)
    x, _, values, *index = map(jax.typeof, shapes.random_operands(spec))

    @functools.partial(jax.jit, static_argnums=0)
    def loss(attempt, x, values, *index):
        y = shapes.convolve(spec, record, x, values, *index)
        return y.astype(jnp.float32).sum() + 0 * attempt

    def lowered(attempt):
        monkeypatch.setattr(foreign, "_compiled_call", functools.cache(compiled_call))
        traced = loss.trace(attempt, x, values, *index)
        return traced.lower(lowering_platforms=("cuda",)).as_text()

    compiled_call = foreign._compiled_call.__wrapped__
    first = lowered(0)
    assert len(list(cache.glob("triton_kernels/*"))) == 1
    monkeypatch.delattr(foreign, "_compile")
    assert lowered(1) == first


@needs(f"not installed: {', '.join(PACKAGES)}" if PACKAGES else None)
def test_a_kernel_whose_helper_changes_is_compiled_again(cache, monkeypatch):
    """`gather` is in another module than the kernels that call it."""
    monkeypatch.setattr(foreign, "_compile", lambda *_: b"compiled")
    launch = types.SimpleNamespace(kernel="gather_product")
    compiled_call = foreign._compiled_call.__wrapped__
    for hash_of_helper in (gathering.gather.cache_key, "of another source"):
        monkeypatch.setattr(gathering.gather, "hash", hash_of_helper)
        monkeypatch.setattr(kernels.gather_product, "hash", None)  # which holds its helpers'
        compiled_call(launch, 90, ("bfloat16",))
    assert len(list(cache.glob("triton_kernels/*"))) == 2
