"""Scores of the weights of an untrained network, from its loss: SNIP, GraSP and SynFlow.

Each is a function `(loss_fn, params, batch) -> scores`, higher = keep, of every leaf of params.
"""

import functools
import itertools
import operator
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, PyTree

from blocksparse_jax import _checks, tree
from blocksparse_jax._dtypes import common_dtype
from blocksparse_jax.selection import highest

Loss = Callable[[PyTree, Any], Array]


def snip(loss_fn: Loss, params: PyTree, batch: Any) -> PyTree:
    """SNIP's connection sensitivity: `|w * dL/dw|` over one batch, divided by its sum.

    Args:
      loss_fn: (params, batch) -> scalar loss.
      params: the parameters at initialisation, any pytree of float arrays.
      batch: one batch, e.g. 100 examples.

    Returns:
      Scores in the params' structure, which add up to 1 over all leaves; float32, or float64 for
      float64 params. Give them to `masks_from_scores(scores, sparsity, budget="global")` or
      `one_shot(sparsity, scores=scores, budget="global")`; SNIP itself scores every layer, stem and
      classifier too (`where=lambda name, leaf: leaf.ndim > 1`).

    Raises:
      ValueError: a leaf of params holds no floats, the loss is no scalar, or it has no gradient at
        all or one that is not finite. Inside jit the last is not seen, and the scores are NaN.

    Example:
      >>> params = {"w": jnp.array([1.0, 2.0, 0.0])}
      >>> scores = snip(lambda p, x: jnp.sum(p["w"] * x), params, jnp.array([3.0, -1.0, 5.0]))
      >>> [round(float(score), 3) for score in scores["w"]]
      [0.6, 0.4, 0.0]

    Reference: Lee et al., "SNIP: single-shot network pruning based on connection sensitivity", ICLR
    2019.
    """
    _check_floats(params)
    grads = jax.jit(jax.grad(lambda params: _scalar(loss_fn)(params, batch)))(params)
    sizes = jax.tree.map(lambda w, g: jnp.abs(_wide(w) * _wide(g)), params, grads)
    total = _check_total(sizes, "|w * g|")
    return jax.tree.map(lambda leaf: leaf / total, sizes)


def grasp(loss_fn: Loss, params: PyTree, batch: Any, *, parts: int = 2) -> PyTree:
    """GraSP's scores `w * Hg`: what a weight does for the flow of the gradient.

    The batch is cut into parts, each with batch statistics of its own where the network has batch
    norm. With `L_i` the loss of a part, `g = sum_i dL_i/dw` is held constant, and `Hg = sum_i
    d(g . dL_i/dw)/dw`. The scores keep their signs.

    Args:
      loss_fn: (params, part of the batch) -> scalar loss, in training mode. The paper's is the
        cross-entropy of the logits divided by 200.
      params: the parameters at initialisation, any pytree of float arrays.
      batch: a pytree of arrays with the examples along their first axes. The paper's are 10 of
        each class, ordered by class.
      parts: how many runs of consecutive examples the batch is cut into.

    Returns:
      Scores in the params' structure, highest = keep; float32, or float64 for float64 params. Use
      them with `budget="global"` and `where=lambda name, leaf: leaf.ndim > 1`, since GraSP scores
      every layer. With `k = int(N * sparsity)` of N weights the authors keep `N - k + 1`, which is
      a sparsity of `(k - 1) / N` here.

    Raises:
      ValueError: a leaf of params holds no floats, the loss is no scalar, the batch cannot be cut,
        or the scores are all zero or not finite. Inside jit the last is not seen.

    Example:
      >>> loss = lambda p, x: jnp.sum(p["w"] ** 2 * x)  # g = 2 w sum(x), Hg = 2 sum(x) g
      >>> scores = grasp(loss, {"w": jnp.array([1.0, -2.0])}, jnp.array([[0.25], [0.25]]))
      >>> scores["w"].tolist()
      [1.0, 4.0]

    Reference: Wang et al., "Picking winning tickets before training by preserving gradient flow",
    ICLR 2020. The authors' code draws new weights for the dense layers before it scores them; this
    scores the weights that are trained.
    """
    _check_floats(params)
    pieces = _cut(batch, _checks.positive_int("parts", parts))
    loss = _scalar(loss_fn)

    gradient = jax.grad(loss)

    @jax.jit
    def product(params: PyTree, direction: PyTree, piece: Any) -> PyTree:
        return jax.jvp(lambda at: gradient(at, piece), (params,), (direction,))[1]

    # Pieces of one shape share a program.
    constant = _sum([jax.jit(gradient)(params, piece) for piece in pieces])
    products = _sum([product(params, constant, piece) for piece in pieces])
    scores = jax.tree.map(lambda w, h: _wide(w) * _wide(h), params, products)
    _check_total(jax.tree.map(jnp.abs, scores), "|w * Hg|")
    return scores


def synflow(
    loss_fn: Loss,
    params: PyTree,
    batch: Any,
    *,
    sparsity: float,
    rounds: int = 100,
    where: tree.Where | None = None,
) -> PyTree:
    """SynFlow's scores `|w * dR/dw|` of the last of many rounds of pruning; R needs no data.

    R is the sum of the network's outputs with the absolute value of every weight. Round e = 0, 1,
    ... scores the weights that are left and keeps the best `density^((e + 1) / rounds)` of all, at
    least one in each layer. The masks of the last round are those of the scores returned:
    `masks_from_scores(scores, sparsity, budget="global")`.

    Args:
      loss_fn: (params, batch) -> R, a scalar: the sum of the outputs in evaluation mode, with the
        absolute values of the network's buffers (batch statistics) too.
      params: the parameters at initialisation, any pytree of float arrays; their absolute values
        are taken here.
      batch: what loss_fn takes: one input of ones.
      sparsity: fraction of the chosen leaves' weights to remove, in [0, 1).
      rounds: of scoring and pruning.
      where: predicate (name, leaf) of the sparse leaves, default conv kernels except the stem;
        SynFlow itself prunes every layer (`where=lambda name, leaf: leaf.ndim > 1`).

    Returns:
      Scores in the params' structure, 0 for weights that an earlier round has pruned; float32, or
      float64 for float64 params. Use them with the same sparsity and `where`.

    Raises:
      ValueError: a leaf of params holds no floats, R is no scalar, an argument is out of range, or
        the scores are all zero or not finite: outputs of deep networks overflow float32, and
        float64 params do not. Inside jit the last is not seen.

    Example:
      >>> params = {"a": jnp.array([[-1.0, 2.0]]), "b": jnp.array([[3.0], [1.0]])}
      >>> output = lambda p, x: jnp.sum(x @ p["a"] @ p["b"])
      >>> ones, every = jnp.ones((1, 1)), lambda name, leaf: True
      >>> scores = synflow(output, params, ones, sparsity=0.5, rounds=2, where=every)
      >>> scores["a"].tolist(), scores["b"].tolist()
      ([[3.0, 0.0]], [[3.0], [0.0]])

    Reference: Tanaka et al., "Pruning neural networks without any data by iteratively conserving
    synaptic flow", NeurIPS 2020.
    """
    _check_floats(params)
    density = 1 - _checks.fraction("sparsity", sparsity)
    _checks.positive_int("rounds", rounds)
    chosen = tree.choose(where, params)
    size = sum(leaf.size for leaf in chosen.values())
    # The last round is that of the masks that are drawn from the scores.
    kept = [
        max(len(chosen), round(density ** ((e + 1) / rounds) * size)) for e in range(rounds - 1)
    ]
    loss = _scalar(loss_fn)
    weights = jax.tree.map(lambda leaf: jnp.abs(_wide(leaf)), params)

    def scores_under(masks: dict[str, Array]) -> PyTree:
        left = jax.tree.map_with_path(
            lambda path, leaf: jnp.where(masks.get(tree.path_name(path), True), leaf, 0), weights
        )
        return jax.tree.map(lambda w, g: jnp.abs(w * g), left, jax.grad(loss)(left, batch))

    def prune(masks: dict[str, Array], count: Array) -> tuple[dict[str, Array], None]:
        scores = scores_under(masks)
        named = {tree.path_name(path): leaf for path, leaf in jax.tree.leaves_with_path(scores)}
        return _best({name: named[name] for name in masks}, masks, count), None

    @jax.jit
    def last_scores() -> PyTree:
        counts = jnp.asarray(kept, jnp.int32)
        masks = {name: jnp.ones(leaf.shape, bool) for name, leaf in chosen.items()}
        return scores_under(jax.lax.scan(prune, masks, counts)[0])

    scores = last_scores()
    _check_total(scores, "|w * dR/dw|")
    return scores


def _best(
    scores: dict[str, Float[Array, "..."]], masks: dict[str, Bool[Array, "..."]], count: Array
) -> dict[str, Bool[Array, "..."]]:
    """The `count` highest scores of all layers among what the masks keep; each layer keeps one."""
    alive = [jnp.where(masks[name], leaf, -jnp.inf).reshape(-1) for name, leaf in scores.items()]
    flat = jnp.concatenate([layer.at[jnp.argmax(layer)].set(jnp.inf) for layer in alive])
    ends = np.cumsum([leaf.size for leaf in scores.values()])[:-1]
    parts = zip(scores.items(), jnp.split(highest(flat, count), ends), strict=True)
    return {name: part.reshape(leaf.shape) for (name, leaf), part in parts}


def _sum(trees: list[PyTree]) -> PyTree:
    """Leaf by leaf."""
    return functools.reduce(lambda a, b: jax.tree.map(operator.add, a, b), trees)


def _check_floats(params: PyTree) -> None:
    for path, leaf in jax.tree.leaves_with_path(params):
        if not jnp.issubdtype(jnp.result_type(leaf), jnp.floating):
            raise ValueError(
                f"params[{tree.path_name(path)!r}]: expected floats, got {jnp.result_type(leaf)}; "
                "leave it out of params, e.g. close over it in loss_fn"
            )


def _scalar(loss_fn: Loss) -> Loss:
    """The loss; ValueError where it is no scalar."""

    def scalar_loss(params: PyTree, batch: Any) -> Array:
        loss = loss_fn(params, batch)
        shapes = [jnp.shape(leaf) for leaf in jax.tree.leaves(loss)]
        if shapes != [()]:
            raise ValueError(
                f"loss_fn: expected one scalar, got values of shapes {shapes}; take the mean over "
                "the batch, and return the loss alone"
            )
        return loss

    return scalar_loss


def _wide(leaf: Array) -> Float[Array, "..."]:
    """In float32, or in float64 where it is."""
    return leaf.astype(common_dtype(leaf.dtype, jnp.float32))


def _cut(batch: Any, parts: int) -> list[Any]:
    """The batch in runs of examples, the last ones the longest."""
    lengths = [(*jnp.shape(leaf), None)[0] for leaf in jax.tree.leaves(batch)]
    length = lengths[0] if lengths else None
    if length is None or set(lengths) != {length} or length < parts:
        raise ValueError(
            f"batch: expected arrays with the same number of examples, at least parts={parts}, "
            f"along their first axes, got first axes of {lengths}"
        )
    ends = [i * length // parts for i in range(parts + 1)]
    return [
        jax.tree.map(lambda leaf, start=start, end=end: leaf[start:end], batch)
        for start, end in itertools.pairwise(ends)
    ]


def _check_total(sizes: PyTree, what: str) -> Array:
    """The sum of all sizes; ValueError unless it is positive and finite."""
    total = jax.tree.reduce(operator.add, jax.tree.map(jnp.sum, sizes))
    if not isinstance(total, jax.core.Tracer) and not 0 < float(total) < float("inf"):
        raise ValueError(
            f"loss_fn: expected a loss with finite gradients that are not all zero, got a sum of "
            f"{what} of {float(total):g}; check the batch and the initial weights"
        )
    return total
