"""The native CPU kernels, beyond the suite of all implementations: variants, threads, malformed
buffers, sanitizers.
"""

import dataclasses
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import fuzz_native
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from native_digest import SPEC, digest
from new_process import run_python
from requirements import needs

from experiments.bench import shapes
from pallas_kernels.block_sparse_conv import choose_implementation, cpu
from pallas_kernels.block_sparse_conv.cpu import kernels as native

ROOT = Path(__file__).parents[2]
pytestmark = needs(cpu.unavailable())
NUMBERS = {"kernel": (3, 3), "strides": (1, 1), "padding": (1, 1, 1, 1), "dilation": (1, 1)}
GEOMETRY = {name: np.array(value, np.int64) for name, value in NUMBERS.items()}


def test_random_convolutions_agree_with_numpy_in_every_variant():
    fuzz_native.main(40, seed=1)


@pytest.mark.slow
def test_many_random_convolutions_agree_with_numpy():
    fuzz_native.main(10_000)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("variant", native.variants())
@pytest.mark.parametrize("group_size", [1, 7, 64])
@pytest.mark.parametrize(("kept", "cin"), [(1, 1), (1, 9), (100, 120)])
def test_odd_groups_in_every_variant(variant, dtype, group_size, kept, cin):
    spec = dataclasses.replace(
        SPEC,
        cin=cin,
        kept=kept,
        cout=2 * group_size,
        groups=2,
        group_size=group_size,
        batch=3,
        dtype=dtype,
    )
    error, where = fuzz_native.disagreement(spec, np.random.default_rng(0), 0, variant)
    os.environ.pop(native.VARIABLE)
    assert error <= fuzz_native.TOLERANCE[dtype], where


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("variant", native.variants())
@pytest.mark.parametrize(
    ("batch", "kernel", "strides", "padding"),
    [
        (1, (1, 1), (2, 2), 0),
        (3, (3, 3), (2, 2), 1),
        (1, (3, 2), (3, 1), 2),
        (8, (4, 4), (2, 3), 0),
        (16, (3, 3), (2, 2), 1),
    ],
)
def test_strided_sources_that_many_groups_share(variant, dtype, batch, kernel, strides, padding):
    sizes = {
        "cin": 9,
        "kept": 5,
        "groups": 12,
        "group_size": 4,
        "cout": 48,
        "kept_taps": kernel[0] * kernel[1],
        "height": 9,
        "width": 8,
    }
    around = ((padding, padding), (padding, padding))
    spec = dataclasses.replace(
        SPEC, batch=batch, kernel=kernel, strides=strides, padding=around, dtype=dtype, **sizes
    )
    error, where = fuzz_native.disagreement(spec, np.random.default_rng(0), 0, variant)
    os.environ.pop(native.VARIABLE)
    assert error <= fuzz_native.TOLERANCE[dtype], where


def test_an_unknown_variant_is_refused(monkeypatch):
    monkeypatch.setenv(native.VARIABLE, "avx1024")
    x, _, values, *index = shapes.random_operands(SPEC)
    with pytest.raises(
        ValueError, match=r"BLOCKSPARSE_JAX_CPU_VARIANT: expected one of .*portable.*'avx1024'"
    ):
        shapes.convolve(SPEC, "cpu", x, values, *index)


def test_half_precision_of_the_other_kind_is_refused():
    x, _, values, *index = shapes.random_operands(dataclasses.replace(SPEC, dtype="float16"))
    with pytest.raises(
        NotImplementedError, match=r"'cpu': computes in float32 and bfloat16, not in float16"
    ):
        shapes.convolve(SPEC, "cpu", x, values, *index)


def test_the_choice_names_the_variant():
    spec = shapes.layer_spec(shapes.VGG19[4], sparsity=0.9, batch=128)
    for dtype, variant in (
        ("float32", native.variants()[0].removesuffix("_bf16")),
        ("bfloat16", native.variants()[0]),
    ):
        choice = choose_implementation(dataclasses.replace(spec, dtype=dtype))
        assert choice.implementation == "cpu"
        assert set(choice.details.values()) == {variant}


def call(
    x, values, filters, channels, taps, *, out=None, name="BlockSparseConvForward", **geometry
):
    shape = jax.ShapeDtypeStruct(out or (48, *x.shape[1:]), x.dtype)
    none = {
        "scale": jnp.zeros(0, jnp.float32),
        "bias": jnp.zeros(0, jnp.float32),
        "residual": jnp.zeros((0, 0, 0, 0), x.dtype),
    }
    epilogue = [geometry.pop(part, absent) for part, absent in none.items()]
    attributes = {"variant": "", "relu": False} | GEOMETRY | geometry
    return jax.ffi.ffi_call(name, shape)(
        x, values, filters, channels, taps, *epilogue, **attributes
    )


BAD = {
    "a filter out of range": (
        lambda x, v, f, c, t: call(x, v, f.at[1, 2].set(48), c, t),
        r"filters: 48 is outside of \[0, 48\)",
    ),
    "a filter twice": (
        lambda x, v, f, c, t: call(x, v, f.at[0, 0].set(f[0, 1]), c, t),
        "filters: .* stands in two places",
    ),
    "a negative channel": (
        lambda x, v, f, c, t: call(x, v, f, c.at[0, 0].set(-1), t),
        "channels: -1 is outside of",
    ),
    "a channel out of range": (
        lambda x, v, f, c, t: call(x, v, f, c.at[2, 12].set(40), t),
        r"channels: 40 is outside of \[0, 40\)",
    ),
    "a tap out of range": (
        lambda x, v, f, c, t: call(x, v, f, c, t.at[2, 3].set(9)),
        r"taps: 9 is outside of \[0, 9\)",
    ),
    "a channel twice": (
        lambda x, v, f, c, t: call(x, v, f, c.at[1, 2].set(c[1, 0]), t),
        "channels: .* stands in two places",
    ),
    "a tap twice": (
        lambda x, v, f, c, t: call(x, v, f, c, t.at[2, 1].set(t[2, 0])),
        "taps: .* stands in two places",
    ),
    "too many rows": (
        lambda x, v, f, c, t: call(x, v, f, c, t, out=(48, 20, 7, 5)),
        r"y \[48, 20, 7, 5\] is not what kernel, strides",
    ),
    "too few columns": (
        lambda x, v, f, c, t: call(x, v, f, c, t, out=(48, 9, 6, 5)),
        r"y \[48, 9, 6, 5\] is not what kernel, strides",
    ),
    "padding that makes more": (
        lambda x, v, f, c, t: call(x, v, f, c, t, padding=np.array([1, 1, 2, 1])),
        "is not what kernel, strides",
    ),
    "a kernel larger than x": (
        lambda x, v, f, c, t: call(x, v, f, c, t, kernel=np.array([12, 3])),
        "is not what kernel, strides",
    ),
    "half the padding": (
        lambda x, v, f, c, t: call(x, v, f, c, t, padding=np.array([1, 1])),
        "padding four",
    ),
    "nothing kept": (
        lambda x, v, f, c, t: call(x, v[:, :0], f, c[:, :0], t),
        r"an axis is empty: .3, 0, 4, 16.",
    ),
    "a huge stride": (
        lambda x, v, f, c, t: call(x, v, f, c, t, strides=np.array([1, 2**40])),
        "none above",
    ),
    "a rank": (lambda x, v, f, c, t: call(x[0], v, f, c, t), "expected x .cin, h, w, n."),
    "too few channels": (
        lambda x, v, f, c, t: call(x, v, f, c[:, 1:], t),
        r"channels \[3, 12\] do not fit",
    ),
    "other images": (
        lambda x, v, f, c, t: call(x, v, f, c, t, out=(48, 9, 7, 4)),
        "different numbers of images",
    ),
    "filters that do not make cout": (
        lambda x, v, f, c, t: call(x, v, f, c, t, out=(47, 9, 7, 5)),
        "groups . group_size is not cout",
    ),
    "two dtypes": (
        lambda x, v, f, c, t: call(x, v.astype(jnp.bfloat16), f, c, t),
        "all float32 or all bfloat16",
    ),
    "a stride of 0": (
        lambda x, v, f, c, t: call(x, v, f, c, t, strides=np.array([0, 1])),
        "strides and dilation must be at least 1",
    ),
    "one stride": (
        lambda x, v, f, c, t: call(x, v, f, c, t, strides=np.array([1])),
        "two numbers each",
    ),
    "a short scale": (
        lambda x, v, f, c, t: call(x, v, f, c, t, scale=jnp.ones(47, jnp.float32)),
        "one number for each channel of y",
    ),
    "a square bias": (
        lambda x, v, f, c, t: call(x, v, f, c, t, bias=jnp.ones((48, 1), jnp.float32)),
        "one number for each channel of y",
    ),
    "a small residual": (
        lambda x, v, f, c, t: call(x, v, f, c, t, residual=x[:3]),
        r"residual \[3, 9, 7, 5\] must be as y",
    ),
    "a variant": (lambda x, v, f, c, t: call(x, v, f, c, t, variant="vax"), "no variant 'vax'"),
}


@pytest.mark.parametrize("what", BAD)
def test_malformed_buffers_are_refused_by_the_handlers(what):
    bad, message = BAD[what]
    x, _, values, *index = shapes.random_operands(SPEC)
    with pytest.raises(jax.errors.JaxRuntimeError, match=message):
        jax.block_until_ready(bad(x, values, *index))


@pytest.mark.parametrize("variant", native.variants())
@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize(
    ("strides", "groups", "group_size"),
    [((1, 1), 2, 16), ((1, 1), 2, 36), ((2, 2), 2, 36), ((2, 2), 12, 4), ((2, 2), 12, 36)],
)
@jax.debug_nans(False)
def test_a_weight_that_is_not_finite_meets_the_zeros_around_the_image_as_in_dense(
    monkeypatch, variant, bad, strides, groups, group_size
):
    monkeypatch.setenv(native.VARIABLE, variant)
    sizes = {"groups": groups, "group_size": group_size, "cout": groups * group_size}
    spec = dataclasses.replace(SPEC, **sizes, kernel=(3, 3), strides=strides)
    x, dy, values, *index = shapes.random_operands(spec)
    values = values.at[1, 4, 2, 3].set(bad)
    expected, dense_pullback = jax.vjp(
        lambda x: shapes.convolve(spec, "dense", x, values, *index), x
    )
    result, pullback = jax.vjp(lambda x: shapes.convolve(spec, "cpu", x, values, *index), x)
    hit = ~np.isfinite(np.asarray(expected))
    assert np.array_equal(~np.isfinite(np.asarray(result)), hit)
    assert hit.any(axis=(1, 2, 3)).sum() == 1, "one filter"
    np.testing.assert_allclose(np.where(hit, 0, result), np.where(hit, 0, expected), atol=1e-4)
    hit = ~np.isfinite(np.asarray(dense_pullback(dy)[0]))
    assert np.array_equal(~np.isfinite(np.asarray(pullback(dy)[0])), hit)
    assert hit.any(axis=(1, 2, 3)).sum() == 1, "one channel"


def test_a_library_of_a_newer_interface_is_a_reason_and_not_a_crash(monkeypatch):
    monkeypatch.setattr(native, "ffi_minor_version", lambda: 1)
    reason = native.library.__wrapped__()
    assert "built for a newer jaxlib (interface 0." in reason


def test_two_threads_at_once():
    x, dy, values, *index = shapes.random_operands(dataclasses.replace(SPEC, batch=32))
    spec = dataclasses.replace(SPEC, batch=32)

    @jax.jit
    def run(x, values, dy):
        y, pullback = jax.vjp(lambda x, v: shapes.convolve(spec, "cpu", x, v, *index), x, values)
        return y, *pullback(dy)

    expected, agreed = [np.asarray(a) for a in run(x, values, dy)], []

    def work():
        for _ in range(20):
            agreed.append(all(np.array_equal(a, b) for a, b in zip(run(x, values, dy), expected)))

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert agreed == [True] * 40


@pytest.mark.skipif(
    len(getattr(os, "sched_getaffinity", lambda _: ())(0)) < 2, reason="needs two cores"
)
def test_bits_do_not_depend_on_the_number_of_threads():
    script = (
        "import os; os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:1]); "
        "import native_digest; print(native_digest.digest())"
    )
    done = run_python("-c", script)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split()[-1] == digest()


@pytest.mark.slow
@pytest.mark.skipif(
    not shutil.which("cmake") or not shutil.which("g++"),
    reason="builds the library: needs cmake and g++",
)
def test_the_sanitizers_find_nothing(tmp_path):
    configure = [
        "cmake",
        "-S",
        str(ROOT / "cpu_kernels"),
        "-B",
        str(tmp_path),
        "-DSANITIZE=ON",
        f"-DPython_EXECUTABLE={sys.executable}",
    ]
    subprocess.run(configure, check=True, capture_output=True)
    subprocess.run(["cmake", "--build", str(tmp_path), "-j2"], check=True, capture_output=True)
    libraries = [
        subprocess.run(
            ["g++", f"-print-file-name={name}.so"], capture_output=True, text=True, check=True
        ).stdout.strip()
        for name in ("libasan", "libubsan")
    ]
    done = run_python(
        fuzz_native.__file__,
        "400",
        "--library",
        str(tmp_path),
        LD_PRELOAD=" ".join(libraries),
        ASAN_OPTIONS="detect_leaks=0",
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert "400 cases agree" in done.stdout


def test_without_the_library_errors_say_why():
    script = (
        "from pallas_kernels.block_sparse_conv.cpu import kernels\n"
        "kernels.LIBRARY = 'absent.so'; kernels.library.cache_clear()\n"
        "import blocksparse_jax as bsj, jax.numpy as jnp\n"
        "print(bsj.available_implementations()['cpu'])\n"
        "from experiments.bench import shapes; from pallas_kernels.block_sparse_conv import "
        "choose_implementation\n"
        "spec = shapes.layer_spec(shapes.OTHERS[0], sparsity=0.9, batch=2)\n"
        "print(choose_implementation(spec).implementation)\n"
        "x, _, v, *i = shapes.random_operands(spec)\n"
        "try: shapes.convolve(spec, 'cpu', x, v, *i)\n"
        "except NotImplementedError as error: print(error)\n"
    )
    done = run_python("-c", script)
    assert done.returncode == 0, done.stderr[-2000:]
    reason, chosen, error = done.stdout.splitlines()
    assert "C++17 compiler" in reason
    assert chosen == "xla"
    assert error.startswith("implementation='cpu': the native library is not built")
