"""Pictures of runs: learning curves, and the block structure of masks."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Bool, Float
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

import blocksparse_jax as bsj


def learning_curves(
    rows: Sequence[dict[str, Any]], path: str | Path | None = None, title: str = ""
) -> Figure:
    """Draws the loss, the accuracies, the density and the SAD of a run over its epochs.

    A dashed line marks the epoch after which the masks no longer change. There is no SAD of an
    epoch that removed channels from masks.

    Args:
      rows: of metrics.jsonl.
      path: of the PNG; None only returns the figure.
      title: above the picture.

    Returns:
      The figure.
    """
    epochs = [row for row in rows if row["kind"] == "epoch"]
    moving = [row["epoch"] + 1 for row in epochs if row["sad"] is None or row["sad"] > 0]
    final = moving[-1] if moving else None  # the last epoch in which masks changed
    figure = _figure(12, 3.2, title)
    axes = figure.subplots(1, 3)
    for ax, names in zip(
        axes, (("loss",), ("train_accuracy", "test_accuracy"), ("density", "sad")), strict=True
    ):
        for name in names:
            _curve(ax, epochs, name, name.replace("_", " "))
        if final is not None and final < len(epochs):
            ax.axvline(
                final,
                color="tab:gray",
                linestyle="--",
                linewidth=1,
                label=f"masks final in epoch {final}",
            )
        ax.legend()
    if path is not None:
        _save(figure, path)
    return figure


def comparison(runs: Mapping[str, Sequence[dict[str, Any]]], path: str | Path) -> None:
    """Draws the loss, the test accuracy and the density of several runs in one picture.

    Args:
      runs: label -> rows of metrics.jsonl.
      path: of the PNG.
    """
    figure = _figure(12, 3.6 + 0.2 * len(runs), "")  # the legend has a line for every run
    for ax, name in zip(figure.subplots(1, 3), ("loss", "test_accuracy", "density"), strict=True):
        for label, rows in runs.items():
            _curve(ax, [row for row in rows if row["kind"] == "epoch"], name, label)
        ax.set_ylabel(name.replace("_", " "))
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside right", fontsize=7)
    _save(figure, path)


def attack(
    epsilons: Sequence[float], accuracies: Sequence[float], path: str | Path, title: str
) -> None:
    """Draws the accuracy on attacked images over the size of the attack.

    Args:
      epsilons: of the fast gradient sign method, 0 for the images as they are.
      accuracies: one for each.
      path: of the PNG.
      title: above the picture.
    """
    figure = _figure(5, 3.6, title)
    ax = figure.subplots()
    ax.plot(epsilons, accuracies, marker=".")
    ax.set_xlabel("epsilon, where 1 is the brightest pixel")
    ax.set_ylabel("test accuracy")
    ax.set_ylim(0, 1)
    ax.grid(alpha=0.3)
    _save(figure, path)


def block_structure(
    masks: Any, layouts: Any, path: str | Path | None = None, title: str = ""
) -> Figure:
    """Draws the kernel slices that each sparse layer keeps, the filters of a group side by side.

    A layer's picture has a row for each filter and a column for each input channel. A pixel is
    one kernel slice; its shade is the fraction of its taps that are kept. Red lines separate the
    groups.

    Args:
      masks: tree of bool masks; scalars mark dense leaves.
      layouts: tree of layouts; with {} the filters keep their order.
      path: of the PNG; None only returns the figure.
      title: above the picture.

    Returns:
      The figure.

    Reference: the kernel-wise mask of Ma et al., "HRBP", CPAL 2024.
    """
    named = [
        (jax.tree_util.keystr(key, simple=True, separator="/"), np.asarray(mask))
        for key, mask in jax.tree_util.tree_flatten_with_path(masks)[0]
    ]
    nodes = jax.tree.leaves(layouts, is_leaf=bsj.is_layout) or [bsj.Dense()] * len(named)
    sparse = [
        (name, mask, node)
        for (name, mask), node in zip(named, nodes, strict=True)
        if mask.ndim == 4
    ]
    columns = min(4, max(1, len(sparse)))
    rows = max(1, -(-len(sparse) // columns))
    figure = _figure(3.2 * columns, 3.2 * rows + 0.3, title)
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    for ax in axes:
        ax.set_axis_off()
    if not sparse:
        figure.suptitle("dense: no layer has a mask")
    else:
        groups = (
            "; red lines separate the groups"
            if any(isinstance(node, bsj.BlockLayout) for _, _, node in sparse)
            else ""
        )
        figure.supxlabel(
            f"a pixel is a kernel slice: white keeps no tap, black keeps all{groups}", fontsize=8
        )
    for ax, (name, mask, node) in zip(axes, sparse):
        ax.set_axis_on()
        kernels = kernel_slices(mask, node)
        if isinstance(node, bsj.BlockLayout):
            for group in range(1, node.filters.shape[0]):
                ax.axhline(group * node.filters.shape[1] - 0.5, color="tab:red", linewidth=0.6)
        ax.imshow(kernels, cmap="Greys", vmin=0, vmax=1, aspect="auto", interpolation="nearest")
        ax.set_title(f"{name}\ndensity {mask.mean():.3f}", fontsize=8)
        ax.set_xlabel("input channel", fontsize=7)
        ax.set_ylabel(
            "filter, by group" if isinstance(node, bsj.BlockLayout) else "filter", fontsize=7
        )
        ax.tick_params(labelsize=6)
    if path is not None:
        _save(figure, path)
    return figure


def kernel_slices(
    mask: Bool[np.ndarray, "kh kw cin cout"], node: Any
) -> Float[np.ndarray, "cout cin"]:
    """How much of each kernel slice a mask keeps.

    Args:
      mask: of a conv kernel.
      node: its layout; a `BlockLayout` puts the filters of a group side by side.

    Returns:
      Fractions of the taps: a row for each filter, a column for each input channel.
    """
    kernels = mask.mean((0, 1)).T
    if isinstance(node, bsj.BlockLayout):
        kernels = kernels[np.asarray(node.filters).reshape(-1)]
    return kernels


def _figure(width: float, height: float, title: str) -> Figure:
    figure = Figure(figsize=(width, height), layout="constrained")
    if title:
        figure.suptitle(title, fontsize=10)
    return figure


def _curve(ax: Axes, epochs: Sequence[dict[str, Any]], name: str, label: str) -> None:
    ax.plot(
        [row["epoch"] + 1 for row in epochs], [row[name] for row in epochs], marker=".", label=label
    )
    ax.set_xlabel("epoch")
    ax.grid(alpha=0.3)


def _save(figure: Figure, path: str | Path) -> None:
    FigureCanvasAgg(figure).print_png(str(path))
