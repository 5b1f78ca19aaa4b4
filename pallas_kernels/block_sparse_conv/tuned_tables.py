"""The measurements of each GPU, one JSON file for all implementations: tuned tiles, and layers.

A table is `{"environment": ..., "milliseconds": {implementation: {key: [tuned, default]}}, "tiles":
{implementation: {key: {field: value}}}, "prologues": {layer_key: [with, without]}, "layers":
{layer_key: {...}}}`. The fields of a tile are those of the implementation's `Tile`, and `key` names
a pass of a convolution. A prologue has the milliseconds of the Triton kernels that read an input,
forward and weight gradient, which normalise it while they load it, and of those after a pass that
stores the normalised input. A layer holds
"milliseconds", `{pass: {implementation or "dense": median}}`, where "dense" is cuDNN, and the
"commit", "device" and "versions" of its measurement.
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
DENSE = "dense"
"""cuDNN's name among the times of a layer."""
_PREFIX = "tuned_"


def path(gpu: str | None, folder: Path | None = None) -> Path:
    """The file of a table.

    Args:
      gpu: short name; None: where there is no GPU.
      folder: of the tables; None: `FOLDER`.

    Returns:
      The path; the file need not exist.

    Example:
      >>> path("h100").name
      'tuned_h100.json'
    """
    return (folder or FOLDER) / f"{_PREFIX}{gpu or 'none'}.json"


def gpus() -> list[str]:
    """The short names of the GPUs that have a table.

    Returns:
      The names in alphabetical order.

    Example:
      >>> "h200" in gpus()
      True
    """
    names = (file.stem.removeprefix(_PREFIX) for file in FOLDER.glob(f"{_PREFIX}*.json"))
    return sorted(name for name in names if not name.endswith("_cpu"))


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
    return f"{pass_name} {layer_key(spec)}"


def layer_key(spec: ConvSpec) -> str:
    """What the tables call a convolution.

    Args:
      spec: the static sizes.

    Returns:
      One line; equal for convolutions that need the same kernels.

    Example:
      >>> spec = ConvSpec(cin=8, height=5, width=5, batch=2, kernel=(3, 3), cout=8, groups=2,
      ...                 kept=4, kept_taps=3, group_size=4)
      >>> layer_key(spec)
      '8x5x5x2 3x3/1x1/1x1 0x0x0x0 2x4x3x4 block 1 ieee'
    """
    kernel = "/".join(map(_by, (spec.kernel, spec.strides, spec.dilation)))
    padding = _by((*spec.padding[0], *spec.padding[1]))
    return (
        f"{_by(spec.in_shape)} {kernel} {padding} {_by(spec.packed_shape)} "
        f"block {spec.channel_block} {arithmetic(spec)}"
    )


def _by(sizes: tuple[int, ...]) -> str:
    return "x".join(map(str, sizes))


@functools.cache
def read(gpu: str | None) -> dict[str, Any]:
    """The table of a GPU.

    Args:
      gpu: short name.

    Returns:
      The table; its parts are empty where there is none.
    """
    file = path(gpu)
    return _empty() | (json.loads(file.read_text()) if file.is_file() else {})


def _empty() -> dict[str, Any]:
    return {"environment": {}, "milliseconds": {}, "tiles": {}, "prologues": {}, "layers": {}}


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
    return read(this_gpu())["tiles"].get(implementation, {}).get(name)


def layer_times(spec: ConvSpec) -> dict[str, dict[str, float]] | None:
    """What a convolution was measured to take on this GPU.

    Args:
      spec: the static sizes.

    Returns:
      `{pass: {implementation or "dense": milliseconds}}`; None where the table has none.
    """
    layer = read(this_gpu())["layers"].get(layer_key(spec))
    return layer and layer["milliseconds"]


def prologue_pays(spec: ConvSpec) -> bool:
    """Whether the Triton kernels were faster on this GPU where they normalise their input.

    Args:
      spec: the static sizes.

    Returns:
      A bool; False where the table does not say.

    Example:
      >>> spec = ConvSpec(cin=8, height=5, width=5, batch=2, kernel=(3, 3), cout=8, groups=2,
      ...                 kept=4, kept_taps=3, group_size=4)
      >>> prologue_pays(spec)
      False
    """
    with_prologue, without = read(this_gpu())["prologues"].get(layer_key(spec), (1, 0))
    return bool(with_prologue < without)


def write_tiles(
    file: Path,
    implementation: str,
    tiles: Mapping[str, Mapping[str, Any]],
    milliseconds: Mapping[str, Sequence[float]],
    environment: Mapping[str, Any],
) -> None:
    """Adds tiles to a table; what it held before and is not tuned again stays.

    Args:
      file: as `path` gives it; need not exist.
      implementation: its name.
      tiles: the fields of the best tile, by key.
      milliseconds: the times of the tuned and of the default tile, by key.
      environment: where they were measured.
    """
    table = _before(file) | {"environment": dict(environment)}
    for part, added in (("tiles", tiles), ("milliseconds", milliseconds)):
        of_all = table[part]
        table[part] = of_all | {implementation: of_all.get(implementation, {}) | dict(added)}
    _write(file, table)


def write_prologues(file: Path, milliseconds: Mapping[str, Sequence[float]]) -> None:
    """Adds the times with and without a prologue to a table; the others stay.

    Args:
      file: as `path` gives it; need not exist.
      milliseconds: with and without, by `layer_key`.
    """
    table = _before(file)
    _write(file, table | {"prologues": table["prologues"] | dict(milliseconds)})


def write_layers(file: Path, layers: Mapping[str, Mapping[str, Any]]) -> None:
    """Adds the times of layers to a table; the other layers stay.

    Args:
      file: as `path` gives it; need not exist.
      layers: by `layer_key`, as the table holds them.
    """
    table = _before(file)
    _write(file, table | {"layers": table["layers"] | dict(layers)})


def _before(file: Path) -> dict[str, Any]:
    return _empty() | (json.loads(file.read_text()) if file.exists() else {})


def _write(file: Path, table: Mapping[str, Any]) -> None:
    """Writes one line for each tile and layer, so that a diff shows which were measured again."""
    parts = [f'"environment": {json.dumps(table["environment"])}']
    for part in ("milliseconds", "tiles"):
        of_each = (f"{json.dumps(name)}: {_lines(rows)}" for name, rows in table[part].items())
        parts.append(f'"{part}": {{{", ".join(of_each)}}}')
    for part in ("prologues", "layers"):
        parts.append(f'"{part}": {_lines(table[part])}')
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("{" + ",\n".join(parts) + "}\n")


def _lines(rows: Mapping[str, Any]) -> str:
    lines = ",\n".join(f"{json.dumps(name)}: {json.dumps(row)}" for name, row in rows.items())
    return f"{{\n{lines}\n}}" if lines else "{}"
