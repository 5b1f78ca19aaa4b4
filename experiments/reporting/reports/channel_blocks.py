"""The table of `channel_blocks`: how much score runs of channels keep."""

from typing import Any

from experiments.reporting import markdown


def table(report: dict[str, Any]) -> str:
    """Returns a row for each network and length of run, and a column for each sparsity.

    Args:
      report: of `experiments.bench.channel_blocks`.

    Returns:
      Markdown.
    """
    rows = {(row["network"], row["channel_block"], row["sparsity"]): row for row in report["rows"]}
    sparsities = sorted({sparsity for _, _, sparsity in rows})
    runs = {(network, channel_block) for network, channel_block, _ in rows}
    lines = []
    for network, channel_block in sorted(runs, key=_by_weights):
        model, _, weights = network.partition(":")
        cells = [f"{model}, {weights} weights", str(channel_block)]
        cells += [_kept(rows.get((network, channel_block, sparsity))) for sparsity in sparsities]
        lines.append(cells)
    columns = ["network", "channels in a run", *(f"{sparsity:.0%}" for sparsity in sparsities)]
    note = "In brackets: with the channels as they were, and of blocks chosen at random.\n"
    return markdown.table(columns, lines) + "\n" + note


def _by_weights(run: tuple[str, int]) -> tuple[list[str], int]:
    network, channel_block = run
    return network.split(":")[::-1], channel_block


def _kept(row: dict[str, Any] | None) -> str:
    if row is None:
        return "—"
    return f"**{row['ordered']:.3f}** ({row['unordered']:.3f}, {row['chance']:.3f})"
