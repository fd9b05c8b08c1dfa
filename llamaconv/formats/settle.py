"""Sending files to the disk by threads of their own, so that writing and the disk never wait in turns.

Where each writer sent its own file at its end, all wrote at once and then waited at once: the disk
was idle a third of the time.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

from llamaconv.formats.output import Output
from llamaconv.problems import FailedError

# How long a file that is still written may rest between two syncs.
_REST_SECONDS = 0.02


@dataclass(eq=False)
class Unsettled:
    """A file that is not on the disk yet; ``descriptor`` is the writer's own, once more.

    The system reports what went wrong behind a writer's back only to who had the file open then.
    """

    output: Output
    descriptor: int
    whole: bool = False
    busy: bool = False
    due: float = 0.0


class Settler:
    """The files of one process that are begun and not on the disk yet.

    At most ``most`` are here at a time, so that little is left to sync once the last byte is counted.
    """

    def __init__(self, most: int, stop: threading.Event) -> None:
        self._stop = stop
        self._room = threading.Semaphore(most)
        self._files: list[Unsettled] = []
        self._changed = threading.Condition()

    def wait_for_room(self) -> None:
        """Before a file is begun. Raises `FailedError` once ``stop`` is set."""
        while not self._room.acquire(timeout=_REST_SECONDS):
            if self._stop.is_set():
                raise FailedError("stopped, another thread failed")

    def begin(self, output: Output) -> Unsettled:
        """``output`` is going to be written."""
        file = Unsettled(output, os.dup(output.fileno()))
        with self._changed:
            self._files.append(file)
        return file

    def end(self, file: Unsettled) -> None:
        """All of ``file`` is written."""
        with self._changed:
            file.whole = True
            self._changed.notify_all()

    def work(self, writing: Sequence[Future[Any]]) -> None:
        """Syncs files until all ``writing`` is done and synced, or ``stop`` is set.

        Any number of threads may do so at once. Raises ``OSError``, with the file's name; the next run does not take that file over.
        """
        while file := self._next(writing):
            last = file.whole  # what is written from here on needs another sync
            try:
                (os.fsync if last else os.fdatasync)(file.descriptor)
            except OSError as error:
                # What did not reach the disk may be read back all the same, from memory.
                file.output.forget()
                error.filename = str(file.output.path)
                raise
            with self._changed:
                file.busy, file.due = False, time.monotonic() + _REST_SECONDS
                if last:
                    self._remove(file)
                    self._room.release()
                self._changed.notify_all()

    def close(self) -> None:
        """Lets go of what is left, once nobody writes or works any more."""
        for file in list(self._files):
            self._remove(file)

    def _remove(self, file: Unsettled) -> None:
        self._files.remove(file)
        os.close(file.descriptor)

    def _next(self, writing: Sequence[Future[Any]]) -> Unsettled | None:
        """The file to sync next, a whole one first; None at the end."""
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
