"""The short name of a GPU, and the file of the tiles that were tuned on it."""

from pathlib import Path

import jax

FOLDER = Path(__file__).parent / "tuned"


def short_name(kind: str) -> str:
    """A GPU's model in lower case: the first word that has a digit, up to a hyphen; the last word
    where none has.

    Args:
      kind: as JAX's `device_kind`.

    Returns:
      The name, as in the names of tuned tables.

    Example:
      >>> [short_name(f"NVIDIA {model}") for model in ("H200", "H100 80GB HBM3", "A100-SXM4-80GB", "TITAN V")]
      ['h200', 'h100', 'a100', 'v']
    """
    words = kind.split()
    return (
        next((word for word in words if any(map(str.isdigit, word))), words[-1])
        .split("-")[0]
        .lower()
    )


def this_gpu() -> str | None:
    """The short name of JAX's default device.

    Returns:
      The name; None where that is no GPU.
    """
    device = jax.devices()[0]
    return short_name(device.device_kind) if device.platform == "gpu" else None


def table(implementation: str, gpu: str | None) -> Path:
    """The file of tuned tiles.

    Args:
      implementation: its name.
      gpu: short name; None: where there is no GPU.

    Returns:
      The path; the file need not exist.

    Example:
      >>> table("triton", "h100").name
      'tuned_triton_h100.json'
    """
    return FOLDER / f"tuned_{implementation}_{gpu or 'none'}.json"
