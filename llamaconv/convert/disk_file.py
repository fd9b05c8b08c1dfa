"""Write one file of a target to a disk.

What an earlier run wrote of the same file is reused as far as its journal records it and the digest
of the bytes agrees, so that an interrupted run can be continued.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

import xxhash

from llamaconv.checkpoint.buffers import scratch
from llamaconv.convert.direct import DirectFile
from llamaconv.convert.journal import Journal, JournalEntry
from llamaconv.convert.output import Output, Payload, Written

# At most this much of a file is written again after a kill. Shorter files have no journal.
_JOURNAL_BYTES = 8 << 20
_READ_BYTES = 1 << 20


class DiskFile(Output):
    """An `Output` on a disk. After the block the file is complete, but perhaps not fsynced."""

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
        super().__init__(stop, count)
        self.path = folder / name
        self._journal = Journal(folder, name)
        self._before = self._journal.read()
        # A file without a valid journal was removed before.
        self._file = self.path.open("r+b" if self._before else "xb", buffering=0)
        self._direct = DirectFile(self.path, self._file.fileno()) if direct else None
        self.readable = None if direct else self.path
        # What is written and not in the journal yet, with the place in the file where it ends.
        self._pending: list[tuple[int, JournalEntry]] = []
        self._number = 0
        self._since = 0

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

    def reserve(self, n_bytes: int) -> None:
        """Give the file its final length, so that readers take it while it is written."""
        if self.readable is not None and os.fstat(self.fileno()).st_size < n_bytes:
            self._file.truncate(n_bytes)

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

    def _after_block(
        self, payload: Payload, new: int, n_bytes: int, digest: xxhash.xxh3_128
    ) -> None:
        self._since += new
        if self._since >= _JOURNAL_BYTES:
            self._note(payload, n_bytes, digest)
            self._add_to_journal()
            self._since = 0

    def _after_payload(
        self, payload: Payload, begin: int, n_bytes: int, digest: xxhash.xxh3_128
    ) -> None:
        self._note(payload, n_bytes, digest)
        self._number += 1
        if payload.columns is None and payload.blocks.is_needed_again(payload.name):
            if self._direct is not None:
                self._direct.flush()
            which = (payload.name, payload.first, payload.last, payload.row_bytes)
            payload.blocks.wrote(Written(*which, self.path, begin, digest.hexdigest()))

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
