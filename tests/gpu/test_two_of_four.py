"""2:4 products: values, gradients, bounds, and what of cuSPARSELt's handler needs no GPU."""

import ctypes
import functools
import json
import os
import subprocess
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from described_gpu import compile_for_h200
from described_gpu import missing as no_compiler
from jax.sharding import PartitionSpec

import blocksparse_jax as bsj
from experiments.bench.gpu import shapes as gpu_shapes
from experiments.bench.gpu import two_of_four as bench
from experiments.bench.gpu import two_of_four_bound as bound
from pallas_kernels.two_of_four import (
    choose,
    cusparselt,
    handler,
    is_two_of_four,
    two_of_four_matmul,
    unavailable,
)

K, M, N = 32, 48, 24
INCLUDE = [
    Path(folder) for folder in os.environ.get("CUSPARSELT_INCLUDE", "").split(os.pathsep) if folder
]
WITHOUT = handler.missing(INCLUDE)


@functools.cache
def masked(dtype="float32"):
    """Weights as the straight-through methods mask them."""
    weights = jax.random.normal(jax.random.key(0), (1, 1, K, M))
    mask = bsj.get_masks(bsj.sr_ste(2, 4).init({"conv": weights}))["conv"]
    return (weights * mask).reshape(K, M).astype(dtype)


def activations(channel_major, dtype, n=N):
    return jax.random.normal(jax.random.key(1), (K, n) if channel_major else (n, K)).astype(dtype)


@pytest.mark.parametrize("channel_major", [True, False])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_values_and_gradients_are_those_of_the_masked_dense_product(channel_major, dtype):
    weights, x = masked(), activations(channel_major, dtype)
    assert is_two_of_four(weights)
    y, pull = jax.vjp(
        lambda w, x: two_of_four_matmul(w, x, channel_major=channel_major), weights, x
    )
    dy = jax.random.normal(jax.random.key(2), y.shape).astype(dtype)
    w64, x64, dy64 = (
        np.asarray(a.astype(jnp.float32), np.float64) for a in (weights.astype(dtype), x, dy)
    )
    columns = x64.T if channel_major else x64
    slopes = dy64.T if channel_major else dy64
    expected = [columns @ w64, columns.T @ slopes, slopes @ w64.T]
    if channel_major:
        expected[0], expected[2] = expected[0].T, expected[2].T
    low = {"float32": 1e-6, "bfloat16": 4e-3, "float16": 5e-4}[dtype]
    for result, reference, limit, kind in zip(
        (y, *pull(dy)), expected, (low, 1e-6, low), (dtype, "float32", dtype), strict=True
    ):
        assert result.shape == reference.shape
        assert result.dtype == kind
        error = np.linalg.norm(np.asarray(result.astype(jnp.float32)) - reference)
        assert error <= limit * np.linalg.norm(reference)
    assert jnp.all(pull(dy)[0] != 0)  # straight through: the pruned weights have gradients too


def test_a_1x1_convolution_and_a_batched_dense_layer():
    weights, x = masked(), jax.random.normal(jax.random.key(3), (K, 3, 2, 4))
    y = two_of_four_matmul(weights, x, channel_major=True)
    numbers = ("CHWN", "HWIO", "CHWN")
    expected = jax.lax.conv_general_dilated(
        x, weights[None, None], (1, 1), "VALID", dimension_numbers=numbers
    )
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(
        two_of_four_matmul(weights, x.transpose(1, 2, 3, 0)),
        y.transpose(1, 2, 3, 0),
        rtol=1e-5,
        atol=1e-5,
    )
    assert two_of_four_matmul(weights, jnp.zeros((0, 5, K))).shape == (0, 5, M)


def test_gradients_are_summed_over_the_devices_of_a_mesh():
    weights, x = masked(), activations(False, "float32")
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]), ("data",))

    def total(weights, x):
        return jax.lax.psum(two_of_four_matmul(weights, x).sum(), "data")

    mapped = jax.shard_map(
        total,
        mesh=mesh,
        in_specs=(PartitionSpec(), PartitionSpec("data")),
        out_specs=PartitionSpec(),
    )
    np.testing.assert_allclose(
        jax.grad(mapped)(weights, x), jnp.broadcast_to(x.sum(0)[:, None], weights.shape), rtol=1e-5
    )


def test_what_is_not_two_of_four():
    assert not is_two_of_four(jnp.ones((8, 3)))
    assert not is_two_of_four(
        masked().T[:, ::-1].reshape(M, K)
    )  # the pattern runs along the inputs
    assert not is_two_of_four(jnp.zeros((6, 3)))


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="a GPU is here")
def test_it_says_why_it_is_dense_here():
    assert "NVIDIA" in unavailable()
    assert choose(K, M, N, "bfloat16") == (
        "dense",
        f"XLA's dense product; 'cusparselt': {unavailable()}",
    )
    with pytest.raises(NotImplementedError, match="'cusparselt': runs on NVIDIA GPUs"):
        two_of_four_matmul(
            masked("bfloat16"), activations(False, "bfloat16"), implementation="cusparselt"
        )


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((30, 32, 8, "bfloat16"), "multiples of 16"),
        ((32, 32, 9, "bfloat16"), "multiple of 8"),
        ((32, 32, 8, "float32"), "not in float32"),
    ],
)
def test_sizes_that_cusparselt_refuses(sizes, message):
    assert message in cusparselt.limits(*sizes)
    assert cusparselt.limits(32, 32, 8, "float16") is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weights": jnp.ones(3)}, "weights: expected"),
        ({"x": jnp.ones((3, 5))}, "x: expected"),
        ({"implementation": "best"}, "'best'"),
    ],
)
def test_arguments_that_do_not_fit_are_named(change, message):
    arguments = {
        "weights": masked(),
        "x": activations(False, "float32"),
        "implementation": None,
    } | change
    with pytest.raises(ValueError, match=message):
        two_of_four_matmul(**arguments)


def test_it_lowers_for_a_gpu_to_one_call_of_the_handler():
    def f(weights, x):
        return cusparselt.product(weights, x, channel_major=True)

    text = (
        jax.jit(f)
        .trace(masked("bfloat16"), activations(True, "bfloat16"))
        .lower(lowering_platforms=("cuda",))
        .as_text()
    )
    assert text.count(f"@{cusparselt.TARGET}(") == 1
    assert "channel_major = true" in text
    assert f"tensor<{M}x{N}xbf16>" in text
    checks = [jax.export.DisabledSafetyCheck.custom_call(cusparselt.TARGET)]
    exported = jax.export.export(jax.jit(f), platforms=["cuda"], disabled_checks=checks)(
        masked("bfloat16"), activations(True, "bfloat16")
    )
    assert cusparselt.TARGET in exported.mlir_module()


def test_the_bounds_cover_the_pointwise_layers_of_resnet50():
    layers = {
        (a.cin, a.cout, (a.size // a.stride) ** 2 * 256)
        for a in gpu_shapes.RESNET50
        if a.kernel == 1
    }
    *convs, dense = bound.products()
    assert {(p.k, p.m, p.n) for p in convs} == layers
    assert (dense.k, dense.m, dense.n) == (2048, 1000, 256)


def test_the_bounds_are_those_of_memory_and_tensor_cores():
    small, large = (
        bound.floors(bound.Product("a", 64, 64, 1 << 20)),
        bound.floors(bound.Product("b", 8192, 8192, 8192)),
    )
    assert small["2:4"] == pytest.approx(
        small["memory"], rel=1e-3
    )  # the weights are a small part of the traffic
    assert (
        small["dense"]
        == small["memory"]
        == pytest.approx(1e6 * 2 * (128 << 20) / bound.BANDWIDTH, rel=1e-3)
    )
    assert large["dense"] / large["2:4"] == pytest.approx(2)
    assert large["2:4"] < large["2:4 + compress"] < large["dense"]
    assert "| all, with both gradients |" in bound.report()


def test_the_benchmark_runs_dry_and_goes_on(tmp_path):
    config = bench.Config(
        quick=True,
        layers="wide",
        journal=tmp_path / "journal.jsonl",
        out=tmp_path / "two_of_four.json",
    )
    assert bench.run(config) == 0
    report = json.loads(config.out.read_text())
    assert report["complete"]
    assert [(row["name"], row["layout"]) for row in report["rows"]] == [
        ("small wide", f"channels {place}") for place in ("first", "last")
    ]
    lines = len(config.journal.read_text().splitlines())
    assert bench.run(config) == 0
    assert len(config.journal.read_text().splitlines()) == lines
    if jax.default_backend() == "cpu":
        assert bench.run(bench.Config(journal=config.journal)) == 2  # no GPU


def test_the_benchmark_compares_with_float64():
    product = bound.Product("a", K, M, N)
    weights, x = bench.operands(product, True, "bfloat16")
    assert is_two_of_four(weights)
    y = two_of_four_matmul(weights, x, channel_major=True)
    assert bench.difference(y, weights, x, True, "bfloat16") < 4e-3
    with pytest.raises(AssertionError, match="differs from float64"):
        bench.difference(y * 1.01, weights, x, True, "bfloat16")


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The handler, and stand-ins for cuSPARSELt: one of its version, one of another."""
    if WITHOUT:
        pytest.skip(f"the handler cannot be built: {WITHOUT}")
    folder = tmp_path_factory.mktemp("two_of_four")
    source = Path(__file__).parents[1] / "support" / "stand_in_cusparselt.cc"
    for name, shift in (("right", 0), ("newer", 1)):
        command = handler.command(source, folder / f"{name}.so", INCLUDE)
        subprocess.run([*command[:1], f"-DSHIFT={shift}", *command[1:]], check=True)
    return cusparselt.load(handler.build(folder / "handler.so", INCLUDE)), folder


def run(loaded, weights, x, channel_major, search=False):
    """The handler's work on this machine's memory; `y` or the error."""
    weights, x = (np.ascontiguousarray(a) for a in (weights, x))
    n = x.shape[1 if channel_major else 0]
    y = np.full((M, n) if channel_major else (n, M), np.nan, x.dtype)
    pointers = [ctypes.c_void_p(a.ctypes.data) for a in (weights, x, y)]
    error = loaded.TwoOfFourRun(
        K, M, n, x.dtype.name == "bfloat16", channel_major, search, *pointers
    ).decode()
    return error or y


def test_the_handler_says_what_it_lacks(built):
    loaded, folder = built
    bfloat16 = masked("bfloat16"), activations(True, "bfloat16")
    if (
        not loaded.TwoOfFourOpen(b"libno_such_library.so")
        .decode()
        .startswith("libno_such_library.so: cannot open")
    ):
        pytest.fail("an absent library was opened")
    assert (
        "and this handler was built with the header of"
        in loaded.TwoOfFourOpen(str(folder / "newer.so").encode()).decode()
    )
    assert (
        "has no function cusparseLtInit"
        in loaded.TwoOfFourOpen(str(folder / "handler.so").encode()).decode()
    )
    assert run(loaded, *bfloat16, True) == "cuSPARSELt is not open"


@pytest.mark.parametrize("search", [False, True])
@pytest.mark.parametrize("channel_major", [True, False])
def test_the_handler_describes_the_product_in_both_layouts(built, channel_major, search):
    loaded, folder = built
    assert loaded.TwoOfFourOpen(str(folder / "right.so").encode()) == b""
    assert loaded.TwoOfFourVersion().count(b".") == 2
    weights, x = masked("bfloat16"), activations(channel_major, "bfloat16")
    expected = two_of_four_matmul(weights, x, channel_major=channel_major)
    stand_in = ctypes.CDLL(str(folder / "right.so"))
    plans, searches = stand_in.StandInPlans(), stand_in.StandInSearches()
    for _ in range(2):
        y = run(loaded, weights, x, channel_major, search)
        np.testing.assert_allclose(
            y.astype(np.float32), np.asarray(expected, np.float32), rtol=1e-2, atol=1e-2
        )
    assert stand_in.StandInPlans() == plans + 1  # made once for each shape
    assert stand_in.StandInSearches() == searches + search


def test_the_handler_passes_errors_on(built):
    loaded, folder = built
    assert loaded.TwoOfFourOpen(str(folder / "right.so").encode()) == b""
    error = run(loaded, masked("float16"), activations(True, "float16"), True)
    assert error == "cusparseLtStructuredDescriptorInit: NOT_SUPPORTED (by the stand-in)"
    error = run(loaded, jnp.ones((K, M), "bfloat16"), activations(True, "bfloat16"), True)
    assert error.startswith("cusparseLtSpMMACompress: OTHER")


def test_the_handler_registers_and_a_program_compiles_for_an_h200(built):
    shapes = jax.ShapeDtypeStruct((K, M), jnp.bfloat16), jax.ShapeDtypeStruct((K, N), jnp.bfloat16)

    def program(weights, x):
        return cusparselt.product(weights, x, channel_major=True)

    if not (reason := no_compiler()):
        with pytest.raises(
            jax.errors.JaxRuntimeError, match=f"No FFI handler registered for {cusparselt.TARGET}"
        ):
            compile_for_h200(program, *shapes)
    cusparselt.register(built[0])
    if reason:
        pytest.skip(f"registered; the compiler: {reason}")
    compile_for_h200(program, *shapes)
