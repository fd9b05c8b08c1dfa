"""Byte ranges of files that are elsewhere, fetched in parallel and ahead of who needs them.

Whoever reads says first what it will need, in that order; the order is the schedule. Threads fetch
the next ranges of it into a fixed number of buffers, and each buffer is free again once it was read.
So memory does not grow with the files, and each byte is fetched once. What nobody announced is
fetched when it is needed.

Where bytes come from is a `ByteRanges`; `hub_ranges` has that of the Hub.

Limit: one reader follows the schedule. Others may read at the same time, without being announced.
"""

from __future__ import annotations

import threading
from collections import deque
from dataclasses import dataclass, field

import xxhash

from llamaconv.checkpoint.buffers import scratch
from llamaconv.checkpoint.remote_file import RemoteFile
from llamaconv.report.errors import STOPPED, FailedError

# A request costs a round trip, and a range needs memory: 16 of 4 MiB fill 1 GB/s at 60 ms.
RANGE_BYTES = 4 << 20
_REQUESTS_AT_ONCE = 16
_MOST_RANGES = _REQUESTS_AT_ONCE + 4
MOST_BYTES = _MOST_RANGES * RANGE_BYTES
"""Most memory of all buffers."""


Fetched = tuple[str, int, int, str]
"""A range as it came: name of the file, first byte, the byte after the last, and the xxh3-128."""


@dataclass(eq=False)
class _Range:
    """Bytes ``first`` to ``last`` (half-open) of a file, and their memory once they are fetched."""

    file: RemoteFile
    first: int
    last: int
    memory: memoryview = field(default=memoryview(b""), repr=False)
    is_done: bool = False
    is_dropped: bool = False
    error: BaseException | None = None

    def has(self, file: RemoteFile, at: int) -> bool:
        """Return whether byte ``at`` of ``file`` is one of these."""
        return self.first <= at < self.last and self.file == file


class FetchAhead:
    """The ranges that one reader is going to need. Threads may share it.

    Attributes:
        fetched: What came so far, if digests were asked for.
    """

    def __init__(self, digests: bool = False) -> None:
        """Fetch nothing yet; with ``digests``, note the digest of every range that comes."""
        self.fetched: list[Fetched] = []
        self._digests = digests
        self._waiting: deque[_Range] = deque()
        self._held: deque[_Range] = deque()
        self._free: list[memoryview] = []
        self._n_held = 0
        self._changed = threading.Condition()
        self._stop = threading.Event()
        self._threads: list[threading.Thread] = []

    def expect(self, file: RemoteFile, first: int, last: int) -> None:
        """Announce bytes ``first`` to ``last`` (half-open) of ``file`` as the next to be read."""
        with self._changed:
            end = self._waiting[-1] if self._waiting else None
            # What follows the last one directly belongs to the same request, while there is room.
            if end and end.file == file and end.last == first:
                added = min(last, end.first + RANGE_BYTES) - first
                if added > 0:
                    end.last += added
                    first += added
            while first < last:
                self._waiting.append(_Range(file, first, min(first + RANGE_BYTES, last)))
                first += RANGE_BYTES

    def start(self) -> None:
        """Begin to fetch what was announced."""
        with self._changed:
            missing = min(_REQUESTS_AT_ONCE, len(self._waiting)) - len(self._threads)
            for _ in range(missing):
                # A daemon: a request that hangs must not keep a process alive that has failed.
                thread = threading.Thread(target=self._work, daemon=True)
                self._threads.append(thread)
                thread.start()

    def read_into(self, file: RemoteFile, first: int, out: memoryview) -> None:
        """Read ``len(out)`` bytes of ``file`` from byte ``first`` on.

        Raises:
            FailedError: They could not be fetched, or `stop` was called.
        """
        done = 0
        while done < len(out):
            at = first + done
            one = self._wait_for(file, at)
            if one is None:
                assert file.ranges is not None
                file.ranges.read_into(file.name, at, out[done:], self._stop)
                self._note(file, at, out[done:])
                return
            if one.error is not None:
                raise one.error
            n_bytes = min(one.last - at, len(out) - done)
            begin = at - one.first
            out[done : done + n_bytes] = one.memory[begin : begin + n_bytes]
            done += n_bytes
            if at + n_bytes == one.last:
                with self._changed:
                    if not one.is_dropped:
                        self._drop_through(one)

    def stop(self) -> None:
        """Let every thread that fetches or waits end soon, with `FailedError`."""
        self._stop.set()
        with self._changed:
            self._waiting.clear()
            self._changed.notify_all()

    def _wait_for(self, file: RemoteFile, at: int) -> _Range | None:
        """Return the announced range that has a byte, once it is fetched; None if there is none."""
        with self._changed:
            one = next((one for one in self._held if one.has(file, at)), None)
            if one is None and any(one.has(file, at) for one in self._waiting):
                # The reader skipped what comes before it.
                while not self._waiting[0].has(file, at):
                    self._waiting.popleft()
                if self._held:
                    self._drop_through(self._held[-1])
            while one is None or not one.is_done:
                if self._stop.is_set():
                    raise FailedError(STOPPED)
                if one is None:
                    one = next((one for one in self._held if one.has(file, at)), None)
                    if one is None and not any(one.has(file, at) for one in self._waiting):
                        return None
                if one is None or not one.is_done:
                    self._changed.wait(1)
            return one

    def _drop_through(self, last: _Range) -> None:
        """Give back the memory of all ranges up to ``last``; the lock is held."""
        while True:
            one = self._held.popleft()
            one.is_dropped = True
            if one.is_done:
                self._release(one)
            if one is last:
                break
        self._changed.notify_all()

    def _release(self, one: _Range) -> None:
        self._free.append(one.memory)
        one.memory = memoryview(b"")
        self._n_held -= 1

    def _work(self) -> None:
        while one := self._next():
            n_bytes = one.last - one.first
            try:
                assert one.file.ranges is not None
                one.file.ranges.read_into(
                    one.file.name, one.first, one.memory[:n_bytes], self._stop
                )
                self._note(one.file, one.first, one.memory[:n_bytes])
            except BaseException as error:
                one.error = error
            with self._changed:
                one.is_done = True
                if one.is_dropped:
                    self._release(one)
                self._changed.notify_all()

    def _note(self, file: RemoteFile, first: int, content: memoryview) -> None:
        if self._digests:
            digest = xxhash.xxh3_128_hexdigest(content)
            self.fetched.append((file.name, first, first + len(content), digest))

    def _next(self) -> _Range | None:
        """Return the next range with memory for it, once there is some; None at the end."""
        with self._changed:
            while not self._stop.is_set():
                if not self._waiting:
                    break
                if self._n_held < _MOST_RANGES:
                    one = self._waiting.popleft()
                    one.memory = self._free.pop() if self._free else scratch(RANGE_BYTES)
                    self._n_held += 1
                    self._held.append(one)
                    self._changed.notify_all()
                    return one
                self._changed.wait(1)
            self._threads.remove(threading.current_thread())
            return None
