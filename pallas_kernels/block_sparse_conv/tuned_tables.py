"""The tables of tuned tiles: one JSON file for each implementation and GPU.

A table is `{"environment": ..., "milliseconds": {key: [tuned, default]}, "tiles": {key: {field:
value}}}`; the fields are those of the implementation's `Tile`, and `key` names a pass of a
convolution.
"""

import functools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pallas_kernels.block_sparse_conv.arithmetic import arithmetic
from pallas_kernels.block_sparse_conv.spec import ConvSpec
from pallas_kernels.devices import this_gpu

FOLDER = Path(__file__).parent / "tuned"


def path(implementation: str, gpu: str | None, folder: Path | None = None) -> Path:
    """The file of a table.

    Args:
      implementation: its name.
      gpu: short name; None: where there is no GPU.
      folder: of the tables; None: `FOLDER`.

    Returns:
      The path; the file need not exist.

    Example:
      >>> path("triton", "h100").name
      'tuned_triton_h100.json'
    """
    return (folder or FOLDER) / f"tuned_{implementation}_{gpu or 'none'}.json"


def key(spec: ConvSpec, pass_name: str) -> str:
    """What the tables call a pass of a convolution.

    Args:
      spec: the static sizes.
      pass_name: one of `PASSES`.

    Returns:
      One line; equal for convolutions that need the same kernel.

    Example:
      >>> spec = ConvSpec(cin=8, height=5, width=5, batch=2, kernel=(3, 3), cout=8, groups=2,
      ...                 kept=4, kept_taps=3, group_size=4)
      >>> key(spec, "forward")
      'forward 8x5x5x2 3x3/1x1/1x1 0x0x0x0 2x4x3x4 block 1 ieee'
    """
    kernel = "/".join(map(_by, (spec.kernel, spec.strides, spec.dilation)))
    padding = _by((*spec.padding[0], *spec.padding[1]))
    return (
        f"{pass_name} {_by(spec.in_shape)} {kernel} {padding} {_by(spec.packed_shape)} "
        f"block {spec.channel_block} {arithmetic(spec)}"
    )


def _by(sizes: tuple[int, ...]) -> str:
    return "x".join(map(str, sizes))


@functools.cache
def read(implementation: str, gpu: str | None) -> dict[str, dict[str, Any]]:
    """The tiles that were tuned on a GPU.

    Args:
      implementation: its name.
      gpu: short name.

    Returns:
      The fields of a tile, by key; empty where there is no table.
    """
    file = path(implementation, gpu)
    return json.loads(file.read_text())["tiles"] if file.is_file() else {}


def tuned_tile(implementation: str, name: str) -> dict[str, Any] | None:
    """The tile that was tuned on this GPU.

    Args:
      implementation: its name.
      name: as `key` gives it.

    Returns:
      The fields of the tile; None where the table has none.

    Example:
      >>> tuned_tile("triton", "forward of no such convolution") is None
      True
    """
    return read(implementation, this_gpu()).get(name)


def write(
    file: Path,
    tiles: Mapping[str, Mapping[str, Any]],
    milliseconds: Mapping[str, Sequence[float]],
    environment: Mapping[str, Any],
) -> None:
    """Adds tiles to a table; what it held before and is not tuned again stays.

    Args:
      file: as `path` gives it; need not exist.
      tiles: the fields of the best tile, by key.
      milliseconds: the times of the tuned and of the default tile, by key.
      environment: where they were measured.
    """
    before = json.loads(file.read_text()) if file.exists() else {}
    head = {
        "environment": dict(environment),
        "milliseconds": before.get("milliseconds", {}) | dict(milliseconds),
    }
    rows = before.get("tiles", {}) | dict(tiles)
    lines = ",\n".join(f"{json.dumps(name)}: {json.dumps(tile)}" for name, tile in rows.items())
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(f'{json.dumps(head)[:-1]},\n"tiles": {{\n{lines}\n}}}}\n')
