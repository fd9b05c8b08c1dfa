"""Read rows of tensors from the files of their pieces, and answer questions about their bytes.

Plain reads, so that every filesystem will do, and no torch. Files of a repository of the Hub are
read by ranges, ahead of who needs them if these rows were announced (`PieceReader.expect_rows`).
"""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import suppress
from itertools import islice, product
from math import prod
from pathlib import Path
from types import TracebackType
from typing import Literal

from llamaconv.checkpoint.buffers import ReusableBuffer
from llamaconv.checkpoint.fetch_ahead import FetchAhead, Fetched
from llamaconv.checkpoint.remote_file import RemoteFile
from llamaconv.checkpoint.tensors import DTYPE_BYTES, Location, Piece, TensorInfo
from llamaconv.report.errors import FailedError

# Files that one thread keeps open. A block of a matrix that is cut by columns needs several; a
# checkpoint may have more files than a process may open.
_MOST_OPEN = 32
_BLOCK_BYTES = 4 << 20
# A format of `memoryview` for elements of so many bytes, which are only copied.
_CELLS: dict[int, Literal["B", "H", "I", "Q"]] = {1: "B", 2: "H", 4: "I", 8: "Q"}


class PieceReader:
    """Reads runs of rows of any tensor. A context manager that closes its files.

    Threads may share one. Each thread has its own descriptors, so that the system sees how far
    each has read and reads ahead of it.
    """

    def __init__(self, digests: bool = False) -> None:
        """Read nothing yet; with ``digests``, note the digest of every range that is fetched."""
        self._mine = threading.local()
        self._of_threads: list[OrderedDict[Path, int]] = []
        self._ahead = FetchAhead(digests)

    def __enter__(self) -> PieceReader:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._ahead.stop()
        self.close()

    def close(self) -> None:
        """Close the files. No thread may read meanwhile; later reads open them again."""
        for files in self._of_threads:
            while files:
                with suppress(OSError):  # nothing was written, so nothing can be lost
                    os.close(files.popitem()[1])

    def expect_rows(self, tensor: TensorInfo, first: int, last: int) -> None:
        """Announce that these rows are read next, after those that were announced before.

        Of files that are here, nothing is read ahead: the system does that.
        """
        item = DTYPE_BYTES[tensor.dtype]
        for piece in tensor.pieces:
            rows = piece.rows(first, last)
            if rows and isinstance(piece.file, RemoteFile):
                at = piece.offset_of(rows.start, item)
                self._ahead.expect(piece.file, at, at + len(rows) * prod(piece.shape[1:]) * item)

    @property
    def fetched(self) -> list[Fetched]:
        """The ranges of remote files that came so far, if digests were asked for."""
        return self._ahead.fetched

    def start(self) -> None:
        """Begin to fetch what was announced."""
        self._ahead.start()

    def stop(self) -> None:
        """Let every thread that waits for bytes of another machine end soon. Call it from any."""
        self._ahead.stop()

    def read_rows(self, tensor: TensorInfo, first: int, last: int, out: memoryview) -> None:
        """Read rows of a tensor.

        Args:
            tensor: The tensor.
            first: The first row.
            last: The row after the last.
            out: Memory for ``(last - first) * tensor.row_bytes`` bytes.

        Raises:
            FailedError: A file cannot be read or fetched, or is shorter than its header promised.
        """
        item = DTYPE_BYTES[tensor.dtype]
        for piece in tensor.pieces:
            rows = piece.rows(first, last)
            if not rows:
                continue
            if piece.strides:
                self._read_view(tensor, piece, rows, out[(rows.start - first) * tensor.row_bytes :])
                continue
            run = prod(piece.shape[1:]) * item
            at = piece.offset_of(rows.start, item)
            if run == tensor.row_bytes:
                whole = out[(rows.start - first) * run : (rows.stop - first) * run]
                self._read(tensor, piece.file, at, whole)
                continue
            # The piece is narrower than the tensor: its rows are copied into place one by one.
            narrow = self._narrow(len(rows) * run)
            self._read(tensor, piece.file, at, narrow)
            columns, length = _columns(piece, tensor)
            done = 0
            for row in rows:
                for column in columns:
                    begin = (row - first) * tensor.row_bytes + column * item
                    end = done + length * item
                    out[begin : begin + length * item] = narrow[done:end]
                    done = end

    def _read_view(self, tensor: TensorInfo, piece: Piece, rows: range, out: memoryview) -> None:
        """Read rows of a view, along whichever of its axes has elements that are closer together.

        ``out`` begins with the first of the rows.
        """
        item = DTYPE_BYTES[tensor.dtype]
        n_columns, across = prod(piece.shape[1:]), prod(tensor.shape[1:])
        down, along = (*piece.strides, 1)[:2]
        top, left = rows.start - piece.start[0], sum(piece.start[1:])
        # Of each run: its first element in the view, and in the rows that are read.
        if along < down and n_columns > 1:
            length, step, into = n_columns, along, 1
            runs = [((top + n) * down, left + n * across) for n in range(len(rows))]
        else:
            length, step, into = len(rows), down, across
            runs = [(top * down + n * along, left + n) for n in range(n_columns)]
        cells = out[: out.nbytes // item * item].cast(_CELLS[item])
        for at, to in runs:
            narrow = self._narrow(((length - 1) * step + 1) * item)
            self._read(tensor, piece.file, piece.offset + at * item, narrow)
            cells[to : to + (length - 1) * into + 1 : into] = narrow.cast(_CELLS[item])[::step]

    def _narrow(self, n_bytes: int) -> memoryview:
        """Return memory of this thread; each call reuses it."""
        if not hasattr(self._mine, "narrow"):
            self._mine.narrow = ReusableBuffer()
        narrow: ReusableBuffer = self._mine.narrow
        return narrow.take(n_bytes)

    def _read(self, tensor: TensorInfo, file: Location, offset: int, out: memoryview) -> None:
        if isinstance(file, RemoteFile):
            self._ahead.read_into(file, offset, out)
            return
        done = 0
        while done < len(out):
            try:
                got = _read_into(self._descriptor(file), out[done:], offset + done)
            except OSError as error:
                raise FailedError(
                    f"{file}: reading {tensor.name} failed: {error.strerror}"
                ) from error
            if got == 0:
                raise FailedError(
                    f"{file}: {tensor.name} ends {len(out) - done} bytes early; the file was "
                    "modified after it was opened. Try again when nothing writes to it"
                )
            done += got

    def _descriptor(self, file: Path) -> int:
        files: OrderedDict[Path, int] | None = getattr(self._mine, "files", None)
        if files is None:
            files = self._mine.files = OrderedDict()
            self._of_threads.append(files)
        if file not in files:
            if len(files) == _MOST_OPEN:
                os.close(files.popitem(last=False)[1])
            files[file] = os.open(file, os.O_RDONLY)
            # The system reads twice as far ahead: 1.5 GB/s of a cold disk became 3.3.
            if hasattr(os, "posix_fadvise"):  # Linux
                os.posix_fadvise(files[file], 0, 0, os.POSIX_FADV_SEQUENTIAL)
        files.move_to_end(file)
        return files[file]


def _read_into(descriptor: int, out: memoryview, offset: int) -> int:
    """Read into ``out``, perhaps less than it holds; return the bytes. Not every system has preadv."""
    if hasattr(os, "preadv"):
        return os.preadv(descriptor, [out], offset)
    data = os.pread(descriptor, len(out), offset)
    out[: len(data)] = data
    return len(data)


def _columns(piece: Piece, tensor: TensorInfo) -> tuple[list[int], int]:
    """Return where the elements of one row of a piece go in a row of its tensor.

    Returns:
        The first element of each run, in order, and the length of all runs.
    """
    # Axes that the piece has whole lie together; along the last one that it cuts, each run begins.
    axis = max(
        axis for axis in range(1, len(piece.shape)) if piece.shape[axis] != tensor.shape[axis]
    )
    strides = [prod(tensor.shape[at + 1 :]) for at in range(len(tensor.shape))]
    left = sum(n * stride for n, stride in zip(piece.start[1:], strides[1:], strict=True))
    steps = ([n * strides[at] for n in range(piece.shape[at])] for at in range(1, axis))
    return [left + sum(step) for step in product(*steps)], prod(piece.shape[axis:])


def same_bytes(one: TensorInfo, other: TensorInfo, most: int | None = None) -> bool:
    """Return whether two tensors have the same shape, dtype and bits.

    With ``most``, compare only as many rows as fit in that many bytes, and at least one.

    Raises what `PieceReader.read_rows` raises, as do `all_zero` and `all_one`.
    """
    if (one.shape, one.dtype) != (other.shape, other.dtype):
        return False
    blocks = zip(_blocks(one, most), _blocks(other, most), strict=True)
    return all(a == b for a, b in (blocks if most is None else islice(blocks, 1)))


def all_zero(tensor: TensorInfo) -> bool:
    """Return whether every byte is 0 (so -0.0 does not count as zero)."""
    return all(block.count(0) == len(block) for block in _blocks(tensor))


def not_zero(tensors: Sequence[TensorInfo]) -> Iterator[str]:
    """Yield the names of those that are not `all_zero`. Small ones of the Hub come together."""
    with PieceReader() as reader:
        for tensor in tensors:
            reader.expect_rows(tensor, 0, tensor.n_rows)
        reader.start()
        for tensor in tensors:
            blocks = _blocks_by(reader, tensor, _BLOCK_BYTES)
            if any(block.count(0) != len(block) for block in blocks):
                yield tensor.name


_ONE = {
    "float64": b"\0\0\0\0\0\0\xf0\x3f",
    "float32": b"\0\0\x80\x3f",
    "float16": b"\0\x3c",
    "bfloat16": b"\x80\x3f",
}


def all_one(tensor: TensorInfo) -> bool:
    """Return whether every element is 1."""
    one = _ONE.get(tensor.dtype, b"")
    return all(block == one * (len(block) // max(1, len(one))) for block in _blocks(tensor))


def _blocks(tensor: TensorInfo, n_bytes: int | None = None) -> Iterator[bytearray]:
    with PieceReader() as reader:
        yield from _blocks_by(reader, tensor, n_bytes or _BLOCK_BYTES)


def _blocks_by(reader: PieceReader, tensor: TensorInfo, n_bytes: int) -> Iterator[bytearray]:
    for first, last in tensor.windows(n_bytes):
        block = bytearray((last - first) * tensor.row_bytes)
        reader.read_rows(tensor, first, last, memoryview(block))
        yield block
