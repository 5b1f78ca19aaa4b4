"""The Mosaic GPU kernels' numbers without a GPU: lists against NumPy, kernels interpreted."""

import dataclasses
import functools
import itertools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from described_gpu import interpreter, no_races
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import PartitionSpec

from experiments.bench import shapes
from pallas_kernels.block_sparse_conv import PASSES, ConvSpec, block_sparse_conv, xla
from pallas_kernels.block_sparse_conv.mosaic_gpu import gather_outer, kernels, lists, pipeline
from pallas_kernels.block_sparse_conv.mosaic_gpu import launch as mosaic_gpu
from pallas_kernels.block_sparse_conv.mosaic_gpu.geometry import Gather, entry
from pallas_kernels.block_sparse_conv.mosaic_gpu.tiles import Tile, candidate_tiles

BASE = ConvSpec(
    cin=32,
    height=5,
    width=4,
    batch=3,
    kernel=(3, 3),
    cout=24,
    groups=2,
    kept=16,
    kept_taps=3,
    group_size=12,
    strides=(2, 1),
    padding=((1, 0), (0, 2)),
    dtype="bfloat16",
    channel_block=8,
)
models_stores = pytest.mark.skipif(
    gather_outer.INTERPRETER_COPIES_TRANSPOSED,
    reason="the interpreter of jax 0.10 stores in order and waits for nothing",
)


@pytest.fixture
def interpreted():
    with no_races():
        yield


def operands(spec: ConvSpec, seed: int = 0):
    """Random operands whose channels come in aligned runs of `spec.channel_block`."""
    runs = dataclasses.replace(
        spec, cin=spec.cin // spec.channel_block, kept=spec.kept // spec.channel_block
    )
    _, _, _, filters, blocks, taps = shapes.random_operands(runs, seed)
    within = jnp.arange(spec.channel_block, dtype=jnp.int32)[None, None]
    channels = (blocks[..., None] * spec.channel_block + within).reshape(spec.groups, -1)
    x, dy, values, *_ = shapes.random_operands(spec, seed)
    return x, dy, values, filters, channels, taps


def gathered(gather: Gather, words: np.ndarray, source: np.ndarray) -> np.ndarray:
    """The definition of a list: `[entries * run, pixels of a phase, images]`, zeros where there is
    nothing to read.
    """
    height, width = gather.phase_size
    image = source.reshape(-1, *gather.source, gather.images)
    out = np.zeros((len(words), gather.run, height, width, gather.images), np.float32)
    for e, word in enumerate(np.asarray(words, np.int64)):
        first, offset_y, offset_x = (
            (word & 0xFFFF) * gather.run,
            (word >> 16 & 0xFF) - 128,
            word >> 24,
        )
        for y in range(height):
            for x in range(width):
                at = y * gather.read_stride[0] + offset_y, x * gather.read_stride[1] + offset_x
                if (
                    0 <= at[0] < gather.source[0]
                    and 0 <= at[1] < gather.source[1]
                    and first < len(image)
                ):
                    out[e, :, y, x] = image[first : first + gather.run, at[0], at[1]]
    return out.reshape(-1, height, width, gather.images)


def plain_product(
    gather,
    tile,
    counts,
    lists,
    weights,
    source,
    out_rows,
    out_channels,
    *,
    scale=None,
    bias=None,
    residual=None,
    relu=False,
    interpret=None,
    processors=0,
):
    """The definition of `gather_product`, in NumPy."""
    dtype, blocks = source.dtype, len(weights) // gather.phases
    counts, lists, weights, source = (
        np.asarray(counts),
        np.asarray(lists),
        np.asarray(weights, np.float32),
        np.asarray(source, np.float32),
    )
    out_rows = (
        np.split(np.arange(out_channels), range(tile.rows, out_channels, tile.rows))
        if out_rows is None
        else np.asarray(out_rows)
    )
    out = np.full((out_channels, *gather.output, gather.images), np.nan, np.float32)
    for this in range(len(weights)):
        phase, block = divmod(this, blocks)
        x = gathered(gather, lists[this, : counts[this] * tile.depth // gather.run], source)
        y = np.tensordot(weights[this, :, : len(x)], x, 1)[: len(out_rows[block])]
        for vector, apply in ((scale, np.multiply), (bias, np.add)):
            y = (
                y
                if vector is None
                else apply(y, np.asarray(vector)[block, : len(y), None, None, None])
            )
        first = divmod(phase, gather.write_stride[1])
        window = out[
            out_rows[block], first[0] :: gather.write_stride[0], first[1] :: gather.write_stride[1]
        ]
        out[
            out_rows[block], first[0] :: gather.write_stride[0], first[1] :: gather.write_stride[1]
        ] = y[:, : window.shape[1], : window.shape[2]]
    out = out.reshape(out_channels, -1)
    out = out if residual is None else out + np.asarray(residual, np.float32)
    return jnp.asarray(np.maximum(out, 0) if relu else out, dtype)


def plain_outer(gather, tile, lists, source, grouped, group, *, interpret=None):
    """The definition of `gather_outer`, in NumPy; one share."""
    lists, source = np.asarray(lists), np.asarray(source, np.float32)
    grouped = np.asarray(grouped, np.float32).reshape(len(lists), group, -1)
    parts = [
        dy @ gathered(gather, words, source).reshape(-1, dy.shape[1]).T
        for words, dy in zip(lists, grouped)
    ]
    return jnp.asarray(np.stack(parts))[None]


RUNS = {
    "forward": mosaic_gpu._forward,
    "input_gradient": mosaic_gpu._input_gradient,
    "weight_gradient": mosaic_gpu._weight_gradient,
}


def reference(spec: ConvSpec, x, dy, values, *index) -> dict[str, jax.Array]:
    """The three passes in XLA, in float32."""
    single = dataclasses.replace(spec, dtype="float32")
    x, dy, values = (a.astype(jnp.float32) for a in (x, dy, values))
    operands = {"forward": (x, values), "input_gradient": (dy, values), "weight_gradient": (x, dy)}
    return {
        name: getattr(xla.FORMULATIONS["rows_loop"], name)(single, *operands[name], *index)
        for name in PASSES
    }


def assert_close(result, expected, tolerance=1e-2):
    assert result.shape == expected.shape
    result, expected = np.asarray(result, np.float32), np.asarray(expected, np.float32)
    np.testing.assert_allclose(
        result, expected, rtol=0, atol=tolerance * np.abs(expected).max(initial=1e-30)
    )


@st.composite
def specs(draw):
    def pair(low, high):
        return draw(st.tuples(st.integers(low, high), st.integers(low, high)))

    kernel, strides, dilation, block = (
        pair(1, 3),
        pair(1, 3),
        pair(1, 2),
        draw(st.sampled_from([8, 16, 24])),
    )
    padding, groups, group_size, runs = (
        (pair(0, 2), pair(0, 2)),
        draw(st.integers(1, 3)),
        draw(st.integers(1, 80)),
        draw(st.integers(1, 6)),
    )
    reach = [(k - 1) * d for k, d in zip(kernel, dilation)]
    height, width = (max(size, r + 1 - sum(p)) for size, r, p in zip(pair(1, 5), reach, padding))
    return ConvSpec(
        cin=runs * block,
        height=height,
        width=width,
        batch=draw(st.integers(1, 3)),
        kernel=kernel,
        cout=groups * group_size,
        groups=groups,
        kept=block * draw(st.integers(1, runs)),
        kept_taps=draw(st.integers(1, math.prod(kernel))),
        group_size=group_size,
        strides=strides,
        padding=padding,
        dilation=dilation,
        dtype=draw(st.sampled_from(["bfloat16", "float16"])),
        channel_block=block,
    )


def check_lists(spec: ConvSpec, seed: int, pick):
    """All that XLA prepares for the kernels, with the kernels' definitions in their place."""
    assert mosaic_gpu.limits(spec) is None
    x, dy, values, *index = operands(spec, seed)
    inputs = {"forward": (x, values), "input_gradient": (dy, values), "weight_gradient": (x, dy)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "gather_product", plain_product)
        patch.setattr(kernels, "gather_outer", plain_outer)
        for name, expected in reference(spec, x, dy, values, *index).items():
            assert_close(
                RUNS[name](None, pick(candidate_tiles(spec, name)), spec, *inputs[name], *index),
                expected,
            )


def test_the_lists_say_what_to_read():
    check_lists(
        dataclasses.replace(BASE, dilation=(1, 2), cin=96, kept=24, channel_block=24),
        0,
        lambda candidates: candidates[-1],
    )


@pytest.mark.slow
@settings(max_examples=50, deadline=None)
@given(specs(), st.integers(0, 99), st.data())
def test_the_lists_say_what_to_read_for_any_geometry(spec, seed, data):
    check_lists(spec, seed, lambda candidates: data.draw(st.sampled_from(candidates)))


def test_only_pairs_that_reach_a_block_of_channels_are_walked():
    spec = dataclasses.replace(
        BASE, cin=128, kept=8, groups=4, cout=48, strides=(2, 2), kept_taps=1
    )
    channels = jnp.arange(8)[None] + jnp.array([0, 8, 64, 72])[:, None]
    taps = jnp.array([[0], [1], [0], [1]])
    values = jnp.ones(spec.packed_shape, jnp.bfloat16)
    build = jax.jit(functools.partial(lists.gradient_lists, spec, Tile(64, 64, 64), 16))
    counts, entries, weights = build(values, channels, taps)
    # Padding (1, 0) above, (0, 2) left: tap 0 reaches odd rows and even columns of the input, tap 1
    # odd rows and odd columns.
    np.testing.assert_array_equal(counts.reshape(2, 2, 2), [[[0, 0], [0, 0]], [[1, 1], [1, 1]]])
    np.testing.assert_array_equal((entries[4:] & 0xFFFF)[:, :2], [[0, 4], [2, 4], [1, 4], [3, 4]])
    np.testing.assert_array_equal((weights != 0).sum((1, 2)), [0, 0, 0, 0, 96, 96, 96, 96])


def product_operands(
    gather: Gather,
    tile: Tile,
    blocks: int,
    group: int,
    channels: int,
    stages: list[int],
    seed: int = 0,
):
    """Random operands of `gather_product`; some entries past the end."""
    rng = np.random.default_rng(seed)
    lists = max(stages) * tile.depth // gather.run
    shape = (blocks * gather.phases, lists)
    ranges = (0, channels // gather.run + 1), (-2, 3), (-2, 3)
    words = entry(*(jnp.asarray(rng.integers(low, high, shape), jnp.int32) for low, high in ranges))
    weights = jnp.asarray(
        rng.standard_normal((shape[0], tile.rows, lists * gather.run)), jnp.bfloat16
    )
    source = jnp.asarray(rng.standard_normal((channels, gather.beyond)), jnp.bfloat16)
    places = jnp.asarray(rng.permutation(blocks * group).reshape(blocks, group), jnp.int32)
    return jnp.asarray(stages, jnp.int32), words, weights, source, places


def test_the_product_kernel_in_the_interpreter_with_everything_at_the_end(interpreted):
    gather = Gather(8, (3, 1), (2, 3), (2, 1), (1, 1), 64)
    tile = Tile(64, 128, 64, depth=64, stages=2)
    inputs = product_operands(gather, tile, 2, 3, 16, [2, 1])
    rng = np.random.default_rng(1)
    scale, bias = (jnp.asarray(rng.standard_normal((2, 64)).astype(np.float32)) for _ in range(2))
    residual = jnp.asarray(rng.standard_normal((6, 2 * 3 * 64)), jnp.bfloat16)
    end = {"scale": scale, "bias": bias, "residual": residual, "relu": True}
    run = jax.jit(
        functools.partial(
            kernels.gather_product,
            gather,
            tile,
            out_channels=6,
            processors=2,
            interpret=interpreter(),
            **end,
        )
    )
    result = run(*inputs)
    assert_close(result, plain_product(gather, tile, *inputs, 6, **end))
    assert 0.2 < float((result == 0).mean()) < 0.8


def test_the_product_kernel_in_the_interpreter_with_phases_and_lists_of_any_length(interpreted):
    gather = Gather(16, (2, 2), (3, 2), (1, 1), (2, 1), 64)
    tile = Tile(64, 64, 64, depth=64, stages=3, consumers=1)
    inputs = (*product_operands(gather, tile, 2, 64, 32, [2, 0, 1, 2])[:-1], None)
    run = jax.jit(
        functools.partial(
            kernels.gather_product,
            gather,
            tile,
            out_rows=None,
            out_channels=128,
            processors=1,
            interpret=interpreter(),
        )
    )
    assert_close(run(*inputs[:-1]), plain_product(gather, tile, *inputs, 128))


def test_the_outer_kernel_in_the_interpreter(interpreted):
    gather = Gather(32, (2, 3), (1, 3), (2, 1), (1, 1), 64)
    tile = Tile(64, 128, 64, depth=64, stages=2, splits=2)  # 3 steps: shares of 2 and 1
    _, words, _, source, _ = product_operands(
        gather, dataclasses.replace(tile, depth=128), 1, 8, 64, [1]
    )
    grouped = jnp.asarray(np.random.default_rng(1).standard_normal((24, 1 * 3 * 64)), jnp.bfloat16)
    parts = jax.jit(
        functools.partial(kernels.gather_outer, gather, tile, group=24, interpret=interpreter())
    )(words, source, grouped)
    assert parts.shape[0] == 2
    assert_close(parts.sum(0)[:, :24], plain_outer(gather, tile, words, source, grouped, 24)[0])


def tiny_product():
    """One thread block writes two tiles, one after the other through the same staging memory."""
    gather = Gather(64, (1, 1), (1, 1), (1, 1), (1, 1), 64)
    tile = Tile(64, 64, 64, depth=64, stages=2, consumers=1)
    inputs = product_operands(gather, tile, 2, 64, 64, [1, 1])[:-1]
    run = functools.partial(
        kernels.gather_product,
        gather,
        tile,
        out_rows=None,
        out_channels=128,
        processors=1,
        interpret=interpreter(),
    )
    return jax.jit(run)(*inputs)


@pytest.mark.parametrize(
    "step", ["barrier_wait", pytest.param("wait_smem_to_gmem", marks=models_stores)]
)
def test_the_interpreter_sees_a_missing_wait(step, monkeypatch):
    monkeypatch.setattr(pipeline.plgpu, step, lambda *_, **__: None)
    with (
        pytest.raises(
            (AssertionError, RuntimeError, jax.errors.JaxRuntimeError), match=r"race|RACE"
        ),
        no_races(),
    ):
        jax.block_until_ready(tiny_product())


def test_the_interpreter_sees_missing_copies(interpreted, monkeypatch):
    monkeypatch.setattr(pipeline.plgpu, "copy_smem_to_gmem", lambda *_, **__: None)
    assert np.isnan(np.asarray(tiny_product(), np.float32)).all()


SMALL = dataclasses.replace(
    BASE, height=3, width=2, strides=(1, 1), padding=((1, 1), (1, 0)), kernel=(3, 2)
)
INTERPRETED = {
    "1x1": dataclasses.replace(
        SMALL,
        kernel=(1, 1),
        kept_taps=1,
        padding=((0, 0), (0, 0)),
        width=1,
        batch=7,
        dtype="float16",
    ),
    "3x2, odd batch": dataclasses.replace(SMALL, relu=True),
    "stride": dataclasses.replace(
        SMALL, strides=(2, 1), channel_block=16, width=1, kept_taps=2, group_size=8, cout=16
    ),
    "group of 72": dataclasses.replace(SMALL, groups=1, cout=72, group_size=72),
    "batch 128": dataclasses.replace(SMALL, batch=128),
}


FAST = [("1x1", name) for name in PASSES] + [
    ("stride", "input_gradient"),
    ("3x2, odd batch", "weight_gradient"),
]


@pytest.mark.parametrize(
    ("case", "name"),
    [
        pair if pair in FAST else pytest.param(*pair, marks=pytest.mark.slow)
        for pair in itertools.product(INTERPRETED, PASSES)
    ],
)
def test_all_passes_in_the_interpreter(case, name, interpreted):
    spec = INTERPRETED[case]
    x, dy, values, *index = operands(spec)
    record = mosaic_gpu.implementation(interpreter())
    assert record.supports(spec) is None
    inputs = {"forward": (x, values), "input_gradient": (dy, values), "weight_gradient": (x, dy)}[
        name
    ]
    expected = reference(spec, x, dy, values, *index)[name]
    run = functools.partial(getattr(record, name), spec)
    result = jax.jit(run)(*inputs, *index)
    with (
        jax.enable_x64(True),
        jax.numpy_rank_promotion("raise"),
        jax.numpy_dtype_promotion("strict"),
    ):
        assert jax.eval_shape(run, *inputs, *index).dtype == result.dtype
    assert result.dtype == (jnp.float32 if name == "weight_gradient" else jnp.dtype(spec.dtype))
    assert_close(result, jnp.maximum(expected, 0) if spec.relu and name == "forward" else expected)


def door(spec: ConvSpec, implementation, x, values, *index):
    return block_sparse_conv(
        x,
        values,
        *index,
        kernel_shape=(*spec.kernel, spec.cin, spec.cout),
        strides=spec.strides,
        padding=spec.padding,
        channel_block=spec.channel_block,
        implementation=implementation,
    )


def test_types_inside_shard_map():
    spec = dataclasses.replace(BASE, batch=4)
    x, dy, values, *index = operands(spec)
    record, images = (
        mosaic_gpu.implementation(interpreter()),
        PartitionSpec(None, None, None, "batch"),
    )

    def loss(x, values, dy, *index):
        return jax.lax.psum((door(spec, record, x, values, *index) * dy).sum(), "batch")

    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]), ("batch",))
    none = PartitionSpec()
    sharded = jax.shard_map(
        jax.grad(loss, (0, 1)),
        mesh=mesh,
        in_specs=(images, none, images, none, none, none),
        out_specs=(images, none),
    )
    dx, dvalues = jax.eval_shape(sharded, x, values, dy, *index)
    assert (dx.shape, dvalues.shape) == (x.shape, values.shape)


@pytest.mark.slow
def test_second_derivatives_through_the_door(interpreted):
    spec = dataclasses.replace(INTERPRETED["1x1"], dtype="bfloat16")
    x, dy, values, *index = operands(spec)

    def penalty(implementation, x, values):
        def loss(x, values):
            return (
                door(spec, implementation, x, values, *index).astype(jnp.float32) ** 2 * dy
            ).mean()

        return sum((g.astype(jnp.float32) ** 2).sum() for g in jax.grad(loss, (0, 1))(x, values))

    which = (mosaic_gpu.implementation(interpreter()), "xla")
    result, expected = (
        jax.jit(jax.grad(functools.partial(penalty, one), (0, 1)))(x, values) for one in which
    )
    for a, b in zip(result, expected, strict=True):
        assert_close(a, b, 2e-2)


@pytest.mark.parametrize("empty", ["kept", "kept_taps"])
def test_nothing_kept_gives_zeros(empty):
    spec = dataclasses.replace(BASE, **{empty: 0})
    x, dy, values, *index = shapes.random_operands(spec)
    y, pullback = jax.vjp(
        lambda x, v: door(spec, mosaic_gpu.implementation(interpreter()), x, v, *index), x, values
    )
    assert y.shape == spec.out_shape
    assert not y.any()
    assert [a.shape for a in pullback(dy)] == [x.shape, values.shape]
    assert not pullback(dy)[0].any()


@pytest.mark.slow
def test_through_the_door_and_under_vmap(interpreted):
    spec = dataclasses.replace(INTERPRETED["1x1"], dtype="bfloat16")
    x, dy, values, *index = operands(spec)
    record = mosaic_gpu.implementation(interpreter())

    def run(implementation, x, values):
        y, pullback = jax.vjp(lambda x, v: door(spec, implementation, x, v, *index), x, values)
        return y, *pullback(dy)

    expected = [jax.jit(functools.partial(run, "xla"))(factor * x, values) for factor in (1, 2)]
    result = jax.jit(jax.vmap(functools.partial(run, record), in_axes=(0, None)))(
        jnp.stack([x, 2 * x]), values
    )
    for i in range(2):
        for a, b in zip(result, expected[i], strict=True):
            assert_close(a[i], b)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (
            {"dtype": "float32"},
            "wgmma takes 32-bit operands only with the contracted axis innermost",
        ),
        ({"channel_block": 4}, "aligned runs of 8: channel_block=4"),
        ({"cin": 36}, "aligned runs of 8: .* cin=36"),
        ({"group_size": 136, "cout": 272}, "at most 128 filters, group_size=136"),
        ({"padding": ((128, 0), (0, 0))}, "at most 127 pixels away"),
        ({"cin": 1 << 19}, "at most 524280 channels"),
        ({"batch": 1 << 22}, "31 bits: too many in x .*, 4194304"),
        ({"batch": 65, "height": 1 << 10, "width": 1 << 9}, "31 bits"),
    ],
)
def test_what_cannot_be_served_says_why(change, reason):
    assert mosaic_gpu.limits(BASE) is None
    assert re.search(
        reason,
        mosaic_gpu.implementation(interpreter()).supports(dataclasses.replace(BASE, **change)),
    )


def test_without_a_hopper_gpu_the_record_says_so():
    if jax.default_backend() != "gpu":
        assert "runs on NVIDIA Hopper GPUs" in mosaic_gpu.unavailable()
        assert mosaic_gpu.IMPLEMENTATION.supports(BASE) == mosaic_gpu.unavailable()
