"""Progress by bytes: a bar where there is a terminal, a line a second at most elsewhere."""

from __future__ import annotations

import sys
import threading
import time
from types import TracebackType
from typing import NoReturn, TextIO

from tqdm import tqdm

from llamaconv.tables import size

_WORDS = {"write": "writing", "verify": "verifying"}


class Bar:
    """A callback for `convert_checkpoint`; safe to call from threads. A context manager."""

    def __init__(self, quiet: bool = False, stream: TextIO | None = None) -> None:
        self.quiet = quiet
        self.stream = stream or sys.stderr
        self.terminal = self.stream.isatty()
        self._bar: tqdm[NoReturn] | None = None
        self._step = ""
        self._said = 0.0
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
        if self.quiet:
            return
        with self._lock:
            if self.terminal:
                self._draw(step, done, total)
            elif done >= total or time.monotonic() - self._said >= 1:
                self._said = time.monotonic()
                print(
                    f"{_WORDS[step]}: {size(done)} of {size(total)}", file=self.stream, flush=True
                )

    def _draw(self, step: str, done: int, total: int) -> None:
        if self._bar is None or step != self._step:
            if self._bar is not None:
                self._bar.close()
            self._step = step
            self._bar = tqdm(
                total=total, desc=_WORDS[step], unit="B", unit_scale=True, file=self.stream
            )
        self._bar.update(done - self._bar.n)
