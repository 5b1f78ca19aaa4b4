"""Laws that hold for every layout: packing, masks, and the convolution with its gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax

import blocksparse_jax as bsj

# (kh, kw, cin, cout), group_size, kept, kept_taps, channel_block
SIZES = [
    ((3, 3, 5, 16), 8, 2, 4, 1),
    ((1, 1, 4, 9), 3, 3, 1, 1),
    ((2, 3, 6, 6), 2, 4, 6, 2),  # aligned runs, all taps
    ((3, 1, 1, 8), 8, 1, 2, 1),  # one group, one channel
    ((1, 2, 10, 3), 1, 10, 1, 2),  # groups of one filter, all channels
    ((2, 2, 3, 4), 2, 3, 4, 1),  # everything kept
]

POOL = st.sampled_from(SIZES)
mask_of = jax.jit(bsj.layout_to_mask)


@functools.cache
def drawing(shape, group_size, kept, kept_taps, channel_block):
    """Jitted `key -> layout`, so that another key does not compile again."""
    return jax.jit(
        lambda key: bsj.random_groups(
            key,
            shape,
            group_size=group_size,
            kept=kept,
            kept_taps=kept_taps,
            channel_block=channel_block,
        )
    )


@st.composite
def layouts(draw, sizes=POOL):
    """A random layout of one of a few sizes: its shapes are compiled, its contents are not."""
    return drawing(*draw(sizes))(jax.random.key(draw(st.integers(0, 2**16))))


@st.composite
def any_sizes(draw, max_kernel=3):
    """Any sizes: rectangular kernels, 1x1, aligned runs of channels, everything kept or next to
    nothing.
    """
    kh, kw = draw(st.integers(1, max_kernel)), draw(st.integers(1, max_kernel))
    channel_block = draw(st.sampled_from([1, 1, 2]))
    cin, groups, group_size = (
        channel_block * draw(st.integers(1, 5)),
        draw(st.integers(1, 3)),
        draw(st.sampled_from([1, 2, 3, 8])),
    )
    kept = channel_block * draw(st.integers(1, cin // channel_block))
    return (
        (kh, kw, cin, groups * group_size),
        group_size,
        kept,
        draw(st.integers(1, kh * kw)),
        channel_block,
    )


@functools.partial(jax.jit, static_argnums=2)
def both_ways(kernel, layout, dtype):
    kernel = kernel.astype(dtype)
    packed = bsj.pack(kernel, layout)
    gradient = jax.grad(lambda k: jnp.sum(bsj.pack(k, layout).astype(jnp.float32) ** 2))(kernel)
    return (
        kernel,
        packed,
        bsj.unpack(packed, layout),
        bsj.pack(bsj.unpack(packed, layout), layout),
        gradient,
    )


def check_packing(layout, dtype, seed):
    mask = np.asarray(mask_of(layout))
    kernel = np.random.default_rng(seed).normal(size=layout.shape).astype(np.float32)
    kernel, packed, unpacked, again, gradient = both_ways(kernel, layout, dtype)
    assert packed.shape == layout.packed_shape
    assert packed.dtype == kernel.dtype == dtype
    np.testing.assert_array_equal(unpacked, np.where(mask, kernel, 0))
    np.testing.assert_array_equal(again, packed)
    assert not np.any(np.asarray(gradient, np.float32)[~mask])


@settings(deadline=None, max_examples=30)
@given(layouts(), st.sampled_from([jnp.float32, jnp.bfloat16]), st.integers(0, 99))
def test_pack_and_unpack_are_inverse(layout, dtype, seed):
    check_packing(layout, dtype, seed)


def check_partition(layout):
    bsj.validate(layout)
    kh, kw, cin, cout = layout.shape
    mask = np.asarray(mask_of(layout)).reshape(kh * kw, cin, cout)
    times_in_a_group = np.zeros(cout, int)
    for filters, channels, taps in zip(
        *(np.asarray(a) for a in (layout.filters, layout.channels, layout.taps)), strict=True
    ):
        times_in_a_group[filters] += 1
        block = mask[:, :, filters]
        assert (block.any((0, 2)).sum(), block.any((1, 2)).sum()) == layout.packed_shape[1:3]
        assert block.all(2).sum() == block.any(2).sum() == len(channels) * len(taps)
    assert (times_in_a_group == 1).all()
    assert mask.mean() == pytest.approx(layout.density)
    again = bsj.mask_to_layout(mask.reshape(layout.shape), layout.filters)
    for name in ("filters", "channels", "taps"):
        np.testing.assert_array_equal(getattr(again, name), getattr(layout, name))
    read = bsj.mask_to_layout(mask.reshape(layout.shape))  # groups of equal masks are merged
    np.testing.assert_array_equal(mask_of(read), mask.reshape(layout.shape))


@settings(deadline=None, max_examples=30)
@given(layouts())
def test_a_layout_is_a_partition_with_exact_counts(layout):
    check_partition(layout)


@pytest.mark.slow
@settings(deadline=None, max_examples=60)
@given(layouts(any_sizes()), st.sampled_from([jnp.float32, jnp.bfloat16]))
def test_laws_of_layouts_of_any_size(layout, dtype):
    check_packing(layout, dtype, 0)
    check_partition(layout)


def _reference(x, kernel, mask, strides, padding, dilation):
    """Pads explicitly: where padding exceeds the kernel's reach, XLA's CPU gradient of a padded
    convolution reads memory that was never written (jax 0.10.2).
    """
    if not isinstance(padding, str):
        x, padding = jnp.pad(x, ((0, 0), *padding, (0, 0))), "VALID"
    return lax.conv_general_dilated(
        x,
        jnp.where(mask, kernel, 0),
        strides,
        padding,
        rhs_dilation=dilation,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        precision="highest",
    )


def _assert_close(actual, expected, tolerance, what):
    """Equal shapes, and differences within a tolerance relative to the largest expected value."""
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    assert actual.shape == expected.shape, what
    largest = max(1.0, np.abs(expected).max(initial=0))
    assert np.abs(actual - expected).max(initial=0) <= tolerance * largest, what


@functools.partial(
    jax.jit,
    static_argnames=("strides", "padding", "dilation", "data_format", "form", "implementation"),
)
def _block_sparse(dy, x, kernel, layout, *, data_format, form, **options):
    if form == "full-gradient":
        options["kernel_gradient"] = "dense"

    def function(x, kernel):
        if data_format == "CHWN":
            x = x.transpose(3, 1, 2, 0)
        kernel = bsj.pack(kernel, layout) if form == "packed" else kernel
        y = bsj.conv(x, kernel, layout, packed=form == "packed", data_format=data_format, **options)
        return y.transpose(3, 1, 2, 0) if data_format == "CHWN" else y

    y, pull = jax.vjp(function, x, kernel)
    return y, *pull(dy.astype(y.dtype))


@functools.partial(jax.jit, static_argnames=("strides", "padding", "dilation"))
def _masked_dense(dy, x, kernel, mask, **options):
    y, pull = jax.vjp(lambda x, kernel: _reference(x, kernel, mask, **options), x, kernel)
    return y, *pull(dy)


def check_conv(
    layout,
    size,
    batch,
    strides,
    dilation,
    padding,
    data_format,
    form,
    dtype,
    implementation,
    seed=2,
):
    """Every option of `conv` against `lax.conv_general_dilated` on masked weights; the reference
    runs in float32.
    """
    rng, window = (
        np.random.default_rng(seed),
        {"strides": strides, "padding": padding, "dilation": dilation},
    )
    kernel, x = (
        jnp.asarray(rng.normal(size=s), dtype)
        for s in (layout.shape, (batch, *size, layout.shape[2]))
    )
    mask = mask_of(layout)
    wide = x.astype(jnp.float32), kernel.astype(jnp.float32)
    shape = jax.eval_shape(functools.partial(_reference, **window), *wide, mask).shape
    dy = jnp.asarray(rng.normal(size=shape), dtype)
    y, dx, dkernel = _block_sparse(
        dy,
        x,
        kernel,
        layout,
        data_format=data_format,
        form=form,
        implementation=implementation,
        **window,
    )
    dy = dy.astype(jnp.float32)
    expected_y, expected_dx, expected_dkernel = _masked_dense(dy, *wide, mask, **window)
    if form == "full-gradient":
        _, _, expected_dkernel = _masked_dense(dy, *wide, jnp.ones_like(mask), **window)
    tolerance = 1e-5 if dtype == jnp.float32 else 2e-2
    assert (y.dtype, dx.dtype, dkernel.dtype) == (dtype, dtype, dtype)
    _assert_close(y, expected_y, tolerance, "values")
    _assert_close(dx, expected_dx, tolerance, "input gradient")
    _assert_close(dkernel, expected_dkernel, tolerance, "kernel gradient")
    if form != "full-gradient":
        assert not np.any(np.asarray(dkernel, np.float32)[~np.asarray(mask)])


# sizes of the layout, image, batch, strides, dilation, padding, data format, form, dtype,
# implementation: every value of each occurs, and many pairs of values
CONVS = [
    (SIZES[0], (5, 9), 2, (2, 1), (1, 2), "SAME", "NHWC", "dense", jnp.float32, None),
    (SIZES[0], (8, 6), 5, (1, 1), (1, 1), ((0, 2), (1, 0)), "CHWN", "packed", jnp.bfloat16, "xla"),
    (
        SIZES[0],
        (7, 7),
        1,
        (1, 3),
        (2, 1),
        ((3, 1), (0, 4)),
        "CHWN",
        "full-gradient",
        jnp.float32,
        "xla",
    ),
    (SIZES[1], (6, 5), 5, (3, 2), (2, 2), "VALID", "CHWN", "packed", jnp.float32, None),
    (SIZES[1], (9, 8), 1, (1, 1), (1, 1), "SAME", "NHWC", "full-gradient", jnp.bfloat16, "dense"),
    (SIZES[2], (8, 9), 2, (1, 2), (2, 1), "VALID", "NHWC", "packed", jnp.float32, "xla"),
    (
        SIZES[2],
        (6, 6),
        5,
        (2, 2),
        (1, 1),
        ((0, 2), (1, 0)),
        "NHWC",
        "full-gradient",
        jnp.float32,
        None,
    ),
    (SIZES[3], (9, 5), 1, (3, 1), (1, 1), "SAME", "CHWN", "dense", jnp.bfloat16, None),
    (SIZES[3], (7, 8), 2, (1, 1), (2, 2), ((3, 1), (0, 4)), "NHWC", "packed", jnp.float32, "dense"),
    (SIZES[4], (5, 5), 2, (2, 3), (1, 2), ((3, 1), (0, 4)), "CHWN", "dense", jnp.float32, "xla"),
    (SIZES[5], (6, 8), 5, (1, 1), (2, 1), "VALID", "CHWN", "dense", jnp.float32, "dense"),
]


@pytest.mark.parametrize(
    "case",
    CONVS,
    ids=lambda case: "-".join(map(str, (*case[0][0], *case[6:8], case[8].__name__, case[9]))),
)
def test_conv_and_its_gradients_equal_masked_dense(case):
    for seed in range(3):
        check_conv(drawing(*case[0])(jax.random.key(seed)), *case[1:], seed=seed)


OPTIONS = {
    "size": st.tuples(st.integers(5, 9), st.integers(5, 9)),
    "batch": st.sampled_from([1, 2, 5]),
    "strides": st.tuples(st.integers(1, 3), st.integers(1, 3)),
    "dilation": st.tuples(st.integers(1, 2), st.integers(1, 2)),
    "padding": st.sampled_from(["SAME", "VALID", ((0, 2), (1, 0)), ((3, 1), (0, 4))]),
    "data_format": st.sampled_from(["NHWC", "CHWN"]),
    "form": st.sampled_from(["dense", "packed", "full-gradient"]),
    "dtype": st.sampled_from([jnp.float32, jnp.float32, jnp.bfloat16]),
    "implementation": st.sampled_from([None, "xla", "dense"]),
}


@settings(deadline=None, max_examples=8)
@given(layout=layouts(), **OPTIONS)
def test_conv_over_all_the_options_equals_masked_dense(**case):
    """Each example compiles its own convolutions; the layouts' sizes are those of the other laws,
    which need not compile again.
    """
    check_conv(**case)


@pytest.mark.slow
@settings(deadline=None, max_examples=100)
@given(layout=layouts(any_sizes()), **OPTIONS)
def test_conv_of_any_size_equals_masked_dense(**case):
    check_conv(**case)


def test_dense_kernel_gradient_is_the_full_one():
    x, kernel = (
        jax.random.normal(jax.random.key(0), (2, 7, 9, 4)),
        jax.random.normal(jax.random.key(1), (3, 2, 4, 6)),
    )
    options = {"strides": (2, 1), "padding": ((1, 0), (2, 1)), "dilation": (1, 2)}
    y, pull = jax.vjp(lambda k: bsj.conv(x, k, bsj.Dense(), **options), kernel)
    dy = jax.random.normal(jax.random.key(2), y.shape)
    np.testing.assert_allclose(
        bsj.dense_kernel_gradient(x, dy, (3, 2), **options), pull(dy)[0], rtol=1e-5, atol=1e-5
    )
    chwn = bsj.dense_kernel_gradient(
        x.transpose(3, 1, 2, 0), dy.transpose(3, 1, 2, 0), (3, 2), data_format="CHWN", **options
    )
    np.testing.assert_allclose(chwn, pull(dy)[0], rtol=1e-4, atol=1e-4)


def test_new_layouts_of_one_shape_do_not_recompile():
    traces = []

    @jax.jit
    def step(x, kernel, layout):
        traces.append(1)
        return bsj.conv(x, kernel, layout)

    x, kernel = jnp.ones((1, 6, 6, 8)), jax.random.normal(jax.random.key(0), (3, 3, 8, 8))
    for seed in range(4):
        layout = drawing((3, 3, 8, 8), 4, 3, 4, 1)(jax.random.key(seed))
        expected = _reference(x, kernel, bsj.layout_to_mask(layout), (1, 1), "SAME", (1, 1))
        np.testing.assert_allclose(step(x, kernel, layout), expected, rtol=1e-5, atol=1e-5)
    assert len(traces) == 1


def test_the_choice_has_a_reason_for_each_mode():
    layout = bsj.random_groups(
        jax.random.key(0), (3, 3, 64, 64), group_size=32, kept=19, kept_taps=3
    )
    choice = bsj.choose_implementation(jnp.ones((2, 8, 8, 64)), layout)
    assert bsj.available_implementations()[choice.implementation] is None
    assert choice.reason
    assert set(choice.details) == {"forward", "forward + gradients"}
