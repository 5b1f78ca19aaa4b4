"""Fills the tables and draws the figures of README.md and docs/ from experiments/results/*.json.

    python -m experiments.report
    python -m experiments.report --check

The first rewrites what is stale, the second writes nothing and fails instead. A table stands
between `<!-- table:NAME -->` and `<!-- /table -->`; `experiments/reporting/tables.py` says which
names there are.
"""

import sys

import tyro

from experiments.reporting.tables import TablesConfig, main


def cli(arguments: list[str] | None = None) -> None:
    """Runs the command line. Something stale or unknown ends it with one line and exit code 1.

    Args:
      arguments: without the program's name; None takes those of the process.
    """
    config = tyro.cli(
        TablesConfig, args=arguments, prog="python -m experiments.report", description=__doc__
    )
    try:
        main(config)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(1) from None


if __name__ == "__main__":
    cli()
