"""The Triton kernels' numbers, in Triton's interpreter: no GPU needed."""

import dataclasses
import functools
import importlib.util
import math
import os
import pickle
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from requirements import needs

import blocksparse_jax as bsj
from experiments.bench import shapes
from experiments.bench.gpu import float64
from pallas_kernels import batch_norm
from pallas_kernels.block_sparse_conv import ConvSpec, Index, choice, make_plan, triton
from pallas_kernels.block_sparse_conv import reference as dense
from pallas_kernels.block_sparse_conv.triton import calls, products, tiles
from pallas_kernels.block_sparse_conv.triton.fitting import Tile
from pallas_kernels.padding import round_up

ROOT = Path(__file__).resolve().parents[2]
needs_triton = needs(
    "the package triton is not installed" if importlib.util.find_spec("triton") is None else None
)

_WORKER: list[subprocess.Popen] = []


def start_interpreter() -> subprocess.Popen:
    """Triton decides at import whether it interprets: kernels run in a process of their own."""
    script = ROOT / "tests" / "support" / "triton_interpreter.py"
    env = {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "TRITON_INTERPRET": "1"}
    return subprocess.Popen(
        [sys.executable, script],
        env=os.environ | env,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )


def interpret(launch: calls.Launch, *operands):
    """Stands in for `calls.run`: the kernel in Triton's interpreter."""

    def call(*arrays):
        if not _WORKER:
            _WORKER.append(start_interpreter())
        arrays = [np.array(a) for a in arrays]
        message = (
            launch.kernel,
            launch.programs,
            dict(launch.constants),
            [(out.shape, out.dtype) for out in launch.outs],
            launch.zeroed,
            arrays,
        )
        pickle.dump(message, _WORKER[0].stdin)
        _WORKER[0].stdin.flush()
        outs = pickle.load(_WORKER[0].stdout)
        if isinstance(outs, str):
            raise AssertionError(outs)
        return tuple(outs) if isinstance(launch.out, tuple) else outs[0]

    return jax.pure_callback(call, launch.out, *operands, vmap_method="sequential")


@pytest.fixture(autouse=True, scope="module")
def _interpreter():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(calls, "run", interpret)
        yield
    while _WORKER:
        worker = _WORKER.pop()
        worker.kill()
        worker.communicate()


TRITON = dataclasses.replace(triton.IMPLEMENTATION, supports=triton.limits)  # any machine will do
BASE = ConvSpec(
    cin=24,
    height=4,
    width=5,
    batch=3,
    kernel=(3, 3),
    cout=32,
    groups=2,
    kept=13,
    kept_taps=3,
    group_size=16,
)
SAME = dataclasses.replace(BASE, padding=((1, 1), (1, 1)))
BLOCKS = dataclasses.replace(SAME, cin=64, kept=32, channel_block=16)
POINT = dataclasses.replace(BASE, kernel=(1, 1), kept_taps=1)


STEMS = [  # (image, batch, filters, kernel, strides, padding)
    pytest.param((6, 5), 4, 16, 3, 1, 1, id="3x3"),
    pytest.param((9, 9), 2, 80, 7, 2, 3, id="7x7, stride 2, two groups"),
]


@needs_triton
@pytest.mark.parametrize(("image", "batch", "filters", "side", "stride", "pad"), STEMS)
def test_a_stem_runs_in_the_kernels(image, batch, filters, side, stride, pad, monkeypatch):
    """Its forward pass and its weight gradient, and no input gradient."""
    launched = []

    def record(launch, *arrays):
        launched.append(launch.kernel)
        return interpret(launch, *arrays)

    monkeypatch.setattr(calls, "run", record)
    monkeypatch.setitem(choice.IMPLEMENTATIONS, "triton", TRITON)
    keys = jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(keys[0], (3, *image, batch), jnp.bfloat16)
    kernel = jax.random.normal(keys[1], (side, side, 3, filters), jnp.bfloat16)

    def run(kernel, x, implementation):
        return bsj.conv(
            x,
            kernel,
            bsj.Dense(),
            strides=stride,
            padding=pad,
            data_format="CHWN",
            implementation=implementation,
        )

    def both(implementation):
        y, vjp = jax.vjp(lambda kernel: run(kernel, x, implementation), kernel)
        dy = jax.random.normal(keys[2], y.shape, y.dtype)
        return y, vjp(dy)[0]

    results = jax.jit(both, static_argnums=0)("triton")
    assert set(launched) == {"gather_product", "weight_gradient"}
    launched.clear()
    for actual, expected in zip(results, both("dense"), strict=True):
        scale = float(jnp.abs(expected.astype(jnp.float32)).max())
        np.testing.assert_allclose(
            np.float32(actual), np.float32(expected), rtol=2e-2, atol=1e-2 * scale
        )
    assert launched == [], "named otherwise, it is XLA's"


def operands(spec, seed=0):
    """Random ones; with runs of channels where the spec has them, the last run kept by nobody."""
    x, dy, values, *index = shapes.random_operands(spec, seed)
    if (run := spec.channel_block) > 1:
        rng = np.random.default_rng(seed)
        blocks = [
            np.sort(rng.permutation(spec.cin // run - 1)[: spec.kept // run])
            for _ in range(spec.groups)
        ]
        index[1] = jnp.asarray(
            (np.stack(blocks)[:, :, None] * run + np.arange(run)).reshape(spec.groups, -1),
            jnp.int32,
        )
    return x, dy, values, *index


def assert_close(result, reference, tolerance):
    assert (result.shape, result.dtype) == (reference.shape, reference.dtype)
    result, reference = (np.asarray(a, np.float32) for a in (result, reference))
    np.testing.assert_allclose(result, reference, rtol=0, atol=tolerance * np.abs(reference).max())


def plan_of(spec, index):
    return make_plan(
        Index(*index), kernel_shape=spec.kernel_shape, channel_block=spec.channel_block
    )


def check(spec, seed=0, tolerance=1e-5, **tile):
    """All three passes, and the input gradient by every method, against XLA's dense convolution of
    the masked kernel.
    """
    x, dy, values, *index = operands(spec, seed)
    exact = dataclasses.replace(spec, precision="highest", dtype="float32")
    single = [a.astype(jnp.float32) for a in (x, dy, values)]
    forward, backward, weights = (
        dense.IMPLEMENTATION.forward,
        dense.IMPLEMENTATION.input_gradient,
        dense.IMPLEMENTATION.weight_gradient,
    )
    y = jax.jit(lambda *a: TRITON.forward(spec, *a, tile=tile.get("forward")))(x, values, *index)
    assert_close(y, forward(exact, single[0], single[2], *index).astype(x.dtype), tolerance)
    dvalues = jax.jit(
        lambda *a: TRITON.weight_gradient(spec, *a, tile=tile.get("weight_gradient"))
    )(x, dy, *index)
    assert_close(dvalues, weights(exact, *single[:2], *index), tolerance)
    dx = backward(exact, *single[1:], *index).astype(x.dtype)
    for method in (None,) if "input_gradient" in tile else products.METHODS:
        chosen = {"method": method} if method else {"tile": tile["input_gradient"]}
        assert_close(
            jax.jit(lambda *a, chosen=chosen: TRITON.input_gradient(spec, *a, **chosen))(
                dy, values, *index
            ),
            dx,
            tolerance,
        )


PLANNED = {
    "3x3": dataclasses.replace(BLOCKS, cin=80, cout=48, group_size=24, height=3, width=3),
    "1x1, strides": dataclasses.replace(POINT, cin=70, strides=(2, 1), batch=1),
    "strides of 2, dilation of 3": dataclasses.replace(
        BLOCKS,
        strides=(2, 2),
        dilation=(3, 1),
        padding=((3, 2), (1, 0)),
        kept_taps=5,
        height=5,
    ),
    "strides of 2, dilation of 2": dataclasses.replace(
        BASE, strides=(2, 2), dilation=(2, 1), padding=((2, 2), (1, 0)), kept_taps=9
    ),
}


@needs_triton
@pytest.mark.parametrize("case", PLANNED)
def test_with_a_plan_the_passes_give_the_same_and_make_no_lists(case):
    spec = PLANNED[case]
    x, dy, values, *index = operands(spec)
    plan = jax.jit(lambda *index: plan_of(spec, index))(*index)

    def passes(implementation, plan, x, dy, values, *index):
        options = {"plan": plan, "channel_block": spec.channel_block}
        y, pullback = jax.vjp(
            lambda x, v: shapes.convolve(spec, implementation, x, v, *index, **options), x, values
        )
        return y, *pullback(dy)

    tables = dataclasses.replace(
        TRITON, input_gradient=functools.partial(TRITON.input_gradient, method="transposed")
    )
    step = jax.jit(functools.partial(passes, tables))
    for result, expected in zip(
        step(plan, x, dy, values, *index), passes("dense", None, x, dy, values, *index), strict=True
    ):
        assert_close(result, expected, 1e-5)
    lists = re.compile(r"stablehlo\.(sort|scatter|gather|concatenate)")
    assert lists.search(step.lower(None, x, dy, values, *index).as_text())
    assert not lists.search(step.lower(plan, x, dy, values, *index).as_text())


@needs_triton
def test_vmap_over_plans():
    spec = dataclasses.replace(BLOCKS, height=2, width=2, batch=1)
    many = [operands(spec, seed) for seed in range(2)]
    dy, values, *index = (jnp.stack(a) for a in list(zip(*many))[1:])
    plans = jax.vmap(lambda *index: plan_of(spec, index))(*index)
    gradient = functools.partial(TRITON.input_gradient, spec, method="transposed")
    every = jax.jit(jax.vmap(lambda plan, *a: gradient(*a, plan=plan)))(plans, dy, values, *index)
    for i, (_, dy, values, *index) in enumerate(many):
        assert_close(every[i], dense.IMPLEMENTATION.input_gradient(spec, dy, values, *index), 1e-5)


CASES = {
    "padded lists": SAME,
    "strides, uneven padding": dataclasses.replace(
        BASE, strides=(2, 3), padding=((0, 1), (1, 0)), kept_taps=9
    ),
    "groups of 8, images of several tiles": dataclasses.replace(
        SAME, height=2, width=1, batch=256, groups=4, group_size=8
    ),
    "groups of 24": dataclasses.replace(SAME, cout=48, group_size=24, kept=24),
    "rectangular, dilated": dataclasses.replace(
        BASE, kernel=(2, 4), dilation=(3, 1), padding=((4, 0), (0, 5))
    ),
    "1x1": POINT,
    "1x1, strides, padding": dataclasses.replace(
        POINT, strides=(2, 3), padding=((2, 0), (0, 1)), batch=1
    ),
    "runs of 16 channels": BLOCKS,
    "runs of 8, strides": dataclasses.replace(
        BLOCKS, channel_block=8, kept=24, strides=(2, 2), padding=((0, 1), (0, 1))
    ),
    "1x1, runs of 32": dataclasses.replace(POINT, cin=96, kept=32, channel_block=32),
}


@needs_triton
@pytest.mark.parametrize("case", CASES)
def test_the_passes_are_those_of_the_masked_dense_convolution(case):
    check(CASES[case])


@needs_triton
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_accumulates_in_single(dtype):
    check(dataclasses.replace(BLOCKS, dtype=dtype), tolerance=1e-2)
    spec = dataclasses.replace(BASE, cin=300, kept=290, kept_taps=9, height=3, width=3, dtype=dtype)
    x, _, values, *index = operands(spec)
    y = TRITON.forward(spec, jnp.ones_like(x), jnp.ones_like(values), *index)
    assert (y == jnp.asarray(290 * 9, dtype)).all(), "a sum of 2610 ones stalls in half precision"


def random_spec(seed):
    rng = np.random.default_rng(seed)

    def pair(low, high):
        return tuple(int(a) for a in rng.integers(low, high, 2))

    kernel, dilation, groups = pair(1, 5), pair(1, 3), int(rng.integers(1, 4))
    padding = (pair(0, 4), pair(0, 4))
    reach = [(k - 1) * d for k, d in zip(kernel, dilation)]
    height, width = (max(int(rng.integers(1, 8)), r + 1 - sum(p)) for r, p in zip(reach, padding))
    run, size = int(rng.choice([1, 1, 8, 16])), int(rng.choice([8, 12, 16, 40]))
    cin = run * int(rng.integers(2, 5)) if run > 1 else int(rng.integers(1, 20))
    kept = run * int(rng.integers(1, cin // run)) if run > 1 else int(rng.integers(1, cin + 1))
    return ConvSpec(
        cin=cin,
        height=height,
        width=width,
        batch=int(rng.integers(1, 10)),
        kernel=kernel,
        cout=groups * size,
        groups=groups,
        kept=kept,
        kept_taps=int(rng.integers(1, math.prod(kernel) + 1)),
        group_size=size,
        strides=pair(1, 4),
        padding=padding,
        dilation=dilation,
        channel_block=run,
    )


@needs_triton
@pytest.mark.parametrize(
    "seed", [*range(4), *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(4, 80))]
)
def test_any_geometry(seed):
    check(random_spec(seed), seed)


@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize("seed", range(40))
def test_in_any_geometry_weights_may_be_kept_and_norms_loaded(seed):
    spec = dataclasses.replace(random_spec(seed), relu=bool(seed % 2))
    spec = dataclasses.replace(spec, batch=round_up(spec.batch, 4))
    rng = np.random.default_rng(seed)
    depth = max(16, 1 << (spec.kept * spec.kept_taps - 1).bit_length())
    walkers, is_first = int(rng.integers(1, 6)), bool(rng.integers(2))
    tile = Tile(16, 16, depth, positions_first=is_first, walkers=walkers)
    check_normalised(spec)
    check_normalised(spec, forward=tile)
    plain = dataclasses.replace(spec, relu=False)
    dx = tiles.choose_tile(plain, "input_gradient", 90)
    check(plain, seed, forward=tile, input_gradient=dx)


@needs_triton
@pytest.mark.parametrize("first", [False, True])
def test_tiles_that_cut_rows_depth_and_positions(first, monkeypatch):
    """Several tiles of rows, a ragged last one, splits that do not divide; with 64-bit offsets, as
    for more than 2^31 values.
    """
    constants = calls.geometry_constants
    monkeypatch.setattr(
        calls, "geometry_constants", lambda *a, **k: constants(*a, **k) | {"wide": first}
    )
    for method in ("scatter", "transposed"):
        product = Tile(16, 16, 32, positions_first=first, method=method)
        check(
            dataclasses.replace(
                BLOCKS, cout=48, group_size=24, channel_block=32, height=2, width=3
            ),
            forward=product,
            input_gradient=product,
            weight_gradient=Tile(16, 16, 64, splits=5),
        )


@needs_triton
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("spec", [SAME, POINT], ids=["3x3", "1x1"])
@jax.debug_nans(False)
def test_the_epilogue_is_fused(spec, dtype):
    spec = dataclasses.replace(spec, dtype=dtype, relu=True)
    x, residual, values, *index = operands(spec)
    scale, bias = (
        jnp.asarray(np.random.default_rng(i).standard_normal(spec.cout).astype(np.float32))
        for i in range(2)
    )
    single = (a.astype(jnp.float32) for a in (x, values))
    sums = dense.IMPLEMENTATION.forward(
        dataclasses.replace(spec, dtype="float32", precision="highest"), *single, *index
    )
    tolerance = 1e-5 if dtype == "float32" else 1e-2
    for epilogue in (
        {"scale": scale, "bias": bias, "residual": residual},
        {"bias": bias},
        {"scale": scale},
        {"residual": residual},
    ):
        expected = sums
        if "scale" in epilogue:
            expected = expected * scale[:, None, None, None]
        if "bias" in epilogue:
            expected = expected + bias[:, None, None, None]
        if "residual" in epilogue:
            expected = expected + residual.astype(jnp.float32)
        y = jax.jit(lambda parts: TRITON.forward(spec, x, values, *index, **parts))(epilogue)
        assert_close(y, jnp.maximum(expected, 0).astype(dtype), tolerance)
    y = TRITON.forward(spec, x, values, *index, None, None, residual.at[3, 2, 1, 0].set(jnp.nan))
    assert np.argwhere(np.isnan(np.asarray(y, np.float32))).tolist() == [[3, 2, 1, 0]]


STATIONARY = {  # each with fewer walkers than tiles
    "padded depth, ragged positions": (SAME, Tile(16, 16, 64, walkers=2)),
    "rows in two tiles, positions first": (
        dataclasses.replace(BLOCKS, cout=48, group_size=24),
        Tile(16, 16, 128, positions_first=True, walkers=3),
    ),
    "strides, more walkers than tiles": (
        dataclasses.replace(BASE, strides=(2, 3), padding=((0, 1), (1, 0)), kept_taps=9),
        Tile(16, 32, 128, walkers=5),
    ),
    "a depth beyond the list": (
        dataclasses.replace(SAME, cin=64, kept=43, height=2, width=2),
        Tile(16, 16, 512, walkers=1),
    ),
    "several tiles of a pixel": (dataclasses.replace(SAME, batch=32), Tile(16, 16, 64, walkers=3)),
    "1x1": (POINT, Tile(16, 16, 16, walkers=2)),
}


@needs_triton
@pytest.mark.parametrize(
    "case",
    [pytest.param(case, marks=[pytest.mark.slow] * (i > 1)) for i, case in enumerate(STATIONARY)],
)
def test_programs_that_keep_their_weights_give_what_float64_gives(case):
    spec, tile = STATIONARY[case]
    spec = dataclasses.replace(spec, relu=True, batch=round_up(spec.batch, 4))
    x, dy, values, *index = operands(spec)
    rng = np.random.default_rng(5)
    scale, bias = (jnp.asarray(rng.standard_normal(spec.cout), jnp.float32) for _ in range(2))
    exact = float64.reference(spec, *map(np.float64, (x, dy, values)), *map(np.asarray, index))[0]
    by = (slice(None), None, None, None)

    y = TRITON.forward(spec, x, values, *index, scale, bias, dy, tile=tile)
    expected = np.float64(scale)[by] * exact + np.float64(bias)[by] + np.float64(dy)
    assert_near(y, np.maximum(expected, 0), 1e-5)
    y, sums = TRITON.forward_with_sums(spec, x, values, *index, tile=tile)
    assert_near(y, exact, 1e-5)
    assert_near(sums, np.stack([exact.sum((1, 2, 3)), (exact**2).sum((1, 2, 3))]), 1e-5)
    check_normalised(spec, forward=tile)


def test_a_tile_that_keeps_too_few_weights_is_refused():
    tile = Tile(16, 16, 32, walkers=1)
    with pytest.raises(ValueError, match="depth must be a group's whole contraction, 39 or more"):
        TRITON.forward(SAME, *operands(SAME)[::2][:2], *operands(SAME)[3:], tile=tile)


NORMALISED = {
    "padding stays zero": dataclasses.replace(SAME, batch=4),
    "strides, dilation": dataclasses.replace(
        BASE, batch=8, strides=(2, 1), dilation=(1, 2), padding=((1, 1), (3, 2)), kept_taps=5
    ),
    "runs of 16 channels, ragged positions": dataclasses.replace(BLOCKS, batch=12),
    "1x1": POINT,
    "rows that are filled up": BLOCKS,
}


@needs_triton
@pytest.mark.parametrize("relu", [True, pytest.param(False, marks=pytest.mark.slow)])
@pytest.mark.parametrize("case", NORMALISED)
def test_a_norm_in_the_load_gives_what_float64_gives(case, relu):
    check_normalised(dataclasses.replace(NORMALISED[case], relu=relu))


@needs_triton
def test_a_norm_in_the_load_in_half_precision_rounds_as_a_stored_input():
    spec = dataclasses.replace(BLOCKS, dtype="bfloat16", relu=True, batch=8)
    check_normalised(spec, 1e-2)


@needs_triton
def test_with_a_norm_in_the_load_what_is_not_kept_is_not_touched():
    spec = dataclasses.replace(SAME, groups=1, cout=16, relu=True, batch=4)
    x, dy, values, *index = operands(spec)
    x = x.at[np.setdiff1d(np.arange(spec.cin), index[1][0])].set(jnp.inf)
    norm = (jnp.ones(spec.cin, jnp.float32), jnp.ones(spec.cin, jnp.float32))
    assert jnp.isfinite(TRITON.forward_with_sums(spec, x, values, *index, *norm)[0]).all()
    assert jnp.isfinite(TRITON.weight_gradient(spec, x, dy, *index, *norm)).all()


def check_normalised(spec, tolerance=1e-5, **tile):
    """The passes that normalise a raw input, against float64."""
    z, dy, values, *index = operands(spec)
    rng = np.random.default_rng(4)
    scale, shift = (jnp.asarray(rng.standard_normal(spec.cin), jnp.float32) for _ in range(2))
    by = (slice(None), None, None, None)
    x = np.float64(scale)[by] * np.float64(z) + np.float64(shift)[by]
    x = np.maximum(x, 0) if spec.relu else x
    exact = (x, *map(np.float64, (dy, values)))
    y, _, dvalues = float64.reference(spec, *exact, *map(np.asarray, index))
    result, sums = TRITON.forward_with_sums(
        spec, z, values, *index, scale, shift, tile=tile.get("forward")
    )
    assert_near(result, y, tolerance)
    assert_close(sums, batch_norm.channel_sums(result), 1e-5)
    gradient = TRITON.weight_gradient(spec, z, dy, *index, scale, shift)
    assert_near(gradient, dvalues, tolerance)


def assert_near(result, expected, tolerance):
    """As `assert_close`, to float64."""
    assert result.shape == expected.shape
    difference = np.abs(np.float64(np.asarray(result, np.float32)) - expected)
    assert difference.max() <= tolerance * np.abs(expected).max()


NORM_CASES = {
    "padded lists, several tiles of positions": dataclasses.replace(BLOCKS, batch=13),
    "phases, uneven": dataclasses.replace(
        BLOCKS, strides=(2, 2), padding=((1, 1), (0, 1)), cout=48, group_size=24, height=5
    ),
    "strides without phases": dataclasses.replace(
        BASE, strides=(2, 3), padding=((0, 1), (1, 0)), kept_taps=9
    ),
    "1x1": dataclasses.replace(POINT, cin=70),
}


@needs_triton
@pytest.mark.parametrize("parts", ["", "more", "joined, more"])
@pytest.mark.parametrize("case", NORM_CASES)
def test_the_passes_between_batch_norms_are_those_of_the_formulas(case, parts):
    spec = dataclasses.replace(NORM_CASES[case], relu=True)
    tile = tiles.choose_tile(spec, "input_gradient", 90, "transposed")
    check_norm_passes(spec, parts, tile)


@needs_triton
@pytest.mark.parametrize("method", ["scatter", "dense", "1x1 with strides"])
def test_what_the_kernels_do_not_fuse_follows_in_xla(method):
    spec = dataclasses.replace(BLOCKS, relu=True)
    if method == "1x1 with strides":
        spec, tile = dataclasses.replace(POINT, strides=(2, 1), relu=True), None
    else:
        tile = tiles.choose_tile(spec, "input_gradient", 90, method)
    check_norm_passes(spec, "joined, more", tile)


@needs_triton
def test_a_norm_without_relu_and_in_half_precision():
    for change, tolerance in (({"relu": False}, 1e-5), ({"relu": True, "dtype": "bfloat16"}, 1e-2)):
        spec = dataclasses.replace(BLOCKS, **change)
        tile = tiles.choose_tile(spec, "input_gradient", 90, "transposed")
        check_norm_passes(spec, "joined, more", tile, tolerance)


def check_norm_passes(spec, parts, tile, tolerance=1e-5):
    """The forward pass with its sums, and the input gradient through the norm of the input."""
    x, dy, values, *index = operands(spec)
    rng = np.random.default_rng(3)
    exact = dataclasses.replace(spec, precision="highest", dtype="float32")
    single = [a.astype(jnp.float32) for a in (x, dy, values)]

    y, sums = jax.jit(lambda *a: TRITON.forward_with_sums(spec, *a))(x, values, *index)
    plain = dataclasses.replace(exact, relu=False)
    expected = dense.IMPLEMENTATION.forward(plain, single[0], single[2], *index)
    assert_close(y, expected.astype(x.dtype), tolerance)
    assert_close(sums, batch_norm.channel_sums(y), 1e-5)

    scale, shift = (jnp.asarray(rng.standard_normal(spec.cin), jnp.float32) for _ in range(2))
    z, shortcut, more = (
        jnp.asarray(rng.standard_normal(spec.in_shape), spec.dtype) for _ in range(3)
    )
    by = (slice(None), None, None, None)
    wide = z.astype(jnp.float32)
    joined = scale[by] * wide + shift[by] + shortcut.astype(jnp.float32)
    joined = jnp.maximum(joined, 0).astype(z.dtype)
    norm = (z, scale, shift, joined if "joined" in parts else None)
    norm = (*norm, more if "more" in parts else None)
    results = jax.jit(lambda *a: TRITON.norm_input_gradient(spec, *a, tile=tile))(
        dy, values, *index, *norm
    )
    dx = dense.IMPLEMENTATION.input_gradient(plain, *single[1:], *index)
    g = dx + more.astype(jnp.float32) if "more" in parts else dx
    if spec.relu:
        passes = joined > 0 if "joined" in parts else scale[by] * wide > -shift[by]
        g = jnp.where(passes, g, 0)
    sums = jnp.stack([g.sum((1, 2, 3)), (g * wide).sum((1, 2, 3))])
    expected = [(scale[by] * g).astype(z.dtype), sums, g.astype(z.dtype)]
    assert len(results) == (3 if "joined" in parts else 2)
    for result, reference in zip(results, expected):
        assert_close(result, reference, tolerance)


@needs_triton
def test_what_is_not_kept_is_not_touched():
    spec = dataclasses.replace(SAME, groups=1, cout=16)
    x, dy, values, *index = operands(spec)
    x = x.at[np.setdiff1d(np.arange(spec.cin), index[1][0])].set(jnp.inf)
    assert jnp.isfinite(TRITON.forward(spec, x, values, *index)).all()
    assert jnp.isfinite(TRITON.weight_gradient(spec, x, dy, *index)).all()


@needs_triton
def test_vmap_and_gradients_through_the_door():
    spec = dataclasses.replace(SAME, height=3, width=3)
    many = [operands(spec, seed) for seed in range(2)]

    def run(implementation, x, dy, values, *index):
        y, pullback = jax.vjp(
            lambda x, v: shapes.convolve(spec, implementation, x, v, *index), x, values
        )
        return y, *pullback(dy)

    every = jax.jit(jax.vmap(lambda *a: run(TRITON, *a)))(*(jnp.stack(a) for a in zip(*many)))
    for i, one in enumerate(many):
        for result, reference in zip(every, run("dense", *one), strict=True):
            assert_close(result[i], reference, 1e-5)


@needs_triton
def test_second_derivatives_through_the_door():
    spec = dataclasses.replace(SAME, height=3, width=3, batch=2, relu=False)
    x, dy, values, *index = operands(spec)

    def penalty(implementation, x, values):
        def loss(x, values):
            return (shapes.convolve(spec, implementation, x, values, *index) ** 3 * dy).mean()

        return sum((g**2).sum() for g in jax.grad(loss, (0, 1))(x, values))

    results, reference = (
        jax.jit(jax.grad(lambda *a, which=which: penalty(which, *a), (0, 1)))(x, values)
        for which in (TRITON, "dense")
    )
    for result, expected in zip(results, reference, strict=True):
        assert_close(result, expected, 1e-4)


@needs_triton
@pytest.mark.parametrize("empty", ["kept", "kept_taps"])
def test_nothing_kept_gives_what_is_added(empty):
    spec = dataclasses.replace(SAME, **{empty: 0})
    x, dy, values, *index = shapes.random_operands(spec)
    y, pullback = jax.vjp(lambda x, v: shapes.convolve(spec, TRITON, x, v, *index), x, values)
    assert y.shape == spec.out_shape
    assert not y.any()
    assert [a.shape for a in pullback(dy)] == [x.shape, values.shape]
    assert not pullback(dy)[0].any()


def test_inside_shard_map_the_results_vary_as_the_operands_do():
    spec, parts = dataclasses.replace(SAME, batch=2), jax.sharding.PartitionSpec
    x, dy, values, *index = operands(dataclasses.replace(SAME, batch=4))
    images = parts(None, None, None, "batch")

    def loss(x, dy, values, *index):
        return jax.lax.psum((shapes.convolve(spec, TRITON, x, values, *index) * dy).sum(), "batch")

    mesh = jax.sharding.AbstractMesh((2,), ("batch",), axis_types=(jax.sharding.AxisType.Auto,))
    sharded = jax.shard_map(
        jax.grad(loss, (0, 2)),
        mesh=mesh,
        in_specs=(images, images, *[parts()] * 4),
        out_specs=(images, parts()),
    )
    dx, dvalues = jax.eval_shape(sharded, x, dy, values, *index)
    assert (dx.shape, dvalues.shape) == (x.shape, values.shape)
