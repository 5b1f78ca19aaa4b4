"""All tables by name."""

from blocksparse_jax import _checks
from experiments.sweeps import campfire, compression, hrbp, nm, rigl, subp
from experiments.sweeps.table import SweepTable, Tables

_FAMILIES = (hrbp, campfire, nm, subp, rigl, compression)
TABLES: Tables = {name: make for family in _FAMILIES for name, make in family.TABLES.items()}


def table(name: str) -> SweepTable:
    """The table of a name.

    Args:
      name: as `--list` shows it.

    Returns:
      The table, at the full scale.

    Raises:
      ValueError: there is none; the message lists all.
    """
    return TABLES[_checks.choice("name", name, TABLES)]()
