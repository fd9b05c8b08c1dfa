"""Memory that is reused, and that the system gets back in full when it is released."""

from __future__ import annotations

import mmap


def scratch(n_bytes: int) -> memoryview:
    """Return ``n_bytes`` of zeroed memory; the system gets it back when nothing refers to it.

    malloc would put small objects with a longer life where a buffer was, so that the next buffer
    needs new memory: a conversion of 70B to 8 of Meta's files then took 490 MB instead of 210.
    """
    return memoryview(mmap.mmap(-1, max(n_bytes, 1), flags=mmap.MAP_PRIVATE))[:n_bytes]


class ReusableBuffer:
    """Scratch memory that serves one purpose after another."""

    def __init__(self) -> None:
        self._memory = memoryview(b"")

    def take(self, n_bytes: int) -> memoryview:
        """Return ``n_bytes`` of arbitrary content. Earlier results are no longer valid."""
        if len(self._memory) < n_bytes:
            self._memory = scratch(n_bytes)
        return self._memory[:n_bytes]
