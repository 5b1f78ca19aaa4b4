"""The table of all methods, read off the registry."""

from experiments.reporting import markdown
from experiments.training import registry


def table() -> str:
    """Returns a row for each registered method.

    Returns:
      Markdown, with what its steps mean below.
    """
    rows = registry.rows()
    code = {"method", "function"}
    lines = [
        [f"`{cell}`" if column in code and cell != "—" else cell for column, cell in row.items()]
        for row in rows
    ]
    return (
        f"{markdown.table(list(rows[0]), lines, text_columns=len(rows[0]))}\n{registry.CAPTION}\n"
    )
