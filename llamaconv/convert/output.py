"""Write one file of a target: the bytes of tensors, and the bytes around them.

What an earlier run wrote of the same file is reused as far as its journal records it and the digest
of the bytes agrees, so that an interrupted run can be continued.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

import torch
import xxhash

from llamaconv.checkpoint.buffers import ReusableBuffer, scratch
from llamaconv.convert.direct import DirectFile
from llamaconv.convert.journal import Journal, JournalEntry
from llamaconv.report.errors import STOPPED, FailedError

# At most this much of a file is written again after a kill. Shorter files have no journal.
_JOURNAL_BYTES = 8 << 20
_READ_BYTES = 1 << 20


@dataclass(frozen=True)
class Written:
    """Whole rows of a tensor in a file of the target, from byte ``offset`` on."""

    name: str
    first: int
    last: int
    row_bytes: int
    path: Path
    offset: int
    digest: str


class Blocks(Protocol):
    """Where the bytes of the target come from."""

    def blocks(self, name: str, first: int, last: int) -> Iterator[memoryview]:
        """Yield rows ``first`` to ``last`` (excluded) of tensor ``name``, in order.

        A block is valid until the next is asked for, which reuses its memory.
        """

    def expect(self, name: str, first: int, last: int, kept: int) -> None:
        """Prepare for rows ``first`` to ``last`` of a file, of which ``kept`` are already there.

        `blocks` is called for the others, after those that were expected before.
        """

    def is_needed_again(self, name: str) -> bool:  # noqa: ARG002
        """Return whether `wrote` is to be told where the rows of a tensor are."""
        return False

    def wrote(self, written: Written) -> None:
        """Note rows that can be read from the target now."""

    def is_valid(self, name: str) -> bool:
        """Return whether no value of ``name`` has overflowed so far."""


class CountedBlocks(Blocks, Protocol):
    """`Blocks` of a whole target, and what is told about the files that they went to."""

    def start(self) -> None:
        """Begin to fetch what is expected, if it is on another machine."""

    def stop(self) -> None:
        """Let every thread that waits for bytes of another machine end soon."""

    def count(self, n_written: int, n_reused: int = 0) -> None:
        """Add bytes of tensors that were written, and bytes that were already in their file."""

    def note_refusal(self) -> None:
        """Note that the filesystem refused to be written around the page cache."""


@dataclass(frozen=True)
class Payload:
    """Rows of a tensor as one file holds them.

    Attributes:
        blocks: Where the bytes come from.
        name: The tensor.
        first: Its first row in the file.
        last: The row after its last.
        row_bytes: Bytes of one row of the tensor.
        columns: The bytes of each row that the file holds, half-open; None for whole rows.
    """

    blocks: Blocks
    name: str
    first: int
    last: int
    row_bytes: int
    columns: tuple[int, int] | None = None

    @property
    def n_rows(self) -> int:
        """Number of rows in the file."""
        return self.last - self.first

    @property
    def bytes_per_row(self) -> int:
        """Bytes of one row in the file."""
        left, right = self.columns or (0, self.row_bytes)
        return right - left

    @property
    def is_valid(self) -> bool:
        """Whether no value of the tensor has overflowed so far."""
        return self.blocks.is_valid(self.name)

    def expect(self, row: int) -> None:
        """Prepare for `read` from row ``row`` on."""
        self.blocks.expect(self.name, self.first, self.last, row)

    def read(self, row: int) -> Iterator[memoryview]:
        """Yield the bytes from row ``row`` of the payload to its end; see `Blocks.blocks`."""
        blocks = self.blocks.blocks(self.name, self.first + row, self.last)
        return blocks if self.columns is None else self._cut(blocks, *self.columns)

    def _cut(self, blocks: Iterator[memoryview], left: int, right: int) -> Iterator[memoryview]:
        buffer = ReusableBuffer()
        for block in blocks:
            rows = torch.frombuffer(block, dtype=torch.uint8).view(-1, self.row_bytes)
            cut = rows[:, left:right]
            out = buffer.take(cut.numel())
            torch.frombuffer(out, dtype=torch.uint8).view(cut.shape).copy_(cut)
            yield out


class Output:
    """A file that is written from start to end. A context manager.

    After the block the file is complete, but perhaps not fsynced. Every method raises ``OSError``,
    and `FailedError` once ``stop`` is set.
    """

    def __init__(
        self,
        folder: Path,
        name: str,
        stop: threading.Event,
        count: Callable[[int, int], None],
        direct: bool = False,
    ) -> None:
        """Open the file, or open again what an earlier run left.

        Args:
            folder: The unfinished target.
            name: Name of the file.
            stop: Set once another thread has failed.
            count: Called with the bytes of tensors written, and the bytes reused.
            direct: Whether to write around the page cache, see `direct`.
        """
        self.path = folder / name
        self._stop = stop
        self._count = count
        self._journal = Journal(folder, name)
        self._before = self._journal.read()
        # A file without a valid journal was removed before.
        self._file = self.path.open("r+b" if self._before else "xb", buffering=0)
        self._direct = DirectFile(self.path, self._file.fileno()) if direct else None
        # What is written and not in the journal yet, with the place in the file where it ends.
        self._pending: list[tuple[int, JournalEntry]] = []
        self._number = 0
        self._since = 0

    def __enter__(self) -> Output:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with self._file, self._closing():
            if error is None:
                if self._direct is not None:
                    self._direct.flush()
                self._file.truncate(self.tell())
                if self._journal.exists:
                    self._add_to_journal()

    @contextmanager
    def _closing(self) -> Iterator[None]:
        try:
            yield
        finally:
            if self._direct is not None:
                self._direct.close()

    def fileno(self) -> int:
        """Return the file descriptor."""
        return self._file.fileno()

    @property
    def was_refused(self) -> bool:
        """Whether the filesystem refused to be written around the page cache."""
        return self._direct is not None and not self._direct.is_direct

    def discard_journal(self) -> None:
        """Delete this file's journal, so that a resumed run rewrites the file."""
        self._journal.remove()

    def tell(self) -> int:
        """Return the position in the file, in bytes."""
        return self._file.tell() if self._direct is None else self._direct.place

    def write(self, data: Any) -> int:
        """Write all of ``data``, although one call may write a part only; return its bytes."""
        left = view = memoryview(data).cast("B")
        if self._direct is not None:
            self._direct.write(view)
            return len(view)
        while len(left):
            left = left[self._file.write(left) :]
        return len(view)

    def stream(self, payload: Payload) -> tuple[int, str]:
        """Write what is missing of a payload; return its bytes and their xxh3-128 digest."""
        begin = self.tell()
        rows, digest = self._reuse(payload)
        n_bytes = rows * payload.bytes_per_row
        for block in payload.read(rows):
            if self._stop.is_set():
                raise FailedError(STOPPED)
            digest.update(block)
            self.write(block)
            self._count(len(block), 0)
            n_bytes += len(block)
            self._since += len(block)
            if self._since >= _JOURNAL_BYTES:
                self._note(payload, n_bytes, digest)
                self._add_to_journal()
                self._since = 0
        self._note(payload, n_bytes, digest)
        self._number += 1
        if payload.columns is None and payload.blocks.is_needed_again(payload.name):
            if self._direct is not None:
                self._direct.flush()
            which = (payload.name, payload.first, payload.last, payload.row_bytes)
            payload.blocks.wrote(Written(*which, self.path, begin, digest.hexdigest()))
        return n_bytes, digest.hexdigest()

    def _note(self, payload: Payload, n_bytes: int, digest: xxhash.xxh3_128) -> None:
        # Rows that overflowed are not recorded, so that the next run finds the overflow again.
        if payload.is_valid:
            rows = n_bytes // payload.bytes_per_row
            entry = JournalEntry(self._number, rows, digest.hexdigest())
            self._pending.append((self.tell(), entry))

    def _add_to_journal(self) -> None:
        """Record what is in the file; what is still in a buffer follows later."""
        there = self.tell() if self._direct is None else self._direct.on_file
        if entries := [entry for end, entry in self._pending if end <= there]:
            self._journal.add(entries)
        self._pending = [(end, entry) for end, entry in self._pending if end > there]

    def _reuse(self, payload: Payload) -> tuple[int, xxhash.xxh3_128]:
        """Return how many rows of ``payload`` are already in the file, and their digest.

        The file position is left after them.
        """
        entry = self._before.get(self._number)
        digest = xxhash.xxh3_128()
        if entry is None or entry.rows > payload.n_rows:
            return 0, digest
        begin, n_bytes = self.tell(), entry.rows * payload.bytes_per_row
        buffer = scratch(_READ_BYTES)
        left = n_bytes
        self._file.seek(begin)
        while left and (got := self._file.readinto(buffer[: min(left, len(buffer))])):
            digest.update(buffer[:got])
            left -= got
        if left or digest.hexdigest() != entry.digest:
            self._file.seek(begin)
            return 0, xxhash.xxh3_128()
        if self._direct is not None:
            self._direct.seek(begin + n_bytes)
        self._count(0, n_bytes)
        return entry.rows, digest
