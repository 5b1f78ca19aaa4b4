"""Draws docs/figures/block_fill.svg: `python -m experiments.reporting.block_figure`.

A convolution is a product with the forward matrix `[cout, cin * kh * kw]`, its input gradient one
with the matrix `[cin, cout * kh * kw]` of the rotated filters. The figure shows three patterns of
the same density in both matrices, and how much of the rectangle that a group of filters touches is
kept (`blocksparse_jax.block_fill`). `--check` only fails when the committed figure is stale.
"""

import dataclasses
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from jaxtyping import Bool

import blocksparse_jax as bsj

FIGURE = Path(__file__).resolve().parents[2] / "docs" / "figures" / "block_fill.svg"

SHAPE = (3, 3, 64, 64)
GROUP_SIZE = 16
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7")
"""One color a group of filters, told apart by color-blind readers too."""

ROW_HEIGHT = 2
ZOOM = 3
MARGIN = 16
GAP = 40


class Pattern(NamedTuple):
    """A pattern of one convolution.

    Attributes:
      title: line above its matrices.
      blocks: the kept weights, one block a group.
      filters: the filters of each group, int `[groups, group_size]`.
      mask: bool `[kh, kw, cin, cout]`, True = kept.
    """

    title: str
    blocks: bsj.ColumnBlocks | bsj.BlockLayout
    filters: np.ndarray
    mask: Bool[np.ndarray, "kh kw cin cout"]


@dataclasses.dataclass(frozen=True)
class BlockFigureConfig:
    """The file to write.

    Attributes:
      check: whether to write nothing and fail when the file is stale.
      path: the SVG file.
    """

    check: bool = False
    path: Path = FIGURE


def main(config: BlockFigureConfig) -> None:
    """Draws the figure.

    Args:
      config: the file to write or to check.

    Raises:
      ValueError: with `check`, the file is missing or stale.
    """
    figure = svg(patterns())
    if not config.check:
        config.path.parent.mkdir(parents=True, exist_ok=True)
        config.path.write_text(figure)
    elif not config.path.exists() or config.path.read_text() != figure:
        raise ValueError(
            f"{config.path.name}: stale; run python -m experiments.reporting.block_figure"
        )


def patterns() -> list[Pattern]:
    """Three patterns of 5% density, which the library's search chooses from the same scores.

    The scores are random whole numbers, so that their sums are exact on every machine.
    """
    scores = jnp.asarray(np.random.default_rng(1).integers(0, 256, SHAPE), jnp.float32)
    whole = bsj.hrbp_groups(scores, group_size=GROUP_SIZE, kept=3, kept_taps=9)
    shared_taps = bsj.hrbp_groups(scores, group_size=GROUP_SIZE, kept=10, kept_taps=3)
    return [
        _column_pattern("arbitrary columns of the forward matrix", scores, kept=29),
        _layout_pattern("whole kernel slices", whole),
        _layout_pattern("HRBP: kernel slices that keep the same 3 of 9 taps", shared_taps),
    ]


def forward_matrix(kernel: np.ndarray) -> np.ndarray:
    """A conv kernel `[kh, kw, cin, cout]` as the matrix `[cout, cin * kh * kw]`."""
    return kernel.transpose(3, 2, 0, 1).reshape(kernel.shape[3], -1)


def input_gradient_matrix(kernel: np.ndarray) -> np.ndarray:
    """A conv kernel as the matrix `[cin, cout * kh * kw]` of the filters rotated by 180 degrees."""
    return kernel[::-1, ::-1].transpose(2, 3, 0, 1).reshape(kernel.shape[2], -1)


def svg(drawn: list[Pattern]) -> str:
    """Draws the patterns below one another.

    Args:
      drawn: patterns of one shape.

    Returns:
      The text of an SVG file.
    """
    kh, kw, cin, cout = SHAPE
    left = MARGIN
    right = MARGIN + cin * kh * kw + GAP
    width = right + cout * kh * kw + MARGIN
    parts = [
        _text(left, 24, f"forward: [{cout} filters, {cin} channels x {kh * kw} taps]"),
        _text(right, 24, f"input gradient: [{cin} channels, {cout} filters x {kh * kw} taps]"),
    ]
    top = 48
    for pattern in drawn:
        parts.append(_text(left, top + 8, pattern.title, bold=True))
        order = pattern.filters.reshape(-1)
        masks = [_group_mask(pattern, group) for group in range(len(pattern.filters))]
        forward = [forward_matrix(mask)[order] for mask in masks]
        backward = [input_gradient_matrix(mask[..., order]) for mask in masks]
        forward_fill, backward_fill = bsj.block_fill(pattern.blocks)
        forward_panel, forward_bottom = _panel(left, top + 18, forward, forward_fill)
        backward_panel, backward_bottom = _panel(right, top + 18, backward, backward_fill)
        parts += [*forward_panel, *backward_panel]
        top = max(forward_bottom, backward_bottom) + 30
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {top - 14}" '
        f'font-family="sans-serif" font-size="15">'
    )
    title = "<title>Three patterns in the matrices of the forward pass and the gradient</title>"
    background = '<rect width="100%" height="100%" fill="#fff"/>'
    return "\n".join([head, title, background, *parts, "</svg>"]) + "\n"


def _panel(x: int, y: int, groups: list[np.ndarray], fill: float) -> tuple[list[str], int]:
    """Draws a matrix, below it its first group packed together, and returns the bottom edge too."""
    zoom_top = y + ROW_HEIGHT * len(groups[0]) + 26
    label = f"group 1 packed together; fill of all groups {fill:.2f}"
    parts = [
        *_matrix(x, y, groups),
        _text(x, zoom_top - 8, label),
        *_packed_rectangle(x, zoom_top, groups[0]),
    ]
    return parts, zoom_top + ZOOM * int(groups[0].any(1).sum())


def _layout_pattern(title: str, layout: bsj.BlockLayout) -> Pattern:
    mask = np.asarray(bsj.layout_to_mask(layout))
    return Pattern(title, layout, np.asarray(layout.filters), mask)


def _column_pattern(title: str, scores: jax.Array, kept: int) -> Pattern:
    """Groups filters that share columns: the same search, on a 1x1 convolution of all columns."""
    kh, kw, cin, cout = scores.shape
    one_by_one = scores.transpose(2, 0, 1, 3).reshape(1, 1, cin * kh * kw, cout)
    layout = bsj.hrbp_groups(one_by_one, group_size=GROUP_SIZE, kept=kept, kept_taps=1)
    filters = np.asarray(layout.filters)
    columns = np.asarray(layout.channels)
    blocks = bsj.ColumnBlocks(SHAPE, tuple(zip(filters, columns, strict=True)))
    return Pattern(title, blocks, filters, blocks.mask())


def _group_mask(pattern: Pattern, group: int) -> np.ndarray:
    """The mask of one group: False for the filters of all other groups."""
    mask = np.zeros_like(pattern.mask)
    filters = pattern.filters[group]
    mask[..., filters] = pattern.mask[..., filters]
    return mask


def _matrix(x: int, y: int, groups: list[np.ndarray]) -> Iterator[str]:
    """Draws a matrix: a pale rectangle of touched rows and columns a group, kept weights on top."""
    rows, columns = groups[0].shape
    height = ROW_HEIGHT * rows
    yield f'<rect x="{x}" y="{y}" width="{columns}" height="{height}" fill="#f4f4f4"/>'
    for group, color in zip(groups, COLORS, strict=True):
        touched = np.outer(group.any(1), group.any(0))
        yield _cells(x, y, touched, 1, ROW_HEIGHT, f'stroke="{color}" stroke-opacity="0.25"')
    for group, color in zip(groups, COLORS, strict=True):
        yield _cells(x, y, group, 1, ROW_HEIGHT, f'stroke="{color}"')


def _packed_rectangle(x: int, y: int, group: np.ndarray) -> Iterator[str]:
    """Draws the rows and columns that a group touches side by side, enlarged."""
    packed = group[group.any(1)][:, group.any(0)]
    rows, columns = packed.shape
    yield (
        f'<rect x="{x}" y="{y}" width="{ZOOM * columns}" height="{ZOOM * rows}" '
        f'fill="{COLORS[0]}" fill-opacity="0.25"/>'
    )
    yield _cells(x, y, packed, ZOOM, ZOOM, f'stroke="{COLORS[0]}"')


def _cells(x: int, y: int, mask: np.ndarray, width: int, height: int, style: str) -> str:
    """One path that draws the True cells; neighbours in a row become one stroke."""
    path = []
    for i, row in enumerate(mask):
        edges = np.flatnonzero(np.diff(np.concatenate([[0], row.astype(np.int8), [0]])))
        for start, end in zip(edges[::2], edges[1::2], strict=True):
            path.append(f"M{start * width} {i * height}h{(end - start) * width}")
    place = f'transform="translate({x} {y + height / 2:g})" stroke-width="{height}"'
    return f'<path {place} {style} d="{"".join(path)}"/>'


def _text(x: int, y: int, text: str, *, bold: bool = False) -> str:
    weight = ' font-weight="bold"' if bold else ""
    return f'<text x="{x}" y="{y}" fill="#222"{weight}>{text}</text>'


if __name__ == "__main__":
    try:
        main(tyro.cli(BlockFigureConfig, prog="python -m experiments.reporting.block_figure"))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(1) from None
