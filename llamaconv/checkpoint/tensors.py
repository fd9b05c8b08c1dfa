"""Tensors as named rectangles of bytes in files.

Every format opens to these values, and everything after works on them alone. This module knows no
format and does without torch: dtypes are torch's names as text.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path

from llamaconv.checkpoint.address import local
from llamaconv.checkpoint.remote_file import RemoteFile
from llamaconv.model.names import identify

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
"""Bytes per element of each dtype that can be read."""

WEIGHT_DTYPES = ("float64", "float32", "float16", "bfloat16")
"""Dtypes that the weights of a Llama may have; the others are quantised or not weights."""

Location = Path | RemoteFile
"""A local file, or a file of a repository of which only the header was read."""


@dataclass(frozen=True)
class Piece:
    """One rectangle of a tensor, stored row by row.

    Attributes:
        file: The file that holds it.
        offset: Its first byte in the file.
        start: Where it begins in the tensor, in elements per axis.
        shape: Its extent, in elements per axis.
        strides: The distance of its rows and columns in the file, in elements, if torch saved a
            view; empty if they follow each other.
    """

    file: Location
    offset: int
    start: tuple[int, ...]
    shape: tuple[int, ...]
    strides: tuple[int, ...] = ()

    @property
    def local_file(self) -> Path:
        """``file`` as a path. Raises `RefusedError` if it is on the Hub."""
        return local(self.file)

    def rows(self, first: int, last: int) -> range:
        """Return which of the tensor's rows ``first`` to ``last`` (half-open) this piece has."""
        top, n_rows = (self.start[0], self.shape[0]) if self.shape else (0, 1)
        return range(max(first, top), min(last, top + n_rows))

    def offset_of(self, row: int, element_bytes: int) -> int:
        """Return the byte in ``file`` at which the tensor's row ``row`` begins in this piece."""
        skipped = row - self.start[0] if self.start else 0
        step = self.strides[0] if self.strides else prod(self.shape[1:])
        return self.offset + skipped * step * element_bytes


@dataclass(frozen=True)
class TensorInfo:
    """What a header says about one tensor.

    Attributes:
        name: Its name in the checkpoint.
        dtype: Torch's name of its dtype.
        shape: Its extent, in elements per axis.
        pieces: The rectangles that make it up.
        stored: The name of the stored tensor that this one is a run of rows of, or "".
        keys: The keys that lead to it in what torch.load returns; empty in other files.
        is_part: Whether further files may hold more of it.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    pieces: tuple[Piece, ...] = ()
    stored: str = ""
    keys: tuple[str, ...] = ()
    is_part: bool = False

    @property
    def nbytes(self) -> int:
        """Bytes of the whole tensor."""
        return prod(self.shape) * DTYPE_BYTES[self.dtype]

    @property
    def n_rows(self) -> int:
        """Length of the first axis; a scalar has one row."""
        return self.shape[0] if self.shape else 1

    @property
    def row_bytes(self) -> int:
        """Bytes per row."""
        return prod(self.shape[1:]) * DTYPE_BYTES[self.dtype]

    @property
    def files(self) -> tuple[str, ...]:
        """Names of the files that hold it."""
        return tuple(dict.fromkeys(piece.file.name for piece in self.pieces))

    @property
    def is_here(self) -> bool:
        """Whether its bytes can be read, and not its header alone."""
        return not any(isinstance(piece.file, RemoteFile) for piece in self.pieces)

    def windows(
        self, n_bytes: int, unit: int = 1, first: int = 0, last: int | None = None
    ) -> Iterator[tuple[int, int]]:
        """Cut rows into runs that fit in memory.

        Args:
            n_bytes: Bytes per run, at most. A single unit may be longer.
            unit: Rows that must stay together; each run begins and ends at a multiple of it.
            first: The first row. The unit that it belongs to is included.
            last: The row after the last. None stands for the end of the tensor.

        Yields:
            The first row of each run and the row after its last. Nothing for a tensor without
            bytes, however many rows its shape claims.
        """
        last = self.n_rows if last is None else last
        if not self.nbytes:
            return
        end = last + -last % unit  # rounded up to whole units
        step = max(1, n_bytes // (unit * self.row_bytes)) * unit
        for begin in range(first - first % unit, last, step):
            yield begin, min(begin + step, end)

    def coverage_error(self) -> str:
        """Return why the pieces do not tile the tensor, or "" if they do."""
        for piece in self.pieces:
            ends = [start + n for start, n in zip(piece.start, piece.shape, strict=True)]
            if any(end > n for end, n in zip(ends, self.shape, strict=True)):
                return f"a piece in {piece.file.name} reaches beyond shape {list(self.shape)}"
        found = sum(prod(piece.shape) for piece in self.pieces)
        if found != prod(self.shape):
            return f"its pieces have {found} elements instead of {prod(self.shape)}"
        # Without an overlap, that many elements leave no gap.
        if _overlap([piece for piece in self.pieces if prod(piece.shape)]):
            return "two of its pieces overlap"
        return ""

    def rows_of(self, name: str, runs: Sequence[tuple[int, int]]) -> TensorInfo:
        """Return the tensor ``name`` that consists of ``runs`` (half-open) of this one's rows."""
        pieces, length = [], 0
        for first, last in runs:
            for piece in self.pieces:
                if rows := piece.rows(first, last):
                    offset = piece.offset_of(rows.start, DTYPE_BYTES[self.dtype])
                    start = (length + rows.start - first, *piece.start[1:])
                    shape = (len(rows), *piece.shape[1:])
                    pieces.append(Piece(piece.file, offset, start, shape, piece.strides))
            length += last - first
        return TensorInfo(name, self.dtype, (length, *self.shape[1:]), tuple(pieces))

    def slab(self, name: str, index: int) -> TensorInfo:
        """Return the tensor ``name`` that is this one at ``index`` of its first axis."""
        pieces = tuple(
            Piece(
                piece.file,
                piece.offset_of(index, DTYPE_BYTES[self.dtype]),
                piece.start[1:],
                piece.shape[1:],
                piece.strides[1:],
            )
            for piece in self.pieces
            if piece.rows(index, index + 1)
        )
        return TensorInfo(name, self.dtype, self.shape[1:], pieces)


def _overlap(pieces: Sequence[Piece]) -> bool:
    """Return whether two pieces (none of them empty) have an element in common."""
    axes = range(len(pieces[0].start)) if pieces else ()
    # Along the axis with the most cuts, each piece has few others to be compared with.
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
    """Return the shape of the first tensor of each role; unknown names are left out."""
    shapes: dict[str, tuple[int, ...]] = {}
    for name, tensor in tensors.items():
        if known := identify(name, naming):
            shapes.setdefault(known[0].name, tensor.shape)
    return shapes
