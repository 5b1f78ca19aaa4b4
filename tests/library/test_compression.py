"""Deep Compression: k-means, trained centroids, and codes that give every bit back."""

import collections
import heapq

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sparse_methods import noise, small_tree

import blocksparse_jax as bsj
from blocksparse_jax.compression import huffman
from blocksparse_jax.compression.share import k_means


def lloyd(values, count):
    """K-means as the paper has it, in plain NumPy."""
    centroids = np.linspace(values.min(), values.max(), count)
    while True:
        labels = np.abs(values[:, None] - centroids).argmin(1)
        moved = centroids.copy()
        for i in set(labels):
            moved[i] = values[labels == i].mean()
        if np.array_equal(moved, centroids):
            return centroids, labels
        centroids = moved


@pytest.mark.parametrize(
    "values",
    [
        np.random.default_rng(0).normal(size=700),
        np.random.default_rng(1).standard_cauchy(size=300),  # clusters without any value
        np.full(9, 0.25),
        np.array([-1.0, 1.0]),
        np.repeat([3.0, 4.0, 8.0], [50, 1, 50]),
    ],
)
@pytest.mark.parametrize("count", [1, 2, 8, 32])
def test_k_means_is_that_of_lloyd_from_equal_distances(values, count):
    centroids, labels = k_means(values, count)
    expected, expected_labels = lloyd(values, count)
    np.testing.assert_allclose(centroids, expected, rtol=1e-9)
    np.testing.assert_allclose(centroids[labels], expected[expected_labels], rtol=1e-9)


def test_shared_weights_take_few_values_near_their_own_and_pruned_ones_stay_zero():
    params = small_tree()
    masks = bsj.masks_from_scores(jax.tree.map(jnp.abs, params), 0.7)
    params = bsj.apply_masks(params, masks)
    shared = bsj.share_weights(params, masks, conv_bits=3, dense_bits=2)
    for name, bits in (("stem", 3), ("conv1", 3), ("conv2", 3), ("classifier", 2)):
        before, after = (np.asarray(tree[name]["kernel"]) for tree in (params, shared.params))
        clusters = np.asarray(shared.clusters[name]["kernel"])
        np.testing.assert_array_equal(clusters < 0, before == 0)
        np.testing.assert_array_equal(after == 0, before == 0)
        values = np.unique(after[clusters >= 0])
        assert 2 <= values.size <= 2**bits
        kept = before[clusters >= 0]
        nearest = values[np.abs(kept[:, None] - values).argmin(1)]
        np.testing.assert_allclose(after[clusters >= 0], nearest, rtol=1e-6)
        assert set(clusters.ravel()) - {-1} == set(range(values.size))
    np.testing.assert_array_equal(shared.params["conv1"]["bias"], params["conv1"]["bias"])
    assert shared.clusters["conv1"]["bias"].tolist() == -1


def test_a_kept_zero_shares_a_value_where_the_masks_say_so():
    params, masks = {"w": jnp.array([[0.0, 0.0, 1.0]])}, {"w": jnp.array([[True, False, True]])}
    shared = bsj.share_weights(params, masks, dense_bits=1)
    assert shared.clusters["w"].tolist() == [[0, -1, 1]]


def test_what_cannot_share_is_named():
    with pytest.raises(ValueError, match="expected finite weights at 'w'"):
        bsj.share_weights({"w": jnp.array([[1.0, jnp.nan]])})
    with pytest.raises(ValueError, match="conv_bits: expected 1 to 16 bits, got 17"):
        bsj.share_weights({"w": jnp.ones((2, 2))}, conv_bits=17)
    with pytest.raises(ValueError, match="outside of jit"):
        jax.jit(bsj.share_weights)({"w": jnp.ones((2, 2))})
    with pytest.raises(ValueError, match="found none"):
        bsj.set_clusters(optax.sgd(0.1).init({"w": jnp.ones((2, 2))}), {"w": 0})
    state = bsj.shared_weights(optax.sgd(0.1)).init({"w": jnp.ones((2, 2))})
    with pytest.raises(ValueError, match="clusters: expected shape"):
        bsj.set_clusters(state, {"w": jnp.zeros((2, 3), jnp.int32)})
    with pytest.raises(ValueError, match="inner: expected an optax transformation"):
        bsj.shared_weights(0.1)


@pytest.mark.parametrize(
    "optimizer",
    [optax.sgd(0.05, momentum=0.9), optax.chain(optax.add_decayed_weights(0.1), optax.adam(0.05))],
    ids=["momentum", "adam"],
)
def test_centroids_train_as_parameters_of_their_own(optimizer):
    """The same optimizer on the centroids, whose gradient is the chain rule's: `w = c[numbers]`."""
    numbers = np.array([[0, 1, 2, 1, -1], [2, 2, 0, -1, 1]])
    centroids = jnp.array([-1.0, 0.5, 2.0])
    pull = jnp.asarray(np.random.default_rng(0).normal(size=numbers.shape).astype(np.float32))

    def weights(centroids):
        return jnp.where(numbers < 0, 0.0, centroids[numbers])

    def loss(w):
        return jnp.sum(jnp.square(w - pull) * (1 + pull**2))

    params = {"w": weights(centroids)}
    tx = bsj.shared_weights(optimizer, bits=2)
    state = bsj.set_clusters(tx.init(params), {"w": jnp.asarray(numbers)})
    reference = optimizer.init(centroids)
    masked = jnp.asarray(numbers >= 0)
    for _ in range(12):
        grads = {"w": jnp.where(masked, jax.grad(loss)(params["w"]), 0)}
        updates, state = jax.jit(tx.update)(grads, state, params)
        params = optax.apply_updates(params, updates)
        slope = jax.grad(lambda c: loss(weights(c)))(centroids)
        updates, reference = optimizer.update(slope, reference, centroids)
        centroids = optax.apply_updates(centroids, updates)
        np.testing.assert_allclose(params["w"], weights(centroids), rtol=2e-5, atol=1e-6)


def test_weights_of_a_cluster_stay_equal_to_the_last_bit_and_pruned_ones_zero():
    """With moments from before they shared, which differ from weight to weight."""
    params = small_tree()
    method = bsj.deep_compression(0.7, schedule=bsj.between(0, 2, every=1))
    tx = bsj.sparse(method, bsj.shared_weights(optax.adamw(0.01), bits=4))
    state = tx.init(params)
    update = jax.jit(tx.update)
    for step in range(8):
        if step == 4:
            masks = bsj.get_masks(state)
            shared = bsj.share_weights(params, masks, conv_bits=4, dense_bits=3)
            params, state = shared.params, bsj.set_clusters(state, shared.clusters)
        updates, state = update(noise(params, step), state, params)
        moved = optax.apply_updates(params, updates)
        if step < 4:
            assert np.unique(moved["conv2"]["kernel"]).size > 200
        params = moved
    for name in ("stem", "conv1", "conv2", "classifier"):
        clusters, after = shared.clusters[name]["kernel"], np.asarray(params[name]["kernel"])
        for number in range(int(clusters.max()) + 1):
            assert np.unique(after[clusters == number]).size == 1
        np.testing.assert_array_equal(after[clusters < 0], 0)
    assert int(bsj.nonzero_pruned(params, state)) == 0
    assert bsj.compress(params).rate > 8


DTYPES = [np.float32, np.float16, ml_dtypes.bfloat16, np.int32, np.int8, np.bool_]


@st.composite
def arrays(draw):
    """Few values, many zeros, long gaps; NaN and -0.0 among them."""
    dtype = draw(st.sampled_from(DTYPES))
    shape = tuple(draw(st.lists(st.integers(0, 40), max_size=3)))
    size = int(np.prod(shape))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    values = [0.0, 1.0, -0.0, 3.0] + ([np.nan, np.inf] if np.dtype(dtype).kind in "fV" else [])
    book = np.array(draw(st.lists(st.sampled_from(values), min_size=1, max_size=5))).astype(dtype)
    kept = rng.random(size) < draw(st.sampled_from([0.0, 0.001, 0.05, 0.5, 1.0]))
    return np.where(kept, book[rng.integers(0, book.size, size)], np.zeros(1, dtype)).reshape(shape)


def bits_of(array):
    array = np.asarray(array)
    return array.shape, str(array.dtype), array.tobytes()


@settings(max_examples=60, deadline=None)
@given(st.lists(arrays(), max_size=3))
def test_every_bit_comes_back(leaves):
    params = {"a": {str(i): leaf for i, leaf in enumerate(leaves)}, "b": np.arange(3.0, dtype="f4")}
    compressed = bsj.compress(params)
    decoded = bsj.decompress(compressed.data, params)
    for before, after in zip(jax.tree.leaves(params), jax.tree.leaves(decoded), strict=True):
        assert bits_of(before) == bits_of(after)
    assert sum(compressed.bits.values()) == 8 * len(compressed.data)
    assert compressed.bits_before == 8 * sum(leaf.nbytes for leaf in jax.tree.leaves(params))


def test_coded_leaves_come_back_through_all_kinds_of_gaps():
    """Large enough that coding pays: gaps of 0, just below, at and beyond what their bits hold."""
    for shape, longest in (((4, 4, 40, 40), 256), ((160, 160), 32)):
        gaps = [0, 1, longest - 2, longest - 1, longest, 2 * longest - 1, 2 * longest, 9 * longest]
        weights = np.zeros(np.prod(shape), np.float32)
        weights[np.cumsum(np.array(gaps) + 1) - 1] = [1, 2, 1, 3, 1, 1, 2, 5]
        weights[-1] = 7
        params = {"w": weights.reshape(shape)}
        compressed = bsj.compress(params)
        assert compressed.bits["uncoded"] == 0
        np.testing.assert_array_equal(bsj.decompress(compressed.data)["w"], params["w"])
        assert compressed.rate > 100


def huffman_bits(symbols):
    """The length of an optimal prefix code."""
    heap = sorted(collections.Counter(symbols).values())
    total = len(symbols) if len(heap) == 1 else 0
    while len(heap) > 1:
        pair = heapq.heappop(heap) + heapq.heappop(heap)
        total += pair
        heapq.heappush(heap, pair)
    return total


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 300), max_size=300) | st.lists(st.just(7), max_size=20))
def test_huffman_codes_are_optimal_and_exact(symbols):
    coded = huffman.encode(np.array(symbols, np.int64))
    assert len(coded.stream) == -(-huffman_bits(symbols) // 8)
    np.testing.assert_array_equal(huffman.decode(coded, len(symbols)), symbols)


@pytest.fixture(scope="module")
def data():
    shared = bsj.share_weights(small_tree(), conv_bits=3, dense_bits=3)
    return bsj.compress(shared.params).data


@settings(max_examples=40, deadline=None)
@given(place=st.floats(0, 1, exclude_max=True), change=st.integers(1, 255), cut=st.booleans())
def test_bytes_that_changed_or_are_missing_are_refused(data, place, change, cut):
    at = int(place * len(data))
    changed = data[:at] if cut else data[:at] + bytes([data[at] ^ change]) + data[at + 1 :]
    with pytest.raises(ValueError, match=r"^data: "):
        bsj.decompress(changed)


def test_another_network_is_refused(data):
    params = small_tree()
    assert jax.tree.structure(bsj.decompress(data)) == jax.tree.structure(params)
    params["conv2"]["kernel"] = jnp.ones((1, 1, 32, 31))
    with pytest.raises(ValueError, match=r"like: .* at 'conv2/kernel' the data hold"):
        bsj.decompress(data, params)
    with pytest.raises(ValueError, match="expected an array of numbers at 'k'"):
        bsj.compress({"k": jax.random.key(0)})


def test_without_bitarray_the_error_names_the_extra(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "bitarray", None)
    with pytest.raises(ImportError, match=r"pip install 'blocksparse-jax\[compression\]'"):
        bsj.compress({"w": jnp.eye(30)})


def test_the_rate_counts_all_parts():
    """A layer by hand: 1024 weights, every eighth kept, two values equally often."""
    weights = np.zeros((32, 32), np.float32)
    weights.reshape(-1)[7::8] = np.tile([1.5, -2.0], 64)
    compressed = bsj.compress({"w": weights})
    assert compressed.bits["codebooks"] == 2 * 32
    assert compressed.bits["gaps"] == 128  # one symbol, one bit each
    assert compressed.bits["values"] == 128
    assert compressed.bits["uncoded"] == 0
    assert compressed.bits_before == 32 * 1024
    assert compressed.rate == 32 * 1024 / sum(compressed.bits.values())
