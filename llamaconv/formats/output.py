"""One file of a target while it is written: bytes around the tensors, and the tensors' own.

What an earlier run left of the same file is taken over as far as its journal vouches for it and
its digest agrees, so a run that was killed is not begun anew.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import xxhash

from llamaconv.journal import Entry, Journal
from llamaconv.problems import FailedError
from llamaconv.scratch import scratch

# So much of a file may be written again after a kill. A file that is shorter keeps no journal.
_JOURNAL_BYTES = 8 << 20
_READ_BYTES = 1 << 20


@dataclass(frozen=True)
class Payload:
    """The bytes of one tensor, or of a part of it, in a file.

    It is ``n_rows`` rows of ``row_bytes``; ``blocks`` gives them from a row on, and ``sound`` says
    whether all that it gave is as it should be.
    """

    n_rows: int
    row_bytes: int
    blocks: Callable[[int], Iterator[memoryview]]
    sound: Callable[[], bool]


class Output:
    """The file ``name`` in ``folder``, written from its start to its end. A context manager.

    Left without an error it is whole, but need not be on the disk yet. ``count`` is called with the
    bytes of tensors that were written, and of those that stood there already. Every method raises
    ``OSError``, and `FailedError` once ``stop`` is set.
    """

    def __init__(
        self, folder: Path, name: str, stop: threading.Event, count: Callable[[int, int], None]
    ) -> None:
        self.path = folder / name
        self._stop = stop
        self._count = count
        self._journal = Journal(folder, name)
        self._before = self._journal.read()
        # Only what is vouched for was left there.
        self._file = open(self.path, "r+b" if self._before else "xb", buffering=0)  # noqa: SIM115
        self._pending: list[Entry] = []
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
        with self._file:
            if error is None:
                self._file.truncate()
                if self._journal.begun:
                    self._journal.add(self._pending)

    def fileno(self) -> int:
        return self._file.fileno()

    def forget(self) -> None:
        """The next run is to take nothing of this file over."""
        self._journal.remove()

    def tell(self) -> int:
        return self._file.tell()

    def write(self, data: Any) -> int:
        """All of ``data``, however little an unbuffered file takes at a time; its bytes."""
        left = view = memoryview(data).cast("B")
        while len(left):
            left = left[self._file.write(left) :]
        return len(view)

    def stream(self, payload: Payload) -> tuple[int, str]:
        """Writes a payload, or what is missing of it; its bytes, and their xxh3-128 digest."""
        rows, digest = self._taken_over(payload)
        n_bytes = rows * payload.row_bytes
        for block in payload.blocks(rows):
            if self._stop.is_set():
                raise FailedError("stopped, another thread failed")
            digest.update(block)
            self.write(block)
            self._count(len(block), 0)
            n_bytes += len(block)
            self._since += len(block)
            if self._since >= _JOURNAL_BYTES:
                self._note(payload, n_bytes, digest)
                self._journal.add(self._pending)
                self._pending, self._since = [], 0
        self._note(payload, n_bytes, digest)
        self._number += 1
        return n_bytes, digest.hexdigest()

    def _note(self, payload: Payload, n_bytes: int, digest: xxhash.xxh3_128) -> None:
        # Rows that are not as they should be are made again, so that they are found again.
        if payload.sound():
            rows = n_bytes // payload.row_bytes
            self._pending.append(Entry(self._number, rows, digest.hexdigest()))

    def _taken_over(self, payload: Payload) -> tuple[int, xxhash.xxh3_128]:
        """Rows of ``payload`` that stand here already, and their digest; the file is behind them."""
        entry = self._before.get(self._number)
        digest = xxhash.xxh3_128()
        if entry is None or entry.rows > payload.n_rows:
            return 0, digest
        begin, n_bytes = self.tell(), entry.rows * payload.row_bytes
        buffer = scratch(_READ_BYTES)
        left = n_bytes
        while left and (got := self._file.readinto(buffer[: min(left, len(buffer))])):
            digest.update(buffer[:got])
            left -= got
        if left or digest.hexdigest() != entry.digest:
            self._file.seek(begin)
            return 0, xxhash.xxh3_128()
        self._count(0, n_bytes)
        return entry.rows, digest
