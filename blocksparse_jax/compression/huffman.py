"""Canonical Huffman codes: a stream of symbols, and the table that decodes it."""

import itertools
from typing import Any, NamedTuple

import numpy as np


class Coded(NamedTuple):
    """A stream of symbols.

    Attributes:
      lengths: uint32, how many codes there are of each length in bits, from 0 on.
      symbols: uint32, in the order of their codes.
      stream: the codes, padded to bytes.
    """

    lengths: np.ndarray
    symbols: np.ndarray
    stream: bytes


def encode(symbols: np.ndarray) -> Coded:
    """Codes symbols by how often each occurs.

    Args:
      symbols: `[n]` integers of at least 0.

    Returns:
      Codes and table; all empty without symbols.
    """
    if symbols.size == 0:
        empty = np.zeros(0, np.uint32)
        return Coded(empty, empty, b"")
    bits, util = _bitarray()
    alphabet, counts = np.unique(symbols, return_counts=True)
    frequencies = dict(zip(alphabet.tolist(), counts.tolist(), strict=True))
    codes, lengths, order = util.canonical_huffman(frequencies)
    stream = bits()
    stream.encode(codes, symbols.tolist())
    return Coded(np.array(lengths, np.uint32), np.array(order, np.uint32), stream.tobytes())


def decode(coded: Coded, count: int) -> np.ndarray:
    """The symbols of a stream.

    Args:
      coded: from `encode`.
      count: of symbols.

    Returns:
      `[count]`, int64.

    Raises:
      ValueError: the stream ends before.
    """
    if count == 0:
        return np.zeros(0, np.int64)
    bits, util = _bitarray()
    stream = bits()
    stream.frombytes(coded.stream)
    symbols = util.canonical_decode(stream, coded.lengths.tolist(), coded.symbols.tolist())
    return np.fromiter(itertools.islice(symbols, count), np.int64)


def _bitarray() -> tuple[Any, Any]:
    try:
        import bitarray
        import bitarray.util
    except ImportError as error:
        raise ImportError(
            "Huffman codes need the package bitarray; install it with: pip install "
            "'blocksparse-jax[compression]'"
        ) from error
    return bitarray.bitarray, bitarray.util
