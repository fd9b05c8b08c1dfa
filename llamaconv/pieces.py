"""The reader model: a checkpoint is a set of named rectangles of bytes in files.

Every format opens to the same values, and everything after works on these alone. No format
is known here, and neither is torch: dtypes are torch's names as text.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

from llamaconv import keys
from llamaconv.remote import Remote

if TYPE_CHECKING:
    pass

DTYPE_BYTES = {
    "float64": 8,
    "float32": 4,
    "float16": 2,
    "bfloat16": 2,
    "float8_e4m3fn": 1,
    "float8_e5m2": 1,
    "float8_e8m0fnu": 1,
    "complex64": 8,
    "int64": 8,
    "int32": 4,
    "int16": 2,
    "int8": 1,
    "uint64": 8,
    "uint32": 4,
    "uint16": 2,
    "uint8": 1,
    "bool": 1,
}
# What a Llama's weights may be stored as; the others are quantised or no weights at all.
WEIGHT_DTYPES = ("float64", "float32", "float16", "bfloat16")


@dataclass(frozen=True)
class Piece:
    """One rectangle: row-major bytes from ``offset`` on in ``file``.

    ``start`` is where it sits in the tensor, ``shape`` its extent, both in elements.
    """

    file: Path | Remote
    offset: int
    start: tuple[int, ...]
    shape: tuple[int, ...]

    @property
    def local_file(self) -> Path:
        """``file``, for who reads weights. Raises `RefusedError` where it is on the Hub."""
        if isinstance(self.file, Remote):
            raise self.file.refusal()
        return self.file


@dataclass(frozen=True)
class TensorInfo:
    """Name, dtype (torch's name), shape, and the pieces that make the tensor up.

    ``stored`` is the name of the tensor in the files that this one is rows of, if it is.
    ``is_part`` says that further files may hold more of it.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    pieces: tuple[Piece, ...] = ()
    stored: str = ""
    is_part: bool = False

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * DTYPE_BYTES[self.dtype]

    @property
    def n_rows(self) -> int:
        return self.shape[0] if self.shape else 1

    @property
    def row_bytes(self) -> int:
        return prod(self.shape[1:]) * DTYPE_BYTES[self.dtype]

    @property
    def files(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(piece.file.name for piece in self.pieces))

    def not_covered(self) -> str:
        """What is wrong with how the pieces make the tensor up; nothing where they tile it."""
        for piece in self.pieces:
            ends = [start + n for start, n in zip(piece.start, piece.shape, strict=True)]
            if any(end > n for end, n in zip(ends, self.shape, strict=True)):
                return f"a piece in {piece.file.name} reaches beyond shape {list(self.shape)}"
        found = sum(prod(piece.shape) for piece in self.pieces)
        if found != prod(self.shape):
            return f"its pieces have {found} elements, {prod(self.shape)} expected"
        # Without an overlap, that many elements leave no gap.
        if _overlap([piece for piece in self.pieces if prod(piece.shape)]):
            return "two of its pieces overlap"
        return ""

    def rows_of(self, name: str, runs: Sequence[tuple[int, int]]) -> TensorInfo:
        """The tensor ``name`` made of runs of this one's rows (first, and the last excluded)."""
        pieces, length = [], 0
        for first, last in runs:
            for piece in self.pieces:
                top = piece.start[0]
                begin, end = max(first, top), min(last, top + piece.shape[0])
                if begin >= end:
                    continue
                skipped = (begin - top) * prod(piece.shape[1:]) * DTYPE_BYTES[self.dtype]
                pieces.append(
                    Piece(
                        piece.file,
                        piece.offset + skipped,
                        (length + begin - first, *piece.start[1:]),
                        (end - begin, *piece.shape[1:]),
                    )
                )
            length += last - first
        return TensorInfo(name, self.dtype, (length, *self.shape[1:]), tuple(pieces))


def _overlap(pieces: Sequence[Piece]) -> bool:
    """Whether any two pieces (none of them empty) have an element in common."""
    axes = range(len(pieces[0].start)) if pieces else ()
    # Along the axis with the most cuts there are few to compare each one with.
    axis = max(axes, key=lambda axis: len({piece.start[axis] for piece in pieces}), default=None)
    if axis is None:
        return len(pieces) > 1  # of a single element
    pieces = sorted(pieces, key=lambda piece: piece.start[axis])
    for number, one in enumerate(pieces):
        end = one.start[axis] + one.shape[axis]
        for at in range(number + 1, len(pieces)):
            other = pieces[at]
            if other.start[axis] >= end:
                break  # and so do all after it
            spans = zip(one.start, one.shape, other.start, other.shape, strict=True)
            if all(max(a, c) < min(a + n, c + m) for a, n, c, m in spans):
                return True
    return False


def shapes_by_role(
    tensors: Mapping[str, TensorInfo], naming: str | None
) -> dict[str, tuple[int, ...]]:
    """The shape of the first tensor of each role; names that ``naming`` knows not are left out."""
    shapes: dict[str, tuple[int, ...]] = {}
    for name, tensor in tensors.items():
        if known := keys.identify(name, naming):
            shapes.setdefault(known[0].name, tensor.shape)
    return shapes
