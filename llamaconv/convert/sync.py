"""Fsync files in background threads, so that writing and flushing overlap.

If each writer fsyncs its own file at the end, all write at once and then wait at once: the disk was
idle a third of the time.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

from llamaconv.convert.disk_file import DiskFile
from llamaconv.report.errors import STOPPED, FailedError

# macOS has none of its own.
_sync_data = getattr(os, "fdatasync", os.fsync)
# Seconds between two syncs of a file that is still written.
_REST_SECONDS = 0.02


@dataclass(eq=False)
class OpenFile:
    """A file that is not fsynced yet.

    Attributes:
        output: The file.
        descriptor: A duplicate of the writer's: the system reports an error of the disk only to
            those who had the file open then.
        whole: Whether all of it is written.
        busy: Whether a thread syncs it.
        due: When to sync it next, by ``time.monotonic``.
    """

    output: DiskFile
    descriptor: int
    whole: bool = False
    busy: bool = False
    due: float = 0.0


class BackgroundSync:
    """The files of one process that are begun and not fsynced yet."""

    def __init__(self, most: int, stop: threading.Event) -> None:
        """Start without files.

        Args:
            most: Most files at a time, so that little is left to sync after the last byte.
            stop: Set once another thread has failed.
        """
        self._stop = stop
        self._room = threading.Semaphore(most)
        self._files: list[OpenFile] = []
        self._changed = threading.Condition()

    def wait_for_room(self) -> None:
        """Wait until a file may be begun. Raises `FailedError` once ``stop`` is set."""
        while not self._room.acquire(timeout=_REST_SECONDS):
            if self._stop.is_set():
                raise FailedError(STOPPED)

    def begin(self, output: DiskFile) -> OpenFile:
        """Add ``output``, which is going to be written."""
        file = OpenFile(output, os.dup(output.fileno()))
        with self._changed:
            self._files.append(file)
        return file

    def end(self, file: OpenFile) -> None:
        """Report that all of ``file`` is written."""
        with self._changed:
            file.whole = True
            self._changed.notify_all()

    def work(self, writing: Sequence[Future[Any]]) -> None:
        """Sync files until all ``writing`` is done and synced, or ``stop`` is set.

        Any number of threads may call this at once.

        Raises:
            OSError: The disk failed; with the file's name. The next run does not reuse that file.
        """
        while file := self._next(writing):
            last = file.whole  # what is written from here on needs another sync
            try:
                if last:
                    os.fsync(file.descriptor)
                else:
                    _sync_data(file.descriptor)
            except OSError as error:
                # What did not reach the disk might still be read back from memory.
                file.output.discard_journal()
                error.filename = str(file.output.path)
                raise
            with self._changed:
                file.busy, file.due = False, time.monotonic() + _REST_SECONDS
                if last:
                    self._remove(file)
                    self._room.release()
                self._changed.notify_all()

    def close(self) -> None:
        """Close what is left, once no thread writes or syncs any more."""
        for file in list(self._files):
            self._remove(file)

    def _remove(self, file: OpenFile) -> None:
        self._files.remove(file)
        os.close(file.descriptor)

    def _next(self, writing: Sequence[Future[Any]]) -> OpenFile | None:
        """Return the file to sync next, a whole one first; None at the end."""
        with self._changed:
            while self._files or not all(job.done() for job in writing):
                if self._stop.is_set():
                    break
                now = time.monotonic()
                due = [f for f in self._files if not f.busy and (f.whole or f.due < now)]
                if due:
                    file = max(due, key=lambda file: file.whole)
                    file.busy = True
                    return file
                self._changed.wait(_REST_SECONDS)
            return None
