"""One bar under a cell for all steps of its work, drawn again in place.

Where no person waits, as under papermill, a log gets a line every ten seconds and nothing in the
first ten, so that the output of a short run does not depend on the machine.
"""

from __future__ import annotations

import html
import sys
import threading
import time
from collections.abc import Sequence
from types import TracebackType
from typing import TextIO

from IPython.display import DisplayHandle, display

from llamaconv.report.meter import Meter, duration
from llamaconv.report.progress import WORDS, in_jupyter

_DRAW_SECONDS, _LINE_SECONDS = 0.25, 10.0


class CellBar:
    """A callback for progress. Threads may call it. A context manager."""

    def __init__(self, steps: Sequence[str], stream: TextIO | None = None) -> None:
        """Show nothing yet.

        Args:
            steps: The steps in their order (see `llamaconv.report.progress.Progress`).
            stream: Where lines go if there is no person; standard output by default.
        """
        self.meter = Meter(steps)
        self._stream = stream or sys.stdout
        self._in_jupyter = in_jupyter()
        self._shown: DisplayHandle | None = None
        self._lock = threading.Lock()
        self._began = self._last = time.monotonic()

    def __enter__(self) -> CellBar:
        self._began = self._last = time.monotonic()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._shown is None:
            return
        took = duration(time.monotonic() - self._began)
        steps = " and ".join(WORDS[step] for step in self.meter.steps)
        words = f"{steps}: done in {took}" if error is None else f"stopped; {self.meter.words}"
        self._draw(f"<small>{html.escape(words)}</small>")

    def __call__(self, step: str, done: int, total: int) -> None:
        """Show that ``done`` of ``total`` bytes of ``step`` are done."""
        self.meter(step, done, total)
        with self._lock:
            now = time.monotonic()
            if now - self._last < (_DRAW_SECONDS if self._in_jupyter else _LINE_SECONDS):
                return
            self._last = now
            if not self._in_jupyter:
                self._stream.write(f"{self.meter.words}\n")
                self._stream.flush()
                return
            words = html.escape(self.meter.words)
            self._draw(
                f'<progress max="1" value="{self.meter.share:.3f}" style="width:20em" '
                f'aria-label="progress"></progress> <small>{words}</small>'
            )

    def _draw(self, shown: str) -> None:
        bundle = {"text/html": shown, "text/plain": self.meter.words}
        if self._shown is None:
            self._shown = display(bundle, raw=True, display_id=True)
        else:
            self._shown.update(bundle, raw=True)
