"""Reading rows of tensors from wherever their pieces lie; plain reads, so every filesystem will do."""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from math import prod
from pathlib import Path
from types import TracebackType

from llamaconv.pieces import DTYPE_BYTES, TensorInfo
from llamaconv.problems import FailedError
from llamaconv.scratch import Reused

# Files that one thread keeps open: a block of a matrix that is cut by columns lies in several. A
# checkpoint may have more files than a process may open.
_MOST_OPEN = 32


class PieceReader:
    """Reads runs of rows of any tensor.

    Safe to share between threads. Each has descriptors of its own, so that the system sees how
    far each has read and reads ahead of it. Use as a context manager; it closes all of them.
    """

    def __init__(self) -> None:
        self._mine = threading.local()
        self._of_threads: list[OrderedDict[Path, int]] = []

    def __enter__(self) -> PieceReader:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for files in self._of_threads:
            while files:
                os.close(files.popitem()[1])

    def read_rows(self, tensor: TensorInfo, first: int, last: int, out: memoryview) -> None:
        """Fill ``out`` (bytes) with rows ``first`` to ``last``, the last one excluded.

        Raises `FailedError` where a file gives fewer bytes than its header promised, and
        `RefusedError` where it is on the Hub.
        """
        item = DTYPE_BYTES[tensor.dtype]
        for piece in tensor.pieces:
            top = piece.start[0] if piece.start else 0
            begin, end = max(first, top), min(last, top + (piece.shape[0] if piece.shape else 1))
            if begin >= end:
                continue
            run = prod(piece.shape[1:]) * item
            at = piece.offset + (begin - top) * run
            if run == tensor.row_bytes:
                whole = out[(begin - first) * run : (end - first) * run]
                self._read(tensor, piece.local_file, at, whole)
                continue
            # The piece is narrower than the tensor: each of its rows goes to its own place.
            narrow = self._narrow((end - begin) * run)
            self._read(tensor, piece.local_file, at, narrow)
            column = piece.start[1] * prod(tensor.shape[2:]) * item
            for row in range(end - begin):
                place = (begin - first + row) * tensor.row_bytes + column
                out[place : place + run] = narrow[row * run : (row + 1) * run]

    def _narrow(self, n_bytes: int) -> memoryview:
        """Memory of this thread, the same each time."""
        if not hasattr(self._mine, "narrow"):
            self._mine.narrow = Reused()
        narrow: Reused = self._mine.narrow
        return narrow.take(n_bytes)

    def _read(self, tensor: TensorInfo, file: Path, offset: int, out: memoryview) -> None:
        done = 0
        while done < len(out):
            try:
                got = os.preadv(self._descriptor(file), [out[done:]], offset + done)
            except OSError as error:
                raise FailedError(
                    f"{file}: reading {tensor.name} failed: {error.strerror}"
                ) from error
            if got == 0:
                raise FailedError(
                    f"{file}: {tensor.name} ends {len(out) - done} bytes early; the file has "
                    "changed since its header was read. Start again when nothing writes to it"
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
            os.posix_fadvise(files[file], 0, 0, os.POSIX_FADV_SEQUENTIAL)
        files.move_to_end(file)
        return files[file]
