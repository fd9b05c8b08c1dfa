"""Progress by bytes: a bar in a terminal, elsewhere at most one line per second."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING, NoReturn, TextIO

from llamaconv.report.tables import size

if TYPE_CHECKING:
    from tqdm import tqdm

Progress = Callable[[str, int, int], None]
"""Called from threads with the step ("write", "verify" or "read"), the bytes done, and all its bytes."""


def no_progress(step: str, done: int, total: int) -> None:
    """Ignore the progress."""


WORDS = {"write": "writing", "verify": "verifying", "read": "reading"}
"""What people are told of each step."""


def in_jupyter() -> bool:
    """Return whether a Jupyter server started this kernel, so that a person may be waiting."""
    return "JPY_SESSION_NAME" in os.environ


class Bar:
    """A callback for the progress of a conversion. Threads may call it. A context manager."""

    def __init__(self, quiet: bool = False, stream: TextIO | None = None) -> None:
        self.quiet = quiet
        self.stream = stream or sys.stderr
        self.terminal = self.stream.isatty()
        self._bar: tqdm[NoReturn] | None = None
        self._step = ""
        self._last_line, self._last_time = "", 0.0
        self._lock = threading.Lock()

    def __enter__(self) -> Bar:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.close()

    def __call__(self, step: str, done: int, total: int) -> None:
        """Show that ``done`` of ``total`` bytes of ``step`` (see `Progress`) are done."""
        if self.quiet:
            return
        with self._lock:
            if self.terminal:
                self._draw(step, done, total)
            elif done >= total or time.monotonic() - self._last_time >= 1:
                self._last_time = time.monotonic()
                line = f"{WORDS[step]}: {size(done)} of {size(total)}"
                if line != self._last_line:  # several ranks report the end more than once
                    print(line, file=self.stream, flush=True)
                self._last_line = line

    def _draw(self, step: str, done: int, total: int) -> None:
        from tqdm import tqdm

        if self._bar is None or step != self._step:
            if self._bar is not None:
                self._bar.close()
            self._step = step
            self._bar = tqdm(
                total=total, desc=WORDS[step], unit="B", unit_scale=True, file=self.stream
            )
        self._bar.update(done - self._bar.n)


class Steps:
    """Progress by steps, as one line that is written again. A context manager.

    A person who waits in Jupyter sees it from the second second on; a log of a long computation gets
    a line every 10 seconds. Otherwise nothing is written, so that the output of a short computation does not
    depend on the machine.
    """

    def __init__(self, what: str, total: int, always: bool, stream: TextIO | None = None) -> None:
        self.what, self.total = what, total
        self.stream = stream or sys.stdout
        self._in_jupyter = in_jupyter()
        self._shown = always or self._in_jupyter
        self._done = 0
        self._written = 0
        self._last_time = time.monotonic()

    def __enter__(self) -> Steps:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._written and self._in_jupyter:
            # Nothing is left of the line.
            self._write(f"\r{' ' * self._written}\r")

    def add(self) -> None:
        """Count one step."""
        self._done += 1
        # A log keeps every line, so it gets fewer.
        pause = 1 if self._in_jupyter else 10
        if self._shown and time.monotonic() - self._last_time >= pause:
            self._last_time = time.monotonic()
            line = f"{self.what}: {self._done / self.total:.0%}"
            self._write(f"\r{line}" if self._in_jupyter else f"{line}\n")
            self._written = len(line)

    def _write(self, text: str) -> None:
        self.stream.write(text)
        self.stream.flush()
