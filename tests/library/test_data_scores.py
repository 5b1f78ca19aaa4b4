"""SNIP, GraSP and SynFlow are their NumPy references, to the mask, in float32 and float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import references as ref

import blocksparse_jax as bsj

RNG = np.random.default_rng(0)
WEIGHTS = {
    "conv": RNG.normal(size=(2, 2, 2, 4)) / 2,
    "dense": RNG.normal(size=(4, 3)) / 2,
}
IMAGES, LABELS = RNG.normal(size=(12, 3, 3, 2)), np.arange(12) // 4
SIZE = sum(leaf.size for leaf in WEIGHTS.values())
SPARSITIES = [0.0, 0.8, 0.99]
# So few weights cannot have every density.
pytestmark = pytest.mark.filterwarnings("ignore:sparsity. density .* cannot be reached")


def logits(xp, weights, images, normalise=True):
    """A convolution, batch norm by the statistics of these images, tanh, mean, a dense layer."""
    kernel = weights["conv"]
    y = sum(
        images[:, i : i + 2, j : j + 2] @ kernel[i, j]
        for i in range(kernel.shape[0])
        for j in range(kernel.shape[1])
    )
    if normalise:
        mean = y.mean((0, 1, 2), keepdims=True)
        variance = ((y - mean) ** 2).mean((0, 1, 2), keepdims=True)
        y = xp.tanh((y - mean) / xp.sqrt(variance + 1e-5))
    return y.mean((1, 2)) @ weights["dense"]


def cross_entropy(xp, weights, images, labels, temperature=1.0):
    scaled = logits(xp, weights, images) / temperature
    right = (scaled * xp.eye(3)[labels]).sum(1)
    return (xp.log(xp.exp(scaled).sum(1)) - right).mean()


def loss_fn(temperature=1.0):
    return lambda params, batch: cross_entropy(jnp, params, *batch, temperature)


def numpy_loss(images, labels, temperature=1.0):
    return lambda weights: cross_entropy(np, weights, images, labels, temperature)


@pytest.fixture(params=["float32", "float64"])
def as_arrays(request):
    """WEIGHTS and the batch in JAX, in each precision."""
    with jax.enable_x64(request.param == "float64"):
        cast = lambda tree: jax.tree.map(lambda leaf: jnp.asarray(leaf, request.param), tree)  # noqa: E731
        yield cast(WEIGHTS), (cast(IMAGES), LABELS)


def every_layer(name, leaf):
    return True


def drawn(scores, sparsity):
    return bsj.masks_from_scores(scores, sparsity, budget="global", where=every_layer)


def assert_scores(scores, expected):
    """Close to the reference, in the precision of the weights."""
    exact = scores["conv"].dtype == jnp.float64
    for name, score in scores.items():
        scale = np.abs(expected[name]).max()
        np.testing.assert_allclose(score, expected[name], atol=scale * (1e-7 if exact else 2e-5))


def assert_masks(masks, expected):
    for name, mask in masks.items():
        np.testing.assert_array_equal(mask, expected[name], err_msg=name)


def test_snip_is_its_reference_to_the_mask(as_arrays):
    weights, batch = as_arrays
    scores = bsj.snip(loss_fn(), weights, batch)
    assert scores["conv"].dtype == weights["conv"].dtype
    grads = ref.gradient(numpy_loss(IMAGES, LABELS), WEIGHTS)
    expected = ref.snip_scores(WEIGHTS, grads)
    assert_scores(scores, expected)
    for sparsity in SPARSITIES:
        count = round(SIZE * (1 - sparsity))
        assert_masks(drawn(scores, sparsity), ref.global_masks(expected, count))


@pytest.mark.parametrize("parts", [2, 4])
def test_grasp_is_its_reference_to_the_mask(as_arrays, parts):
    """Also the Hessian-vector product against finite differences: the reference has nothing else.
    Each part has batch statistics of its own.
    """
    weights, batch = as_arrays
    scores = bsj.grasp(loss_fn(200.0), weights, batch, parts=parts)
    assert scores["conv"].dtype == weights["conv"].dtype
    pieces = zip(np.split(IMAGES, parts), np.split(LABELS, parts), strict=True)
    expected = ref.grasp_scores([numpy_loss(*piece, 200.0) for piece in pieces], WEIGHTS)
    assert_scores(scores, expected)
    assert min(score.min() for score in expected.values()) < 0
    for sparsity in SPARSITIES:
        k = int(SIZE * sparsity)
        masks = drawn(scores, max(k - 1, 0) / SIZE)
        count = ref.grasp_count(SIZE, sparsity)
        assert count == SIZE - k + (k > 0)
        assert_masks(masks, ref.global_masks(expected, count))


def test_the_parts_of_grasp_have_statistics_of_their_own():
    weights, batch = jax.tree.map(jnp.float32, WEIGHTS), (jnp.float32(IMAGES), LABELS)
    whole, halves = (bsj.grasp(loss_fn(), weights, batch, parts=parts) for parts in (1, 2))
    assert not np.allclose(whole["conv"], halves["conv"], rtol=1e-2)


@pytest.mark.parametrize("rounds", [1, 20])
def test_synflow_is_its_reference_to_the_mask(as_arrays, rounds):
    weights, _ = as_arrays
    ones = np.ones((1, 3, 3, 2))

    def output(xp):
        return lambda params: logits(xp, params, ones, normalise=False).sum()

    for sparsity in SPARSITIES:
        scores = bsj.synflow(
            lambda params, images: output(jnp)(params),
            weights,
            None,
            sparsity=sparsity,
            rounds=rounds,
            where=every_layer,
        )
        assert scores["conv"].dtype == weights["conv"].dtype
        expected = ref.synflow_masks(output(np), WEIGHTS, sparsity, rounds)
        assert_masks(drawn(scores, sparsity), expected)


@pytest.mark.parametrize("kind", ["ties", "equal", "one channel"])
def test_snip_and_grasp_break_ties_by_index(kind):
    """Of halves of squares, whose gradient and Hessian are the weights and one: no score rounds.
    Zeros alone have no scores, and are refused.
    """
    shapes, rng = {"a": (1, 1, 4, 8), "b": (1, 1, 1, 8), "c": (1, 1)}, np.random.default_rng(0)
    draw = {
        "ties": lambda shape: rng.integers(-2, 3, shape),
        "equal": lambda shape: np.full(shape, 0.5),
        "one channel": lambda shape: np.ones(shape) * (np.arange(shape[-1]) == 1),
    }[kind]
    weights = {name: np.float32(draw(shape)) for name, shape in shapes.items()}

    def loss_fn(params, batch):
        return batch.mean() * sum(jnp.sum(leaf**2) / 2 for leaf in jax.tree.leaves(params))

    params, batch, size = jax.tree.map(jnp.asarray, weights), jnp.ones(4), 32 + 8 + 1
    expected = {name: weight.astype(float) ** 2 for name, weight in weights.items()}
    for scores in (bsj.snip(loss_fn, params, batch), bsj.grasp(loss_fn, params, batch)):
        for sparsity in SPARSITIES:
            count = round(size * (1 - sparsity))
            assert_masks(drawn(scores, sparsity), ref.global_masks(expected, count))
    for score in (bsj.snip, bsj.grasp):
        with pytest.raises(ValueError, match="not all zero"):
            score(loss_fn, jax.tree.map(jnp.zeros_like, params), batch)


def test_synflow_breaks_ties_by_index():
    """Equal weights, zeros and a layer of one weight; powers of two, so that no score rounds."""
    weights = {"a": np.full((1, 4), 0.5), "b": np.full((4, 2), 2.0), "c": np.ones((2, 1))}
    weights["b"][1] = 0.0

    def output(params, ones=None):
        return (np.ones((1, 1)) @ params["a"] @ params["b"] @ params["c"]).sum()

    params = jax.tree.map(jnp.float32, weights)
    for rounds, sparsity in ((3, 0.5), (7, 0.75)):
        scores = bsj.synflow(
            output, params, None, sparsity=sparsity, rounds=rounds, where=every_layer
        )
        expected = ref.synflow_masks(output, weights, sparsity, rounds)
        assert_masks(drawn(scores, sparsity), expected)


def test_synflow_prunes_only_the_chosen_layers():
    params = jax.tree.map(jnp.float32, WEIGHTS)
    scores = bsj.synflow(
        lambda p, x: logits(jnp, p, x, normalise=False).sum(),
        params,
        jnp.ones((1, 3, 3, 2)),
        sparsity=0.75,
        rounds=10,
        where=lambda name, leaf: name == "conv",
    )
    assert int((scores["conv"] > 0).sum()) < 32
    assert bool((scores["dense"] > 0).any())


def test_scores_refuse_what_they_cannot_use():
    params = jax.tree.map(jnp.float32, WEIGHTS)
    batch = (jnp.float32(IMAGES), LABELS)
    with pytest.raises(ValueError, match=r"batch: expected arrays with .* at least parts=13"):
        bsj.grasp(loss_fn(), params, batch, parts=13)
    with pytest.raises(ValueError, match=r"batch: expected arrays .* got first axes of \[12, 4\]"):
        bsj.grasp(loss_fn(), params, (batch[0], LABELS[:4]))
    with pytest.raises(ValueError, match=r"finite gradients .* a sum of \|w \* Hg\| of 0"):
        bsj.grasp(lambda p, x: p["dense"].sum(), params, batch)
    with pytest.raises(ValueError, match="loss_fn: expected one scalar"):
        bsj.synflow(lambda p, x: p["dense"], params, None, sparsity=0.5, where=every_layer)
    with pytest.raises(ValueError, match=r"\|w \* dR/dw\| of inf"):
        bsj.synflow(
            lambda p, x: (p["dense"] * 1e38).sum() * 1e5,
            params,
            None,
            sparsity=0.5,
            where=every_layer,
        )
    with pytest.raises(ValueError, match="rounds: expected"):
        bsj.synflow(loss_fn(), params, batch, sparsity=0.5, rounds=0)
