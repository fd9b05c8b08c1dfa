"""Progress over all steps of one piece of work: a share, and words with rate and time left."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence

from llamaconv.report.progress import WORDS
from llamaconv.report.tables import size

# The rate is that of the last seconds: a resumed run begins with what it only reads.
_WINDOW_SECONDS = 10.0
_REST_SECONDS = 0.2


class Meter:
    """A callback for progress (see `llamaconv.report.progress.Progress`). Threads may call it.

    Limit: each step counts for the same share, whatever its time.

    Attributes:
        steps: The steps in their order.
        share: How much is done of all steps, from 0 to 1.
    """

    def __init__(self, steps: Sequence[str], clock: Callable[[], float] = time.monotonic) -> None:
        self.steps = tuple(steps)
        self.share = 0.0
        self._clock = clock
        self._lock = threading.Lock()
        self._step, self._done, self._total = "", 0, 0
        self._seen: deque[tuple[float, int]] = deque()

    def __call__(self, step: str, done: int, total: int) -> None:
        """Note that ``done`` of ``total`` bytes of ``step`` are done."""
        with self._lock:
            now = self._clock()
            if step != self._step:
                self._step, self._done = step, 0
                self._seen.clear()
            # Threads may report out of order.
            self._done, self._total = max(done, self._done), total
            if not self._seen or now - self._seen[-1][0] >= _REST_SECONDS:
                self._seen.append((now, self._done))
            while now - self._seen[0][0] > _WINDOW_SECONDS and len(self._seen) > 2:
                self._seen.popleft()
            part = self._done / total if total else 1.0
            self.share = (self._place() + part) / max(1, len(self.steps))

    def _place(self) -> int:
        return self.steps.index(self._step) if self._step in self.steps else 0

    @property
    def words(self) -> str:
        """Such as "1 of 2, writing: 3.2 GB of 16 GB, 950 MB/s, 14 s left"."""
        with self._lock:
            if not self._step:
                return "starting"
            number = f"{self._place() + 1} of {len(self.steps)}, " if len(self.steps) > 1 else ""
            amount = f"{size(self._done)} of {size(self._total)}"
            if self._done >= self._total:
                # Checks of the model's outputs follow the last byte.
                return f"{number}{WORDS[self._step]}: {amount}, finishing"
            return f"{number}{WORDS[self._step]}: {amount}{self._pace()}"

    def _pace(self) -> str:
        (first, was), (last, now) = self._seen[0], self._seen[-1]
        if now <= was or last <= first:
            return ""
        rate = (now - was) / (last - first)
        left = duration((self._total - self._done) / rate)
        return f", {size(int(rate))}/s, {left} left"


def duration(seconds: float) -> str:
    """Return a time in words: ``14 s``, ``3 min``, ``2 h 5 min``."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60} min"
