"""Markdown tables: how they are built, and how a command shows them."""

import sys
from collections.abc import Sequence

from rich.console import Console
from rich.markdown import Markdown


def table(columns: Sequence[str], rows: Sequence[Sequence[str]], text_columns: int = 1) -> str:
    """Builds a Markdown table.

    Args:
      columns: headings.
      rows: cells.
      text_columns: how many of the first columns hold text, which is aligned left; the others hold
        numbers, which are aligned right.

    Returns:
      Its lines.

    Example:
      >>> print(table(["method", "ms"], [["hrbp", "1.5"]]), end="")
      | method | ms |
      |---|---:|
      | hrbp | 1.5 |
    """
    alignments = ["---" if i < text_columns else "---:" for i in range(len(columns))]
    lines = ["| " + " | ".join(cells) + " |" for cells in (columns, *rows)]
    lines.insert(1, "|" + "|".join(alignments) + "|")
    return "\n".join(lines) + "\n"


def show(text: str) -> None:
    """Prints Markdown: rendered on a terminal, as it is into a file or a pipe.

    Args:
      text: Markdown.
    """
    if sys.stdout.isatty():
        Console().print(Markdown(text))
    else:
        print(text)
