"""HTML tables that are read aloud well and scroll alone where the page is narrow."""

from collections.abc import Sequence
from html import escape
from typing import Any


class Markup(str):
    """Text that is HTML already."""

    __slots__ = ()


def cell(value: Any) -> str:
    """What a cell shows: a dash for None, escaped text for all that is no `Markup`."""
    if isinstance(value, Markup):
        return value
    return "—" if value is None else escape(str(value))


def table(
    caption: str,
    columns: Sequence[str],
    rows: Sequence[Sequence[Any]],
    *,
    text_columns: int = 1,
    total: Sequence[Any] | None = None,
) -> str:
    """Builds a table whose first cell of each row names it.

    Args:
      caption: what it shows.
      columns: headings.
      rows: cells.
      text_columns: how many of the first columns hold text; the others hold numbers.
      total: the last row, set off from the others.

    Returns:
      HTML.

    Example:
      >>> "<th scope='row'>a&amp;b</th>" in table("c", ["x", "y"], [["a&b", None]])
      True
    """

    def line(cells: Sequence[Any]) -> str:
        first, *others = cells
        tags = [f"<th scope='row'>{cell(first)}</th>"]
        for i, value in enumerate(others, 1):
            numeric = "" if i < text_columns else " class='n'"
            tags.append(f"<td{numeric}>{cell(value)}</td>")
        return f"<tr>{''.join(tags)}</tr>"

    heads = [
        f"<th scope='col'{'' if i < text_columns else ' class=n'}>{cell(column)}</th>"
        for i, column in enumerate(columns)
    ]
    foot = f"<tfoot>{line(total)}</tfoot>" if total else ""
    return (
        f"<div class='scroll' role='region' aria-label='{escape(caption)}' tabindex='0'><table>"
        f"<caption>{escape(caption)}</caption><thead><tr>{''.join(heads)}</tr></thead>"
        f"<tbody>{''.join(map(line, rows))}</tbody>{foot}</table></div>"
    )
