"""Questions about bytes that a plan hangs on, answered a block at a time and without torch."""

from __future__ import annotations

from collections.abc import Iterable

from llamaconv.piece_reader import PieceReader
from llamaconv.pieces import TensorInfo

_BLOCK_BYTES = 1 << 22


def same_bytes(one: TensorInfo, other: TensorInfo) -> bool:
    """Whether two tensors have the same shape, dtype and bits."""
    if (one.shape, one.dtype) != (other.shape, other.dtype):
        return False
    with PieceReader() as reader:
        for first, last in _blocks(one):
            if _rows(reader, one, first, last) != _rows(reader, other, first, last):
                return False
    return True


def all_zero(tensor: TensorInfo) -> bool:
    """Whether every byte is 0 (so -0.0 does not count as zero)."""
    with PieceReader() as reader:
        for first, last in _blocks(tensor):
            rows = _rows(reader, tensor, first, last)
            if rows.count(0) != len(rows):
                return False
    return True


_ONE = {
    "float64": b"\0\0\0\0\0\0\xf0\x3f",
    "float32": b"\0\0\x80\x3f",
    "float16": b"\0\x3c",
    "bfloat16": b"\x80\x3f",
}


def all_one(tensor: TensorInfo) -> bool:
    """Whether every element is 1."""
    one = _ONE.get(tensor.dtype, b"")
    with PieceReader() as reader:
        for first, last in _blocks(tensor):
            rows = _rows(reader, tensor, first, last)
            if rows != one * (len(rows) // max(1, len(one))):
                return False
    return True


def _rows(reader: PieceReader, tensor: TensorInfo, first: int, last: int) -> bytearray:
    rows = bytearray((last - first) * tensor.row_bytes)
    reader.read_rows(tensor, first, last, memoryview(rows))
    return rows


def _blocks(tensor: TensorInfo) -> Iterable[tuple[int, int]]:
    if not tensor.nbytes:
        return  # however many rows of no bytes its shape claims
    step = max(1, _BLOCK_BYTES // max(1, tensor.row_bytes))
    for first in range(0, tensor.n_rows, step):
        yield first, min(first + step, tensor.n_rows)
