"""Work in a thread, so that the kernel stays free: with progress, an early end, and a result.

Limit: the work ends early only where it reports progress.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

from llamaconv.report.errors import FailedError, LlamaconvError, notes
from llamaconv.report.meter import Meter
from llamaconv.report.progress import Progress

T = TypeVar("T")

CANCELLED = "cancelled; the target was not changed"


class CancelledError(Exception):
    """Raised inside of the work. Not a `FailedError`: a check would report that as its result."""


class Work(Generic[T]):
    """A function that runs in a thread.

    Attributes:
        meter: Its progress.
        result: What it returned, or None.
        error: What it raised, or None; for work that was cancelled, a `FailedError` that says so.
        was_cancelled: Whether it ended because it was cancelled.
    """

    def __init__(
        self, run: Callable[[Progress], T], steps: Sequence[str], on_change: Callable[[], None]
    ) -> None:
        """Prepare it; `start` starts it.

        Args:
            run: The work; it is given a callback for its progress.
            steps: The steps that it reports, in their order.
            on_change: Called from its threads after progress, and once after the end.
        """
        self.meter = Meter(steps)
        self.result: T | None = None
        self.error: BaseException | None = None
        self.was_cancelled = False
        self._run, self._on_change = run, on_change
        self._cancelled = threading.Event()
        self._is_over = False
        # Set last, so that who waits for the end sees all that follows from it.
        self._ended = threading.Event()
        self._listeners: list[Progress] = []

    def start(self, progress: Progress | None = None) -> None:
        """Start the thread, once.

        Args:
            progress: Called from the work's threads.
        """
        if progress is not None:
            self._listeners.append(progress)
        threading.Thread(target=self._work, daemon=True).start()

    def _work(self) -> None:
        try:
            self.result = self._run(self._progress)
        except CancelledError as error:
            self.was_cancelled = True
            self.error = FailedError(CANCELLED)
            for note in getattr(error, "__notes__", ()):
                self.error.add_note(note)
        except BaseException as error:  # a thread has nobody to raise it to
            self.error = error
        finally:
            self._is_over = True
            try:
                self._on_change()
            finally:
                self._ended.set()

    def _progress(self, step: str, done: int, total: int) -> None:
        if self._cancelled.is_set():
            raise CancelledError
        self.meter(step, done, total)
        for listener in self._listeners:
            listener(step, done, total)
        self._on_change()

    def also_tell(self, progress: Progress) -> None:
        """Call ``progress`` too, from the work's threads."""
        self._listeners.append(progress)

    @property
    def is_running(self) -> bool:
        """Whether it has not ended yet."""
        return not self._is_over

    def cancel(self) -> None:
        """Ask it to end. It ends with the next progress that it reports."""
        self._cancelled.set()

    @property
    def is_cancelling(self) -> bool:
        """Whether it was asked to end, and runs still."""
        return self._cancelled.is_set() and self.is_running

    def end(self) -> None:
        """Wait until it has ended, whatever its result."""
        self._ended.wait()

    def wait(self) -> T:
        """Wait for the end, and return the result.

        Raises:
            BaseException: What the work raised.
        """
        # An interruption of the kernel is seen between two waits only.
        while not self._ended.wait(0.1):
            pass
        if self.error is not None:
            raise self.error
        assert self.result is not None
        return self.result


def as_llamaconv_error(error: BaseException) -> LlamaconvError:
    """Return ``error`` as one that a notebook can show in a box."""
    if isinstance(error, LlamaconvError):
        return error
    shown = FailedError(f"{type(error).__name__}: {error}".rstrip(": "))
    for note in notes(error):
        shown.add_note(note.removeprefix("note: "))
    return shown
