"""What tables call a data set: its name, what was done to it, and which part is used."""

from pathlib import Path

from experiments.data.specs import SPECS

FILE = "name.txt"  # beside the versions of a prepared data set; `prepare_data --name` writes it


def shown_name(name: str, data_dir: str | Path, examples: int | None = None) -> str:
    """What tables call a data set.

    Args:
      name: in `SPECS`.
      data_dir: the TFDS folder, where a copy that is not the official one says so.
      examples: of the training set that are used; None is all.

    Returns:
      Such as "CIFAR-10 (q75), 10,000 of 50,000 images".
    """
    file = Path(data_dir, name, FILE)
    shown = file.read_text().strip() if file.exists() else SPECS[name].title or name
    return (
        shown if examples is None else f"{shown}, {examples:,} of {SPECS[name].sizes[0]:,} images"
    )
