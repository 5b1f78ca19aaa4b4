"""Coding a network to the last bit: values in a codebook, gaps between them, Huffman codes.

The file: `bsjc`, a version byte, the CRC-32 of all that follows, the length of the header, the
header (compressed JSON: a name, shape and dtype for each leaf), and the leaves' bytes.
"""

import dataclasses
import json
import struct
import zlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from blocksparse_jax import _checks, tree
from blocksparse_jax.compression import huffman

_MAGIC, _VERSION = b"bsjc", 1
_START, _LENGTH = struct.Struct("<4sBI"), struct.Struct("<I")
_MOST_VALUES = 2**16 - 1
_CONV_GAP_BITS, _DENSE_GAP_BITS = 8, 5
_UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
_PARTS = ("codebooks", "gaps", "values", "tables", "uncoded")


@dataclasses.dataclass(frozen=True)
class Compressed:
    """A coded network.

    Attributes:
      data: the bytes of its file, which `decompress` reads.
      bits: what they hold, in bits: `codebooks` (the values), `gaps` and `values` (Huffman codes),
        `tables` (of these), `uncoded` (leaves that coding would not shorten) and `header`.
      bits_before: of the arrays.

    Example:
      >>> Compressed(data=bytes(10), bits={"uncoded": 80}, bits_before=320).rate
      4.0
    """

    data: bytes
    bits: dict[str, int]
    bits_before: int

    @property
    def rate(self) -> float:
        """How many times smaller the file is than the arrays."""
        return self.bits_before / (8 * len(self.data))


def compress(params: PyTree) -> Compressed:
    """Codes arrays without loss: zeros take next to nothing, and so do values that are shared.

    Of each leaf it writes the distinct values that are not zero (the codebook), and for each such
    weight, in C order, its gap to the one before and the number of its value, both in Huffman
    codes. A gap that is too long for its bits has filler zeros in it. A leaf that this would not
    shorten is written as it is.

    Args:
      params: any pytree of arrays; share their values first (`share_weights`).

    Returns:
      The coded network: its bytes, what they hold, and the compression rate.

    Raises:
      ValueError: a leaf is no array of numbers, is traced, or two leaves have one name.
      ImportError: the package bitarray is not installed.

    Example:
      >>> params = {"w": jnp.array([[0.0, 1.5, 1.5, 0.0]]), "bias": jnp.ones(1)}
      >>> decompress(compress(params).data)["w"].tolist()
      [[0.0, 1.5, 1.5, 0.0]]

    Reference: Han, Mao & Dally, "Deep compression", ICLR 2016: gaps of 8 bits in convolutions and 5
    in dense layers, Huffman codes of both. Coding a zero's place by a filler value is theirs, the
    file is ours.
    """
    leaves = jax.tree.leaves_with_path(params)
    headers: list[dict[str, Any]] = []
    pieces: list[bytes] = []
    bits = dict.fromkeys((*_PARTS, "header"), 0)
    before = 0
    for path, leaf in leaves:
        name = tree.path_name(path)
        array = _array(name, leaf)
        before += 8 * array.nbytes
        header, parts = _encode_leaf(array)
        headers.append({"name": name, "shape": array.shape, "dtype": str(array.dtype)} | header)
        for part, data in parts:
            bits[part] += 8 * len(data)
            pieces.append(data)
    if len({header["name"] for header in headers}) < len(headers):
        raise ValueError("params: two leaves have the same path name; rename one")
    text = zlib.compress(json.dumps(headers, separators=(",", ":")).encode(), 9)
    bits["header"] = 8 * (_START.size + _LENGTH.size + len(text))
    rest = _LENGTH.pack(len(text)) + text + b"".join(pieces)
    return Compressed(_START.pack(_MAGIC, _VERSION, zlib.crc32(rest)) + rest, bits, before)


def decompress(data: bytes, like: PyTree | None = None) -> PyTree:
    """Decodes arrays, bit for bit.

    Args:
      data: from `compress(params).data`.
      like: a tree whose structure the result has, with leaves of the same names, shapes and dtypes
        (`params`, or `jax.eval_shape` of them); None gives nested dicts.

    Returns:
      The arrays.

    Raises:
      ValueError: the data are no coded network, are cut short or have changed, or are of another
        network than `like`.
      ImportError: the package bitarray is not installed.

    Example:
      >>> params = {"layer": {"bias": jnp.arange(3.0)}}
      >>> decompress(compress(params).data)["layer"]["bias"].tolist()
      [0.0, 1.0, 2.0]
    """
    headers, payload = _read_start(data)
    arrays, place = {}, 0
    for header in headers:
        sizes = header["bytes"]
        parts = [payload[place + end - size : place + end] for size, end in _ends(sizes)]
        place += sum(sizes)
        try:
            arrays[header["name"]] = jnp.asarray(_decode_leaf(header, parts))
        except ValueError as error:
            raise ValueError(f"data: {header['name']!r} cannot be decoded: {error}") from error
    return _nested(arrays) if like is None else _as(like, arrays)


def _array(name: str, leaf: Any) -> np.ndarray:
    dtype = jnp.result_type(leaf)
    if not (jnp.issubdtype(dtype, jnp.number) or jnp.issubdtype(dtype, jnp.bool_)):
        raise ValueError(f"params: expected an array of numbers at {name!r}, got {dtype}")
    array = _checks.concrete(name, leaf)
    return np.ascontiguousarray(array).reshape(np.shape(leaf))


def _encode_leaf(array: np.ndarray) -> tuple[dict[str, Any], list[tuple[str, bytes]]]:
    """What the header says of a leaf, and its bytes by part."""
    plain: list[tuple[str, bytes]] = [("uncoded", array.tobytes())]
    as_it_is = {"bytes": [array.nbytes]}, plain
    unsigned = _UNSIGNED.get(array.itemsize)
    if unsigned is None:
        return as_it_is
    flat = array.reshape(-1).view(unsigned)
    places = np.flatnonzero(flat)
    codebook, numbers = np.unique(flat[places], return_inverse=True)
    if codebook.size > _MOST_VALUES:
        return as_it_is
    gap_bits = _CONV_GAP_BITS if array.ndim > 2 else _DENSE_GAP_BITS
    gaps, values = _with_fillers(places, numbers + 1, 2**gap_bits)
    gap_codes, value_codes = huffman.encode(gaps), huffman.encode(values)
    tables = b"".join(
        part.astype("<u4" if part is codes.lengths else "<u2").tobytes()
        for codes in (gap_codes, value_codes)
        for part in (codes.lengths, codes.symbols)
    )
    parts = [
        ("codebooks", codebook.tobytes()),
        ("tables", tables),
        ("gaps", gap_codes.stream),
        ("values", value_codes.stream),
    ]
    if sum(len(data) for _, data in parts) >= array.nbytes:
        return as_it_is
    sizes = [codes.size for pair in (gap_codes, value_codes) for codes in pair[:2]]
    header = {"bytes": [len(data) for _, data in parts], "codes": gaps.size, "tables": sizes}
    return header, parts


def _decode_leaf(header: dict[str, Any], parts: list[bytes]) -> np.ndarray:
    shape, dtype = tuple(header["shape"]), jnp.dtype(header["dtype"])
    if "codes" not in header:
        return np.frombuffer(parts[0], dtype).reshape(shape)
    codebook, tables, *streams = parts
    columns, place = [], 0
    for which, size in enumerate(header["tables"]):
        kind = np.dtype("<u2" if which % 2 else "<u4")
        columns.append(np.frombuffer(tables, kind, size, place))
        place += size * kind.itemsize
    coded = zip(columns[::2], columns[1::2], streams, strict=True)
    gaps, values = (huffman.decode(huffman.Coded(*part), header["codes"]) for part in coded)
    unsigned = _UNSIGNED[dtype.itemsize]
    book = np.concatenate([np.zeros(1, unsigned), np.frombuffer(codebook, unsigned)])
    flat = np.zeros(int(np.prod(shape)), unsigned)
    places = np.cumsum(gaps + 1) - 1
    if places.size and (places[-1] >= flat.size or values.max() >= book.size):
        raise ValueError("its codes point beyond its arrays")
    flat[places] = book[values]
    return flat.view(dtype).reshape(shape)


def _with_fillers(
    places: np.ndarray, numbers: np.ndarray, longest: int
) -> tuple[np.ndarray, np.ndarray]:
    """Gaps below `longest` and values: one of the number 0 is a filler, which stands for a zero.

    A filler comes after `longest - 1` zeros and is itself one.
    """
    gaps = np.diff(places, prepend=-1) - 1
    fillers, rest = np.divmod(gaps, longest)
    ends = np.cumsum(fillers + 1) - 1
    total = int(ends[-1]) + 1 if ends.size else 0
    all_gaps, all_numbers = np.full(total, longest - 1), np.zeros(total, np.int64)
    all_gaps[ends], all_numbers[ends] = rest, numbers
    return all_gaps, all_numbers


def _read_start(data: bytes) -> tuple[list[dict[str, Any]], bytes]:
    """The header and the leaves' bytes; ValueError where they are not whole."""
    if len(data) < _START.size or data[:4] != _MAGIC:
        raise ValueError("data: expected the bytes of compress(params).data, got others")
    _, version, checksum = _START.unpack_from(data)
    if version != _VERSION:
        raise ValueError(
            f"data: expected version {_VERSION}, got {version}; read it with the version of "
            "blocksparse_jax that wrote it"
        )
    if zlib.crc32(data[_START.size :]) != checksum:
        raise ValueError(
            "data: the checksum differs, so the bytes are cut short or have changed; copy the file "
            "again"
        )
    begin = _START.size + _LENGTH.size
    end = begin + _LENGTH.unpack_from(data, _START.size)[0]
    return json.loads(zlib.decompress(data[begin:end])), data[end:]


def _ends(sizes: list[int]) -> list[tuple[int, int]]:
    return list(zip(sizes, np.cumsum(sizes).tolist(), strict=True))


def _nested(arrays: dict[str, Any]) -> Any:
    """Nested dicts of named arrays; the array itself where it has no name."""
    if set(arrays) == {""}:
        return arrays[""]
    nested: dict[str, Any] = {}
    for name, array in arrays.items():
        *above, last = name.split("/")
        node = nested
        for key in above:
            node = node.setdefault(key, {})
        node[last] = array
    return nested


def _as(like: PyTree, arrays: dict[str, Any]) -> PyTree:
    """The arrays in the structure of a tree."""
    leaves = jax.tree.leaves_with_path(like)
    expected = {tree.path_name(p): (tuple(leaf.shape), str(leaf.dtype)) for p, leaf in leaves}
    got = {name: (tuple(array.shape), str(array.dtype)) for name, array in arrays.items()}
    if expected != got:
        name = min(name for name in expected | got if expected.get(name) != got.get(name))
        raise ValueError(
            f"like: expected the tree that was compressed; at {name!r} the data hold "
            f"{got.get(name)}, like holds {expected.get(name)}"
        )
    return jax.tree.unflatten(jax.tree.structure(like), [arrays[name] for name in expected])
