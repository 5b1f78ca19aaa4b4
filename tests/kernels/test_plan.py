"""The plan: its lists against the kept weights, one by one, and what belongs to no layout."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.block_sparse_conv import Index, block_sparse_conv, make_plan, why_no_plan
from pallas_kernels.block_sparse_conv.plan import Plan, plan_sizes

KERNEL_SHAPES = {
    "groups of 64, runs of 16": ((3, 3, 128, 128), 2, 48, 4, 16),
    "groups of 128, runs of 64": ((3, 3, 192, 128), 1, 128, 3, 64),
    "ragged groups, single channels": ((2, 4, 17, 120), 5, 7, 5, 1),
    "ragged stages, runs of 24": ((3, 3, 72, 80), 1, 48, 9, 24),
    "runs of 96": ((1, 3, 192, 40), 2, 96, 2, 96),
    "1x1": ((1, 1, 256, 64), 4, 64, 1, 8),
    "all kept": ((5, 2, 16, 16), 2, 16, 10, 16),
}


def index_of(kernel_shape, groups, kept, kept_taps, run, seed=0):
    """Random filters, channels in runs, and taps."""
    kh, kw, cin, cout = kernel_shape
    rng = np.random.default_rng(seed)
    runs = np.stack([np.sort(rng.permutation(cin // run)[: kept // run]) for _ in range(groups)])
    channels = (runs[:, :, None] * run + np.arange(run)).reshape(groups, kept)
    taps = np.stack([np.sort(rng.permutation(kh * kw)[:kept_taps]) for _ in range(groups)])
    return Index(rng.permutation(cout).reshape(groups, -1), channels, taps)


def kept_weights(index, kernel_shape):
    """Of each packed value, in order: its input channel, tap and filter."""
    weights = []
    for filters, channels, taps in zip(*index):
        for channel in channels:
            for tap in taps:
                weights += [(channel, *divmod(tap, kernel_shape[1]), f) for f in filters]
    return weights


def row(entry):
    """(channel, tap y, tap x) of an entry."""
    return entry >> 8, entry >> 4 & 15, entry & 15


@pytest.mark.parametrize("case", KERNEL_SHAPES)
def test_the_lists_name_every_kept_weight_once(case):
    kernel_shape, groups, kept, kept_taps, run = KERNEL_SHAPES[case]
    index = index_of(*KERNEL_SHAPES[case])
    make = jax.jit(make_plan, static_argnames=("kernel_shape", "channel_block"))
    plan = make(index, kernel_shape=kernel_shape, channel_block=run)
    group_size = index.filters.shape[1]
    sizes = plan_sizes(kernel_shape, (groups, kept, kept_taps, group_size), run)
    forward, rows, entries, places, bounds = (
        np.asarray(getattr(plan, field.name)) for field in dataclasses.fields(Plan)
    )
    weights = kept_weights(index, kernel_shape)

    np.testing.assert_array_equal(rows[:, :group_size], index.filters)
    assert (rows[:, group_size:] == -1).all()
    listed = [
        (*row(entry), f)
        for group in range(groups)
        for entry in forward[group, : kept * kept_taps]
        for f in index.filters[group]
    ]
    assert listed == weights
    assert (forward[:, kept * kept_taps :] == -1).all()

    found = []
    entries = entries.reshape(-1, sizes.depth)
    assert (entries[bounds[-1] :] == -1).all()
    assert (places[bounds[-1] :] == -1).all()
    assert len(entries) == len(places) == sizes.stages + 1 > bounds[-1]
    for segment, (start, stop) in enumerate(itertools.pairwise(bounds)):
        block, parity = divmod(segment, 4)
        for stage in range(start, stop):
            for slot, place in enumerate(places[stage]):
                if place < 0:
                    continue
                slice_of_kernel, part = divmod(int(place), sizes.parts)
                for m in range(sizes.run):
                    channel = block * sizes.block + slot * sizes.run + m
                    first = (slice_of_kernel + m * kept_taps) * group_size + part * sizes.depth
                    for k, entry in enumerate(entries[stage]):
                        if entry < 0:
                            assert part * sizes.depth + k >= group_size
                            continue
                        filter_, y, x = row(entry)
                        assert parity == y % 2 * 2 + x % 2
                        assert weights[first + k] == (channel, y, x, filter_)
                        found.append(first + k)
    assert sorted(found) == list(range(len(weights))), "each weight takes part once"


@jax.disable_jit(False)
def test_new_masks_do_not_compile_again():
    case = KERNEL_SHAPES["groups of 64, runs of 16"]
    make = jax.jit(lambda index: make_plan(index, kernel_shape=case[0], channel_block=case[-1]))
    plans = [make(index_of(*case, seed=seed)) for seed in range(2)]
    assert make._cache_size() == 1
    assert not np.array_equal(plans[0].entries, plans[1].entries)


def test_a_plan_must_fit_the_convolution():
    kernel_shape, groups, kept, kept_taps, run = KERNEL_SHAPES["groups of 64, runs of 16"]
    index = index_of(kernel_shape, groups, kept, kept_taps, run)
    plan = make_plan(index, kernel_shape=kernel_shape, channel_block=run)
    sizes = (128, 4, 4, 1), (groups, kept, kept_taps, 64)
    x, values = (jnp.ones(s, jnp.float32) for s in sizes)

    def convolve(plan, **options):
        options = {"kernel_shape": kernel_shape, "channel_block": run} | options
        return block_sparse_conv(x, values, *index, plan=plan, implementation="xla", **options)

    np.testing.assert_array_equal(convolve(plan), convolve(None))
    for wrong, message in (
        (dataclasses.replace(plan, bounds=plan.bounds[:-1]), r"plan.bounds: expected int32\[9\]"),
        (
            dataclasses.replace(plan, entries=plan.entries.astype(jnp.float32)),
            r"plan.entries: expected int32\[1088\] .*, got float32\[1088\]; make the plan from",
        ),
        (index, "plan: expected a Plan or None, got Index"),
    ):
        with pytest.raises(ValueError, match=message):
            convolve(wrong)
    with pytest.raises(ValueError, match=r"plan.weights: expected int32\[17, 8\] .*_block=8, got"):
        convolve(plan, channel_block=8)


def test_kernels_that_are_too_large_have_no_plan():
    assert why_no_plan((16, 16, 8, 8)) is None
    assert why_no_plan((1, 1, 1 << 24, 8)) == "takes up to 8388608 channels, got 16777216"
    index = Index(np.array([[0]]), np.array([[0]]), np.array([[16]]))
    with pytest.raises(ValueError, match="kernel_shape: a plan takes kernels up to 16 pixels"):
        make_plan(index, kernel_shape=(17, 1, 1, 1))
