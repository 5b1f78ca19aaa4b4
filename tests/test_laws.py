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


@st.composite
def layouts(draw, max_kernel=3):
    """Any layout: rectangular kernels, 1x1, aligned runs of channels, everything kept or next to nothing."""
    kh, kw = draw(st.integers(1, max_kernel)), draw(st.integers(1, max_kernel))
    channel_block = draw(st.sampled_from([1, 1, 2]))
    cin, groups, group_size = channel_block * draw(st.integers(1, 5)), draw(st.integers(1, 3)), draw(st.sampled_from([1, 2, 3, 8]))
    kept = channel_block * draw(st.integers(1, cin // channel_block))
    kept_taps = draw(st.integers(1, kh * kw))
    key = jax.random.key(draw(st.integers(0, 2**16)))
    shape = (kh, kw, cin, groups * group_size)
    return bsj.random_groups(key, shape, group_size=group_size, kept=kept, kept_taps=kept_taps, channel_block=channel_block)


@settings(deadline=None, max_examples=10)
@given(layouts(), st.sampled_from([jnp.float32, jnp.bfloat16]))
def test_pack_and_unpack_are_inverse(layout, dtype):
    kernel = jax.random.normal(jax.random.key(1), layout.shape, dtype)
    mask = bsj.layout_to_mask(layout)

    @jax.jit
    def both_ways(kernel):
        packed = bsj.pack(kernel, layout)
        gradient = jax.grad(lambda k: jnp.sum(bsj.pack(k, layout).astype(jnp.float32) ** 2))(kernel)
        return packed, bsj.unpack(packed, layout), bsj.pack(bsj.unpack(packed, layout), layout), gradient

    packed, unpacked, again, gradient = both_ways(kernel)
    assert packed.shape == layout.packed_shape
    assert packed.dtype == kernel.dtype
    np.testing.assert_array_equal(unpacked, np.where(mask, kernel, 0))
    np.testing.assert_array_equal(again, packed)
    assert not np.any(np.asarray(gradient, np.float32)[~np.asarray(mask)])


@settings(deadline=None, max_examples=10)
@given(layouts())
def test_a_layout_is_a_partition_with_exact_counts(layout):
    bsj.validate(layout)
    kh, kw, cin, cout = layout.shape
    mask = np.asarray(bsj.layout_to_mask(layout)).reshape(kh * kw, cin, cout)
    seen = np.zeros(cout, int)
    for filters, channels, taps in zip(*(np.asarray(a) for a in (layout.filters, layout.channels, layout.taps)), strict=True):
        seen[filters] += 1
        block = mask[:, :, filters]
        assert (block.any((0, 2)).sum(), block.any((1, 2)).sum()) == layout.packed_shape[1:3]
        assert block.all(2).sum() == block.any(2).sum() == len(channels) * len(taps)
    assert (seen == 1).all()
    assert mask.mean() == pytest.approx(layout.density)
    again = bsj.mask_to_layout(mask.reshape(layout.shape), layout.filters)
    for name in ("filters", "channels", "taps"):
        np.testing.assert_array_equal(getattr(again, name), getattr(layout, name))
    np.testing.assert_array_equal(bsj.layout_to_mask(bsj.mask_to_layout(mask.reshape(layout.shape))), mask.reshape(layout.shape))


def _reference(x, kernel, mask, strides, padding, dilation):
    return lax.conv_general_dilated(
        x, jnp.where(mask, kernel, 0), strides, padding, rhs_dilation=dilation,
        dimension_numbers=("NHWC", "HWIO", "NHWC"), precision="highest",
    )  # fmt: skip


def _close(got, want, tolerance, what):
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    assert got.shape == want.shape, what
    assert np.abs(got - want).max(initial=0) <= tolerance * max(1.0, np.abs(want).max(initial=0)), what


@settings(deadline=None, max_examples=12)
@given(
    layout=layouts(),
    size=st.tuples(st.integers(5, 9), st.integers(5, 9)),
    batch=st.sampled_from([1, 2, 5]),
    strides=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    dilation=st.tuples(st.integers(1, 2), st.integers(1, 2)),
    padding=st.sampled_from(["SAME", "VALID", ((0, 2), (1, 0)), ((3, 1), (0, 4))]),
    data_format=st.sampled_from(["NHWC", "CHWN"]),
    form=st.sampled_from(["dense", "packed", "full-gradient"]),
    dtype=st.sampled_from([jnp.float32, jnp.float32, jnp.bfloat16]),
    implementation=st.sampled_from([None, "xla", "dense"]),
)
def test_conv_and_its_gradients_equal_masked_dense(
    layout, size, batch, strides, dilation, padding, data_format, form, dtype, implementation
):
    """Every option of the door against `lax.conv_general_dilated` on masked weights; the reference runs in float32."""
    keys = jax.random.split(jax.random.key(2), 3)
    kernel = jax.random.normal(keys[0], layout.shape, dtype)
    x = jax.random.normal(keys[1], (batch, *size, layout.shape[2]), dtype)
    mask = bsj.layout_to_mask(layout)
    tolerance = 1e-5 if dtype == jnp.float32 else 2e-2
    options = {"strides": strides, "padding": padding, "dilation": dilation, "implementation": implementation, "data_format": data_format}
    if form == "full-gradient":
        options["kernel_gradient"] = "dense"

    def ours(x, kernel):
        if data_format == "CHWN":
            x = x.transpose(3, 1, 2, 0)
        y = bsj.conv(x, bsj.pack(kernel, layout) if form == "packed" else kernel, layout, packed=form == "packed", **options)
        return y.transpose(3, 1, 2, 0) if data_format == "CHWN" else y

    def reference(x, kernel):
        return _reference(x, kernel, mask, strides, padding, dilation)

    @functools.partial(jax.jit, static_argnums=0)
    def with_gradients(function, dy, *arguments):
        y, pull = jax.vjp(function, *arguments)
        return y, *pull(dy.astype(y.dtype))

    wide = x.astype(jnp.float32), kernel.astype(jnp.float32)
    dy = jax.random.normal(keys[2], jax.eval_shape(reference, *wide).shape, dtype)
    y, dx, dkernel = with_gradients(ours, dy, x, kernel)
    want, want_dx, want_dkernel = with_gradients(reference, dy, *wide)
    if form == "full-gradient":
        whole = functools.partial(_reference, mask=True, strides=strides, padding=padding, dilation=dilation)
        _, _, want_dkernel = with_gradients(whole, dy, *wide)
    assert (y.dtype, dx.dtype, dkernel.dtype) == (dtype, dtype, dtype)
    _close(y, want, tolerance, "values")
    _close(dx, want_dx, tolerance, "input gradient")
    _close(dkernel, want_dkernel, tolerance, "kernel gradient")
    if form != "full-gradient":
        assert not np.any(np.asarray(dkernel, np.float32)[~np.asarray(mask)])


def test_dense_kernel_gradient_is_the_full_one():
    x, kernel = jax.random.normal(jax.random.key(0), (2, 7, 9, 4)), jax.random.normal(jax.random.key(1), (3, 2, 4, 6))
    options = {"strides": (2, 1), "padding": ((1, 0), (2, 1)), "dilation": (1, 2)}
    y, pull = jax.vjp(lambda k: bsj.conv(x, k, bsj.Dense(), **options), kernel)
    dy = jax.random.normal(jax.random.key(2), y.shape)
    np.testing.assert_allclose(bsj.dense_kernel_gradient(x, dy, (3, 2), **options), pull(dy)[0], rtol=1e-5, atol=1e-5)
    chwn = bsj.dense_kernel_gradient(x.transpose(3, 1, 2, 0), dy.transpose(3, 1, 2, 0), (3, 2), data_format="CHWN", **options)
    np.testing.assert_allclose(chwn, pull(dy)[0], rtol=1e-4, atol=1e-4)


def test_new_layouts_of_one_shape_do_not_recompile():
    traces = []

    @jax.jit
    def step(x, kernel, layout):
        traces.append(1)
        return bsj.conv(x, kernel, layout)

    x, kernel = jnp.ones((1, 6, 6, 8)), jax.random.normal(jax.random.key(0), (3, 3, 8, 8))
    for seed in range(4):
        layout = bsj.random_groups(jax.random.key(seed), (3, 3, 8, 8), group_size=4, kept=3, kept_taps=4)
        want = _reference(x, kernel, bsj.layout_to_mask(layout), (1, 1), "SAME", (1, 1))
        np.testing.assert_allclose(step(x, kernel, layout), want, rtol=1e-5, atol=1e-5)
    assert len(traces) == 1


def test_the_choice_can_be_told():
    layout = bsj.random_groups(jax.random.key(0), (3, 3, 64, 64), group_size=32, kept=19, kept_taps=3)
    choice = bsj.choose_implementation(jnp.ones((2, 8, 8, 64)), layout)
    assert bsj.available_implementations()[choice.implementation] is None
    assert choice.reason
    assert set(choice.details) == {"forward", "forward + gradients"}
