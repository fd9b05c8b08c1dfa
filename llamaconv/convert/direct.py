"""Write a long file around the page cache, while the next bytes are produced.

Through the page cache, each byte is copied to memory that is touched for the first time and flushed
by the same cores later; that took half of the time of a conversion, and it pushed out what others
had in the cache. Here bytes are collected in aligned buffers, and a thread writes one of them
(``O_DIRECT``) while the next is filled. What is not aligned, the end of a file above all, is
written plainly. So is everything where the system has no such writes or the filesystem refuses.
"""

from __future__ import annotations

import errno
import os
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch

from llamaconv.checkpoint.buffers import scratch

# Offsets, lengths and memory must be multiples of the disk's block; no disk has larger ones.
_ALIGNED = 4096
_BUFFER_BYTES = 2 << 20
_BUFFERS = 3
_O_DIRECT = getattr(os, "O_DIRECT", 0)
_REFUSALS = (errno.EINVAL, errno.EOPNOTSUPP, errno.ENOTTY, errno.ENOSYS)


class DirectFile:
    """The bytes of one file from some place on. Not for several threads at once.

    Attributes:
        place: Where the next byte goes.
        on_file: Every byte before this place was handed to the system without an error.
        is_direct: Whether the filesystem takes direct writes.
    """

    def __init__(self, path: Path, plain: int) -> None:
        """Begin at the start of the file.

        Args:
            path: The file.
            plain: A descriptor that can read and write it, not direct.
        """
        self._plain = plain
        self._direct = _open_direct(path)
        self.is_direct = self._direct is not None
        self._free = deque(scratch(_BUFFER_BYTES) for _ in range(_BUFFERS))
        self._writing: deque[tuple[Future[None], memoryview, int]] = deque()
        self._thread = ThreadPoolExecutor(1)
        self._buffer = self._free.popleft()
        self._base = self._filled = self.on_file = 0

    @property
    def place(self) -> int:
        """Where the next byte goes."""
        return self._base + self._filled

    def write(self, data: memoryview) -> None:
        """Add bytes. Raises ``OSError``, perhaps of bytes that were added before."""
        done = 0
        while done < len(data):
            n = min(len(data) - done, len(self._buffer) - self._filled)
            _copy(data[done : done + n], self._buffer[self._filled : self._filled + n])
            done += n
            self._filled += n
            if self._filled == len(self._buffer):
                self._hand_over()

    def seek(self, place: int) -> None:
        """Write what was added, and go on at ``place``, before which the file has its bytes."""
        self.flush()
        self._base, self._filled = place // _ALIGNED * _ALIGNED, place % _ALIGNED
        if self._filled:
            got = os.pread(self._plain, self._filled, self._base)
            self._buffer[: len(got)] = got
        self.on_file = place

    def flush(self) -> None:
        """Write what was added. Raises ``OSError``."""
        while self._writing:
            self._take_back()
        # A part of the last aligned block is missing, so these bytes are added again by the next
        # buffer.
        _write_all(self._plain, self._buffer[: self._filled], self._base)
        whole = self._filled // _ALIGNED * _ALIGNED
        rest = bytes(self._buffer[whole : self._filled])
        self.on_file = self.place
        self._base, self._filled = self._base + whole, len(rest)
        self._buffer[: len(rest)] = rest

    def close(self) -> None:
        """End the thread, and forget what was added since `flush`."""
        self._thread.shutdown()
        if self._direct is not None:
            os.close(self._direct)
            self._direct = None

    def _hand_over(self) -> None:
        job = self._thread.submit(self._write, self._buffer, self._base)
        self._writing.append((job, self._buffer, self.place))
        self._base, self._filled = self.place, 0
        if not self._free:
            self._take_back()
        self._buffer = self._free.popleft()

    def _take_back(self) -> None:
        job, buffer, end = self._writing.popleft()
        job.result()
        self._free.append(buffer)
        self.on_file = end

    def _write(self, buffer: memoryview, place: int) -> None:
        if self.is_direct:
            assert self._direct is not None
            try:
                # One call may write a part only; what is left is aligned then, or written plainly.
                done = os.pwrite(self._direct, buffer, place)
                while done < len(buffer) and not done % _ALIGNED:
                    done += os.pwrite(self._direct, buffer[done:], place + done)
                _write_all(self._plain, buffer[done:], place + done)
                return
            except OSError as error:
                if error.errno not in _REFUSALS:
                    raise
                self.is_direct = False
        _write_all(self._plain, buffer, place)


def _open_direct(path: Path) -> int | None:
    """Return a descriptor for direct writes, or None where there are none."""
    if not _O_DIRECT:
        return None
    try:
        return os.open(path, os.O_WRONLY | _O_DIRECT)
    except OSError as error:
        if error.errno in _REFUSALS:
            return None
        raise


def _write_all(descriptor: int, data: memoryview, place: int) -> None:
    while len(data):
        done = os.pwrite(descriptor, data, place)
        data, place = data[done:], place + done


def _copy(source: memoryview, target: memoryview) -> None:
    # torch lets other threads run meanwhile; a slice of a memoryview does not.
    if source.readonly or len(source) < 4096:
        target[:] = source
    else:
        torch.frombuffer(target, dtype=torch.uint8).copy_(
            torch.frombuffer(source, dtype=torch.uint8)
        )
