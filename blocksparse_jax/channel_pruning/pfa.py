"""Principal filter analysis: the least correlated channels, as many as directions they span."""

from collections.abc import Mapping

import numpy as np
from jaxtyping import Bool, Float, PyTree

from blocksparse_jax import _checks, tree
from blocksparse_jax.channel_pruning.inputs import LayerInput
from blocksparse_jax.channel_pruning.spaces import (
    closest_counts,
    kernel_shapes,
    readers,
    space_sizes,
)
from blocksparse_jax.grouping.channel_spaces import Spaces

_INACTIVE = 1e-12  # of the largest variance in a space


def pfa(
    params: PyTree,
    spaces: Spaces,
    inputs: Mapping[str, LayerInput],
    *,
    energy: float | None = None,
    sparsity: float | None = None,
    where: tree.Where | None = None,
) -> dict[str, Bool[np.ndarray, " c"]]:
    """Keeps the channels whose responses correlate least, as many as the spectrum tells.

    The response of a channel to an image is its maximum over the pixels, as the layers read it that
    read the space. The eigenvalues of the responses' covariance matrix say how many of C channels
    stay; there are three recipes:

    - PFA-KL, without a parameter: `ceil(C * (1 - KL / log C))` with the divergence of the
      normalised eigenvalues from C equal ones;
    - PFA-En, by `energy`: the fewest eigenvalues that make up this fraction of their sum;
    - by `sparsity`: PFA-En with the one energy for all spaces that fits the size wanted.

    The channels that go: those whose response never changes, then one after the other the one with
    the largest sum of `|correlation|` with those that are left.

    Args:
      params: the parameters of a trained network.
      spaces: `{space: [(leaf name, axis), ...]}`, as in `fold_channel_orders`, of what is to be
        pruned.
      inputs: `{kernel name: LayerInput}` of the readers of the spaces, over at least two images, as
        from `linen.capture_inputs`.
      energy: fraction in (0, 1], for PFA-En.
      sparsity: fraction of the chosen weights to remove, in [0, 1).
      where: predicate (name, leaf) of the kernels whose weights `sparsity` counts, default conv
        kernels except the stem.

    Returns:
      `{space: bool vector of its channels}`, True = kept, at least one each.

    Raises:
      ValueError: energy and sparsity together, or spaces or inputs that do not fit the params.

    Example:
      >>> import jax.numpy as jnp
      >>> params = {"a": jnp.ones((1, 3)), "b": jnp.ones((3, 1))}
      >>> x = LayerInput(jnp.array([[1.0, 2.0, 1.0], [2.0, 4.0, 0.0], [3.0, 6.0, 1.0]]))
      >>> pfa(params, {"s": [("a", 1), ("b", 0)]}, {"b": x}, energy=0.99)["s"].tolist()
      [True, False, True]

    Reference: Suau et al., "Filter distillation for network compression", WACV 2020 (PFA, 2018);
    the covariance spectrum, the fewest inactive channels and ties to the largest single correlation
    are those of the authors' code. The mean covariance of all layers that read a residual stream,
    the higher number removed of what ties still, and spaces that grow alike where a size takes more
    channels than the images have directions, are our choice.
    """
    if energy is not None and sparsity is not None:
        raise ValueError(
            f"energy: expected energy or sparsity, got energy={energy} and sparsity={sparsity}"
        )
    shapes = kernel_shapes(params, spaces)
    sizes = space_sizes(shapes, spaces)
    covariances = {
        space: _covariance(space, readers(shapes, spaces, space), inputs, size)
        for space, size in sizes.items()
    }
    spectra = {
        space: np.maximum(np.linalg.eigvalsh(matrix)[::-1], 0)
        for space, matrix in covariances.items()
    }
    if sparsity is not None:
        recipes = _all_recipes(spectra)
        chosen = tree.shapes(tree.choose(where, params))
        counts = closest_counts(chosen, spaces, recipes, _checks.fraction("sparsity", sparsity))
    elif energy is not None:
        energy = _checks.fraction("energy", energy, low_open=True, high_open=False)
        counts = _by_energy(spectra, energy)
    else:
        counts = {space: _by_divergence(spectrum) for space, spectrum in spectra.items()}
    return {space: _least_correlated(covariances[space], counts[space]) for space in spaces}


def _covariance(
    space: str, names: list[str], inputs: Mapping[str, LayerInput], size: int
) -> Float[np.ndarray, "c c"]:
    """The mean covariance of the channels' responses over the layers that read them."""
    if not names:
        raise ValueError(f"spaces[{space!r}]: no kernel reads it, leave it out of spaces")
    matrices = []
    for name in names:
        given = inputs.get(name)
        if not isinstance(given, LayerInput):
            raise ValueError(
                f"inputs: expected a LayerInput for {name!r}, which reads space {space!r}, got "
                f"names {sorted(inputs)[:8]}; linen.capture_inputs records them"
            )
        x = _checks.concrete(f"inputs[{name!r}]", given.x).astype(np.float64)
        if x.ndim < 2 or x.shape[-1] != size or len(x) < 2:
            raise ValueError(
                f"inputs[{name!r}]: expected activations [n, ..., {size}] of at least two images, "
                f"got shape {x.shape}"
            )
        responses = x.max(tuple(range(1, x.ndim - 1)))
        centred = responses - responses.mean(0)
        matrices.append(centred.T @ centred / len(x))
    return np.mean(matrices, axis=0)


def _energies(spectrum: Float[np.ndarray, " c"]) -> Float[np.ndarray, " c"]:
    """The fraction of all energy in the first 1, 2, ... eigenvalues."""
    total = spectrum.sum()
    return np.cumsum(spectrum) / total if total else np.ones_like(spectrum)


def _by_energy(spectra: Mapping[str, np.ndarray], energy: float) -> dict[str, int]:
    """The fewest eigenvalues of each space that hold an energy."""
    return {
        space: min(len(spectrum), 1 + int((_energies(spectrum) < energy - 1e-12).sum()))
        for space, spectrum in spectra.items()
    }


def _all_recipes(spectra: Mapping[str, np.ndarray]) -> list[dict[str, int]]:
    """The counts of every energy, ascending; beyond all energy all spaces grow alike."""
    thresholds = np.unique(np.concatenate([_energies(one) for one in spectra.values()]))
    recipes = [_by_energy(spectra, threshold) for threshold in thresholds]
    most, steps = recipes[-1], max(map(len, spectra.values()))
    for step in range(1, steps + 1):
        recipes.append(
            {
                space: count + round(step / steps * (len(spectra[space]) - count))
                for space, count in most.items()
            }
        )
    return recipes


def _by_divergence(spectrum: Float[np.ndarray, " c"]) -> int:
    """All channels for equal eigenvalues, one where a single eigenvalue holds all energy."""
    total, size = spectrum.sum(), len(spectrum)
    if size == 1 or not total:
        return 1
    shares = spectrum[spectrum > 0] / total
    divergence = float((shares * np.log(shares * size)).sum())
    return min(size, max(1, int(np.ceil(size * (1 - divergence / np.log(size)) - 1e-9))))


def _least_correlated(covariance: Float[np.ndarray, "c c"], count: int) -> Bool[np.ndarray, " c"]:
    """The channels that stay when the most correlated went one by one."""
    variances = np.diag(covariance)
    active = variances > _INACTIVE * max(variances.max(), np.finfo(float).tiny)
    scale = np.sqrt(np.where(active, variances, 1))
    correlation = np.abs(covariance) / np.outer(scale, scale)
    np.fill_diagonal(correlation, 0)
    kept = np.ones(len(covariance), bool)
    for _ in range(len(covariance) - count):
        if (kept & ~active).any():
            worst = np.flatnonzero(kept & ~active)
        else:
            left = np.where(np.outer(kept, kept), correlation, 0)
            sums = np.where(kept, left.sum(0), -1)
            largest = np.isclose(sums, sums.max())
            single = np.where(largest, left.max(0), -1)
            worst = np.flatnonzero(np.isclose(single, single.max()))
        kept[worst[-1]] = False
    return kept
