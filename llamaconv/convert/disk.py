"""A `Destination` on a disk: the folder of an unfinished target, whose files are fsynced."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from llamaconv.convert.destination import File, Session
from llamaconv.convert.disk_file import DiskFile
from llamaconv.convert.journal import Journal
from llamaconv.convert.output import CountedBlocks
from llamaconv.convert.sync import BackgroundSync
from llamaconv.ranks import Ranks
from llamaconv.report.errors import FailedError, first_few

# A target of up to so many bytes stays in the page cache: who made it loads it next.
_MOST_CACHED_BYTES = 4 << 30
_LONG_FILE_BYTES = 64 << 20


def is_long(n_bytes: int) -> bool:
    """Return whether a target of so many bytes is not to stay in the page cache."""
    return n_bytes > _MOST_CACHED_BYTES


class Disk:
    """A folder that is filled; `staging` gives it its name."""

    can_be_reread = True

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def session(
        self, workers: int, stop: threading.Event, blocks: CountedBlocks, n_bytes: int
    ) -> Session:
        """Return what writes the files of weights; see `Destination.session`."""
        # What the page cache cannot keep for its next reader is written around it.
        around = is_long(n_bytes) and not blocks.are_read_back
        return _DiskSession(self.folder, workers, stop, blocks, around)

    def kept_rows(self, name: str) -> Mapping[int, int]:
        """Return how many rows of each payload of a file an earlier run left, by its number."""
        kept = Journal(self.folder, name).read()
        return {number: entry.rows for number, entry in kept.items()}

    def check_there(self, lengths: Mapping[str, int]) -> None:
        """Open every file: a network filesystem shows what another host wrote once it is opened."""
        wrong = []
        for name, length in lengths.items():
            try:
                with (self.folder / name).open("rb") as file:
                    found = file.seek(0, 2)
            except FileNotFoundError:
                found = -1
            if found != length:
                wrong.append(f"{name} ({length:,} bytes written, {max(found, 0):,} seen)")
        if wrong:
            raise FailedError(
                f"{self.folder}: rank 0 does not see {first_few(wrong, 3)}; the target must be on a "
                "filesystem that every host shares"
            )

    def to_check(self, ranks: Ranks) -> Path:  # noqa: ARG002
        """Return the folder."""
        return self.folder

    @contextmanager
    def create(self, name: str) -> Iterator[BinaryIO]:
        """Open a new file, which is fsynced after the block. Raises ``OSError``."""
        path = self.folder / name
        path.parent.mkdir(exist_ok=True)
        with path.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())

    def put(self, name: str, content: bytes) -> None:
        """Write a new file and fsync it. Raises ``OSError``."""
        with self.create(name) as file:
            file.write(content)


class _DiskSession:
    def __init__(
        self,
        folder: Path,
        workers: int,
        stop: threading.Event,
        blocks: CountedBlocks,
        around: bool,
    ) -> None:
        self.n_helpers = (workers + 1) // 2
        self._folder = folder
        self._stop = stop
        self._blocks = blocks
        self._around = around
        self._sync = BackgroundSync(workers + 1, stop)

    def write(self, file: File) -> tuple[int, Any]:
        self._sync.wait_for_room()
        is_direct = self._around and file.nbytes >= _LONG_FILE_BYTES
        with DiskFile(self._folder, file.name, self._stop, self._blocks.count, is_direct) as output:
            open_file = self._sync.begin(output)
            written = file.write(output)
            length = output.tell()
        if output.was_refused:
            self._blocks.note_refusal()
        self._sync.end(open_file)
        return length, written

    def help(self, writing: Sequence[Future[Any]]) -> None:
        self._sync.work(writing)

    def close(self) -> None:
        self._sync.close()
