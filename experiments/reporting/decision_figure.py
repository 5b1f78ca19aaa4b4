"""The figure of the page "choosing a method": which questions lead to which methods."""

import io
from typing import Any, Literal

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

ANSWERS: dict[str, dict[str, tuple[str, ...]]] = {
    "Training itself\nmust get faster": {
        "blocks that stay": ("hrbp", "random-channel"),
        "blocks that move": ("hrbp-dynamic",),
        "from dense to blocks": ("subp",),
        "the network becomes smaller,\nin training": ("prune-train", "slimming", "sss"),
        "the network becomes smaller,\nonce it is trained": (
            "l1-filters",
            "thinet",
            "lasso-channels",
            "pfa",
        ),
    },
    "Few weights are to\nreach the accuracy": {
        "chosen before training": (
            "random",
            "magnitude",
            "snip",
            "grasp",
            "synflow",
            "rumi",
            "dsb",
        ),
        "they move, their number stays": (
            "set",
            "rigl",
            "snfs",
            "deep-r",
            "dsr",
            "srigl",
            "mest",
            "drop-and-grow",
        ),
        "from dense to sparse": ("gradual", "narang", "campfire", "granet", "nest"),
        "a penalty finds them": ("group-lasso", "brain-damage", "variational-dropout"),
        "rounds of training": ("lottery", "deep-compression"),
    },
    "The hardware\ntakes N:M": {"pruned weights train on": ("sr-ste", "ste")},
}
"""Question -> answer -> methods. Any of them runs in blocks where it has a `pattern` option."""

COLORS = ("#1a6fb5", "#d1702a", "#5b6770")
_STYLE: Any = {"font.size": 9, "svg.fonttype": "none", "svg.hashsalt": "blocksparse_jax"}
_PER_LINE = 4  # methods

Align = Literal["left", "center", "right"]


def draw(_: Any = None) -> str:
    """Draws the questions, their answers and the methods, from left to right.

    Returns:
      The text of an SVG file.
    """
    heights = {
        question: [max(2, 1 + -(-len(names) // _PER_LINE)) for names in answers.values()]
        for question, answers in ANSWERS.items()
    }
    total = sum(map(sum, heights.values())) + len(heights)
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(8.4, 0.27 * total), facecolor="white")
        FigureCanvasSVG(figure)
        axes = figure.add_axes((0, 0, 1, 1))
        axes.set_xlim(0, 100)
        axes.set_ylim(total, 0)
        axes.axis("off")
        top = 0.5
        for color, (question, answers) in zip(COLORS, ANSWERS.items(), strict=True):
            _question(axes, top, color, question, answers, heights[question])
            top += sum(heights[question]) + 1
        text = io.StringIO()
        figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None})
    return text.getvalue()


def _question(
    axes: Axes,
    top: float,
    color: str,
    question: str,
    answers: dict[str, tuple[str, ...]],
    heights: list[int],
) -> None:
    middle = top + sum(heights) / 2
    _box(axes, 10, middle, question, color, filled=True)
    for (answer, names), height in zip(answers.items(), heights, strict=True):
        y = top + height / 2
        axes.plot((19, 25), (middle, y), color=color, linewidth=1)
        _box(axes, 26, y, answer, color, align="left")
        lines = [names[i : i + _PER_LINE] for i in range(0, len(names), _PER_LINE)]
        text = "\n".join(", ".join(line) for line in lines)
        axes.text(55, y, text, va="center", family="monospace", fontsize=8.5)
        top += height


def _box(
    axes: Axes,
    x: float,
    y: float,
    text: str,
    color: str,
    filled: bool = False,
    align: Align = "center",
) -> None:
    axes.text(
        x,
        y,
        text,
        ha=align,
        va="center",
        color="white" if filled else "black",
        bbox={
            "boxstyle": "round,pad=0.35",
            "facecolor": color if filled else "white",
            "edgecolor": color,
        },
    )
